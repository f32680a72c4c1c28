"""A published SAE as a source of `convert`: found on disk or on the hub, imported, measured on the model it is for."""

from __future__ import annotations

import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.interop.building import Imported
from convert.interop.registry import HUB_FILES, import_sae
from convert.interop.source import WEIGHT_SUFFIXES
from sae.checkpoint import META
from sae.errors import ConfigError
from sae.runtime import encode
from sae.weights import SAEWeights

from ..config import ConvertConfig
from ..run import RunContext, file_sha256, read_manifest
from .hub import HUB, fetch_file, fetch_folder, parse_address
from .sae_files import GGUF, sae_ggufs

if TYPE_CHECKING:  # `train` imports SAEs too, without llama.cpp
    from ..llama.model import Model

UNNAMED = ConvertConfig()  # nothing said beside the place


def is_published(source: str, config: ConvertConfig = UNNAMED) -> bool:
    """Whether `source` is somebody else's SAE: no GGUF, no checkpoint of ours, no run folder."""
    if config.format or source.startswith(HUB):
        return True
    path = Path(source).expanduser()
    ours = path.suffix == GGUF or (path / META).is_file() or read_manifest(path) is not None
    return path.exists() and not ours and not (path.is_dir() and sae_ggufs(path))


def import_published(
    source: str, config: ConvertConfig = UNNAMED, *, setting: str = "convert.source"
) -> tuple[Path, Imported]:
    """The SAE of `source`, which `setting` names, and where its files lie on this machine."""
    path, label = located(source, setting)
    imported = import_sae(path, label=label, format_name=config.format, hook=config.hook, hook_out=config.hook_out)
    return path, imported


def located(source: str, setting: str) -> tuple[Path, str]:
    """The local path, and the place as its publisher named it ("" for a local one)."""
    if not source.startswith(HUB):
        return Path(source).expanduser(), ""
    repo, revision, inside = parse_address(source)
    setting = f"{setting}={source}"
    label = source.removeprefix(HUB).rstrip("/")
    if not inside.endswith(WEIGHT_SUFFIXES):
        return fetch_folder(repo, inside, HUB_FILES, setting, revision), label
    folder = inside.rpartition("/")[0]
    configs = tuple(name for name in HUB_FILES if not name.endswith(WEIGHT_SUFFIXES))
    fetch_folder(repo, folder, (*configs, inside.rpartition("/")[2]), setting, revision)
    return fetch_file(repo, inside, setting, revision), label


def published_sha256(path: Path) -> str:
    """Hash of the weights: the file, or the folder's files of weights, one after another."""
    if path.is_file():
        return file_sha256(path)
    named = [path / name for name in HUB_FILES if name.endswith(WEIGHT_SUFFIXES) and (path / name).is_file()]
    found = named or sorted(p for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    hashes = [file_sha256(p) for p in found]
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()


def check_width(weights: SAEWeights, probe_ND: np.ndarray, model: Model) -> None:
    """ConfigError where the rows at the hook point are not as wide as the SAE reads."""
    if probe_ND.shape[1] != weights.d_in:
        raise ConfigError(
            f"this SAE reads {weights.d_in} numbers, {weights.hook} of '{model.id.name}' has {probe_ND.shape[1]}; "
            "give its model with model.path=, or another point with convert.hook="
        )


def measured(imported: Imported, probe_ND: np.ndarray, target_NO: np.ndarray, model: Model) -> SAEWeights:
    """What no published file says, taken from the probe: mean and variance of the rows, k where none is given, the host.

    mean = E[y], variance = E||y - mean||^2 over the probe rows, float64; k = mean number of active latents.
    """
    weights = imported.weights
    mean_O = target_NO.mean(axis=0, dtype=np.float64)
    variance = float(((target_NO - mean_O) ** 2).sum(axis=1).mean())
    fields: dict[str, Any] = {"mean_D": mean_O, "variance": variance}
    if not imported.k_known:
        fired = float((encode(weights, probe_ND)[1] > 0).sum(axis=1).mean())
        fields["k"] = min(weights.num_latents, max(1, round(fired)))
    # the model it was run on here; which file and which quantisation it was made on is not known
    known = {"architecture", "n_embd", "n_layer", "vocab_sha256"}
    host = {key: value for key, value in model.id.as_dict().items() if key in known}
    training = weights.training | {"statistics_rows": len(probe_ND)}
    return replace(weights, host=host | {"name": weights.host.get("name", model.id.name)}, training=training, **fields)


def is_named(named: str, model: str) -> bool:
    """Whether a model's own name may be the one that an SAE's files name: one is within the other, but for owner and signs."""
    one, other = (re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower()) for name in (named, model))
    return one in other or other in one


def report_proof(context: RunContext, imported: Imported, found: dict[str, float], model_name: str) -> None:
    """Says it, beside what its publisher says, and warns where it does not look like an SAE of this place."""
    published, named = imported.published, str(imported.weights.host.get("name", ""))
    if named and not is_named(named, model_name):
        context.console.print(
            f"its files name the model {named}, this one is {model_name}", highlight=False, markup=False
        )
    said = ", ".join(f"{name} {published[key]:.4g}" for key, name in (("fvu", "FVU"), ("l0", "L0")) if key in published)
    context.console.print(
        f"it reconstructs {found['rows']:,} held-out rows with FVU {found['fvu']:.4f} and L0 {found['l0']:.1f}"
        + (f"; published: {said}" if said else ""),
        highlight=False,
    )
    doubts = []
    if not found["fvu"] < 1:
        doubts.append("no better than their mean does")
    if "l0" in published and not published["l0"] / 2 <= found["l0"] <= published["l0"] * 2:
        doubts.append("with an L0 far from the published one")
    if doubts:
        context.console.print(
            f"warning: it reconstructs them {' and '.join(doubts)}; is this its model, its hook point, its kind of text?",
            style="yellow", highlight=False,
        )  # fmt: skip


def report_bos(context: RunContext, imported: Imported, prepended: bool) -> None:
    """A warning where the texts here start otherwise than those of its training."""
    said = imported.weights.training.get("prepend_bos")
    if said is not None and said != prepended:
        there, here = ("a BOS", "none") if said else ("no BOS", "one")
        context.console.print(
            f"warning: its training put {there} before every text, this model's texts get {here}; "
            f"corpus.bos={'always' if said else 'never'} captures and evaluates as it did",
            style="yellow", highlight=False,
        )  # fmt: skip


def report_notes(context: RunContext, imported: Imported) -> None:
    for note in imported.notes:
        context.console.print(f"warning: {note}", style="yellow", highlight=False)

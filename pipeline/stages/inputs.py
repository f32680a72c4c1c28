"""Opening what a stage works on: the model, the newest store, the newest SAE. One way for all commands."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from sae.checkpoint import TENSORS
from sae.errors import ConfigError, StoreError
from sae.weights import SAEWeights

from ..config import ModelConfig
from ..cores import usable_cores
from ..run import RunContext, file_sha256, newest_finished, read_manifest, runs_of
from ..store.backends import as_location
from .hub import fetch_file
from .sae_files import load_located, located, split_entry

if TYPE_CHECKING:
    from ..llama.model import Model
    from ..store.reader import ActivationStore

STORE_NAME = "activations.zarr"
SAE_NAME = "sae"
# what an evaluation compares, as people read it
LABELS = {
    "sae": "SAE",
    "pca": "PCA, k components",
    "linear": "linear map of rank k",
    "affine": "linear map of any rank",
    "untrained": "untrained SAE",
    "random_model": "SAE of a random model",
    "mean": "mean ablation",
    "zero": "zero ablation",
}


def model_path(config: ModelConfig) -> Path:
    """The GGUF file that the settings name: a path, a file of a hub repository, or the embedded model."""
    if config.path and (config.repo or config.file):
        raise ConfigError("expected model.path or model.repo with model.file, got both")
    if config.path:
        return Path(config.path).expanduser()
    if bool(config.repo) != bool(config.file):
        raise ConfigError("model.repo and model.file belong together, e.g. model.repo=owner/name model.file=name.gguf")
    if config.repo:
        return fetch_file(config.repo, config.file, f"model.repo={config.repo} model.file={config.file}")
    return Path(str(resources.files("pipeline") / "data" / "pylm.gguf"))


def open_model(context: RunContext, *, blocks: int = 0) -> Model:
    """The model of the settings, or its first blocks, noted as an input of the run."""
    from ..llama.model import Model

    config = context.config.model
    model = Model(model_path(config), n_gpu_layers=config.n_gpu_layers, use_mmap=config.mmap, blocks=blocks)
    context.add_input("model", model.path, model.id.sha256, architecture=model.id.architecture)
    if config.n_gpu_layers and not model.offloads:
        context.console.print(
            f"warning: model.n_gpu_layers={config.n_gpu_layers}, but this llama.cpp is built without a GPU: all layers run on "
            "the CPU (`ggscope doctor`)",
            style="yellow", highlight=False,
        )  # fmt: skip
    return model


def check_prompt(prompt: str) -> None:
    """ConfigError where none is given."""
    if not prompt:
        raise ConfigError("expected a prompt: --prompt TEXT, --prompt-file FILE, or - for standard input")


def describe_model(model: Model) -> str:
    m = model.id
    return f"{Path(model.path).name} (sha256 {m.sha256[:12]}, {m.architecture}, {m.n_layer} blocks x {m.n_embd})"


def counted(n: int, noun: str) -> str:
    """`1 document`, `2,000 documents`."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def store_place(name: str) -> Path | str:
    """A store as it is named by a user: a folder, a URL, or the run folder around a store."""
    place = as_location(name)
    manifest = read_manifest(place) if isinstance(place, Path) else None
    if manifest is not None and "store" in manifest.get("outputs", {}):
        return as_location(manifest["outputs"]["store"])
    return place


def store_path(context: RunContext) -> Path | str:
    """The store of `store.path`, or the store of the newest finished extract run (which one is printed): a folder or a URL."""
    if context.config.store.path:
        return store_place(context.config.store.path)
    return as_location(newest_output(context, "extract", "store", "store"))


def newest_output(context: RunContext, command: str, output: str, label: str) -> str:
    """An output of the newest finished run of `command`, in a run that goes on the one it had; says on the console which
    one it is."""
    before = context.inputs.get(output, {}).get("path", "") if context.resumed else ""
    if before and ("://" in before or Path(before).exists()):
        context.console.print(f"going on with the {label} {relative(before)}", highlight=False)
        return before
    _, manifest = newest_finished(command, output)
    path = manifest["outputs"][output]
    context.console.print(f"using the newest {label}: {relative(path)}", highlight=False)
    return path


def open_store(context: RunContext, weights: SAEWeights | None = None) -> ActivationStore:
    """The store of the settings; without one that of `weights`' training where it is found, else the newest."""
    from ..store.reader import ActivationStore

    wanted = weights.training.get("store_sha256", "") if weights is not None else ""
    path = (own_store(wanted) if wanted and not context.config.store.path else None) or store_path(context)
    store = ActivationStore(path)
    found = store_sha256(store.path)
    if wanted and wanted != found:
        context.console.print(
            f"warning: the SAE was trained on another store than {relative(path)}", style="yellow", highlight=False
        )
    context.add_input("store", store.path, found)
    return store


def own_store(sha256: str) -> Path | str | None:
    """The store of this hash among the finished extract runs; one that is not there any more is none."""
    for _, manifest in runs_of("extract"):
        path = manifest.get("outputs", {}).get("store", "")
        try:
            if path and store_sha256(as_location(path)) == sha256:
                return as_location(path)
        except StoreError:
            continue
    return None


def run_of_sae(command: str, weights: SAEWeights) -> dict[str, str]:
    """The outputs of the newest finished `command` run about this very SAE; of several SAEs' run, those of this one.

    Of the training it came from where thresholds were fitted afterwards.
    """
    sae_id = weights.trained_id if command == "train" else weights.training.get("id")
    if not sae_id:  # an SAE made elsewhere: nothing to compare by
        return newest_finished(command)[1]["outputs"]
    for _, manifest in runs_of(command):
        if manifest.get("status") != "finished":
            continue
        outputs, metrics = manifest["outputs"], manifest.get("metrics", {})
        if metrics.get("sae_id") == sae_id:
            return outputs
        for name, numbers in metrics.get("saes", {}).items():
            if numbers.get("sae_id") == sae_id:
                end = f":{name}"
                return {key.removesuffix(end): path for key, path in outputs.items() if key.endswith(end)}
    raise ConfigError(
        f"expected a finished `ggscope {command}` run of this SAE ({sae_id}) under "
        f"{Path('runs').resolve()}, found none; run `ggscope {command}` on it or name its file"
    )


def outlier_norm(weights: SAEWeights) -> float:
    """Rows of a larger norm were outside the training of this SAE and are outside its metrics; 0: none."""
    return float(weights.training.get("outlier_threshold", 0.0))


def context_tokens(context: RunContext, model: Model, needed: int) -> int:
    """KV cells for `needed` tokens: `model.n_ctx` where given, else as many as needed, if the model was trained for it."""
    if context.config.model.n_ctx:
        return context.config.model.n_ctx
    if needed > model.n_ctx_train:
        raise ConfigError(
            f"{needed} tokens are more than the {model.n_ctx_train} the model was trained for; shorten the prompt"
            f"{' or apply.max_tokens' if context.command == 'apply' else ''}, or set model.n_ctx to try anyway"
        )
    return needed


def store_sha256(place: Path | str) -> str:
    """What a store is of: the hash of its meta.json (model, corpus, plan, settings)."""
    from ..store.schema import meta_sha256

    return meta_sha256(place)


def sae_path(context: RunContext) -> Path:
    """`sae.path` (`located`), or the SAE of the newest finished train run."""
    if context.config.sae.path:
        return located(context.config.sae.path)
    _, manifest = newest_finished("train")
    several = [path for key, path in manifest["outputs"].items() if key.startswith(f"{SAE_NAME}:")]
    if several:
        names = ", ".join(relative(path) for path in several)
        key = "convert.source" if context.command == "convert" else "sae.path"
        raise ConfigError(f"the newest train run holds {len(several)} SAEs; choose one with {key}= ({names})")
    return Path(newest_output(context, "train", "sae", "SAE"))


def load_sae(path: Path, *, stored: bool = False) -> SAEWeights:
    """An SAE from a GGUF file (or one of several in it), a checkpoint folder or the run folder around either.

    `stored`: the matrices of a GGUF as they are stored, rows made float32 when they are asked for.
    """
    return load_located(located(path), stored=stored)


def open_sae(context: RunContext, *, several: bool = False) -> tuple[Path, SAEWeights]:
    """The SAE of the settings, noted as an input. ConfigError for one over several hook points, unless `several`."""
    path = sae_path(context)
    weights = load_sae(path)
    if not several:
        check_one_point(weights, path)
    context.add_input("sae", path, sae_sha256(path))
    return path, weights


def check_one_point(weights: SAEWeights, path: Path, *, transcoders: bool = False) -> None:
    """ConfigError for SAEs over several hook points; for those with one input and one output unless `transcoders`."""
    if not weights.is_wired or (transcoders and weights.is_transcoder):
        return
    points = " and ".join([name for name, _ in weights.ports] or [weights.hook, weights.hook_out])
    wanted = " or a transcoder of one input and one output" if transcoders else ""
    possible = "`ggscope evaluate` measures it, `compare` shows it beside others"
    if weights.is_transcoder:
        possible += ", `ggscope apply` reads and edits with it, `ggscope convert` makes it a GGUF"
    raise ConfigError(
        f"{relative(path)}: expected an SAE at one hook point{wanted}, this one is over {points}: {possible}"
    )


def sae_sha256(path: Path) -> str:
    """Hash of an SAE's file: the GGUF itself, or the tensors of a checkpoint folder."""
    file, _ = split_entry(located(path))
    return file_sha256(file if file.is_file() else file / TENSORS)


def relative(path: Path | str) -> str:
    """The path as a person in this folder would write it; a URL as it is."""
    place = as_location(path)
    if isinstance(place, str):
        return place
    path = place
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def warn_not_finite(context: RunContext, rows: int, windows: Iterable[tuple[str, int]]) -> None:
    """Name the documents with values that are not finite; their rows are flagged and outside everything."""
    if rows:
        named = ", ".join(f"{document}: window {window}" for document, window in windows)
        context.console.print(
            f"warning: {rows:,} rows have values that are not finite and are left out of training and metrics "
            f"({named}, ...)",
            style="yellow", highlight=False,
        )  # fmt: skip


def number(value: float | None) -> str:
    """A metric as people read it; `n/a` for one that cannot be had."""
    return "n/a" if value is None else f"{value:.4f}"


def print_wide(table: Table) -> None:
    """Print a table whole, past the terminal's edge if need be: a cut number is worse than a long line."""
    out = Console(highlight=False)
    needed = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    Console(highlight=False, width=max(out.width, needed), soft_wrap=True).print(table)


def threads(n: int) -> int:
    return n if n > 0 else usable_cores()


def check_host(context: RunContext, weights: SAEWeights, model: Model) -> None:
    """Refuse an SAE of another model; print what only differs in quantisation."""
    from ..llama.identity import check_same_model

    allow = context.config.apply.allow_model_mismatch
    setting = "apply.allow_model_mismatch=true"  # read by every command that comes here
    for warning in check_same_model(weights.host, model.id, allow_mismatch=allow, setting=setting):
        context.console.print(f"warning: {warning}", style="yellow", highlight=False)


def session_options(config: ModelConfig) -> dict[str, Any]:
    return {"n_threads": threads(config.n_threads), "kv_type": config.kv_type, "flash_attn": config.flash_attn}

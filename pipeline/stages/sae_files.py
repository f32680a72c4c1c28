"""Where an SAE lies: a GGUF file, one of several in it, a checkpoint folder, the run folder around either; its labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from convert.sae_gguf import entry_hooks, read_sae_gguf
from sae.checkpoint import META, load_weights
from sae.errors import ConfigError, FormatError
from sae.labels import read_labels
from sae.weights import SAEWeights

from ..run import read_manifest

GGUF = ".gguf"
MARK = ".gguf#"  # file.gguf#1, file.gguf#blocks.3.hook_resid_post
SIDE_FILE = "labels.json"  # in a checkpoint folder; sae.labels.json beside sae.gguf


def located(path: Path | str) -> Path:
    """The checkpoint folder, or the GGUF file (with `#entry` where it was given), that `path` means.

    Raises:
        ConfigError: there is nothing, or a folder with several files to choose from.
    """
    path = Path(path).expanduser()
    file, _ = split_entry(path)
    if not file.exists():
        raise ConfigError(f"{file} does not exist; name an SAE: a .gguf file, or a folder that train or convert wrote")
    if file.is_file():
        if file.suffix != GGUF:
            raise ConfigError(f"{file} is no .gguf file; name one, or the folder of a checkpoint")
        return path
    return _inside(file)


def _inside(folder: Path) -> Path:
    """What a folder holds: a checkpoint, the output of its run (a copied run still names its old place), one GGUF."""
    if (folder / META).is_file():
        return folder
    found = (read_manifest(folder) or {}).get("outputs")
    outputs = found if isinstance(found, dict) else {}
    output = outputs.get("sae")
    for made in (folder / Path(output).name, Path(output)) if isinstance(output, str) else ():
        if (made.suffix == GGUF and made.is_file()) or (made / META).is_file():
            return made
    saes = [*sae_ggufs(folder), *(path for key, path in outputs.items() if key.startswith("sae:"))]  # trained together
    if len(saes) == 1:
        return Path(saes[0])
    if saes:
        raise ConfigError(f"{folder} holds {len(saes)} SAEs; name one: {', '.join(map(str, saes[:8]))}")
    manifest = read_manifest(folder) or {}
    if manifest.get("command") == "train" and manifest.get("status") != "finished":
        raise ConfigError(
            f"{folder} is not finished, it holds no SAE yet: `ggscope train resume={folder}` goes on with it"
        )
    raise ConfigError(
        f"{folder} holds no SAE: neither {META} nor an SAE GGUF; name the folder that train or convert wrote"
    )


def sae_ggufs(folder: Path) -> list[Path]:
    """The files of a folder that are SAE GGUFs; a model's or another one's is none."""
    return [file for file in sorted(folder.glob(f"*{GGUF}")) if _holds_sae(file)]


def _holds_sae(file: Path) -> bool:
    try:
        return bool(entry_hooks(file))
    except FormatError:
        return False


def split_entry(path: Path) -> tuple[Path, str]:
    """`(file, entry)` of `file.gguf#entry`; the entry is empty where none is named."""
    text = str(path)
    if MARK not in text or path.exists():
        return path, ""
    head, _, entry = text.partition(MARK)
    return Path(head + GGUF), entry


def entry_number(file: Path, entry: str) -> int:
    """Which SAE of the file `entry` means: a number, a hook point, or the only one there is. ConfigError otherwise."""
    hooks = entry_hooks(file)
    if not entry and len(hooks) == 1:
        return 0
    choices = ", ".join(f"{file}#{i} ({hook})" for i, hook in enumerate(hooks[:8]))
    if not entry:
        raise ConfigError(f"{file} holds {len(hooks)} SAEs; choose one: {choices}")
    matches = [i for i, hook in enumerate(hooks) if entry in (str(i), hook)]
    if len(matches) != 1:
        raise ConfigError(
            f"{file}#{entry} names {len(matches) or 'no'} SAE{'s' * (len(matches) > 1)} of it; choose one: {choices}"
        )
    return matches[0]


def load_located(path: Path, *, stored: bool = False) -> SAEWeights:
    """The SAE of a path as `located` gives it, a GGUF's matrices as they are stored with `stored`.

    Labels of its side file stand before those in the file.
    """
    file, entry = split_entry(path)
    if file.suffix == GGUF:
        number = entry_number(file, entry)
        weights = read_sae_gguf(file, number, stored=stored)
        side = file.with_suffix(f".{number}.{SIDE_FILE}" if len(entry_hooks(file)) > 1 else f".{SIDE_FILE}")
    else:
        weights, side = load_weights(file), file / SIDE_FILE
    return with_labels(weights, side) if side.is_file() else weights


def with_labels(weights: SAEWeights, file: Path) -> SAEWeights:
    """The SAE with the labels of a side file put over its own. FormatError for a file that holds none of this SAE."""
    ids = {weights.training.get("id", ""), weights.trained_id} - {""}  # of the same latents
    found = read_labels(file, num_latents=weights.num_latents, sae_ids=ids)
    return replace(weights, labels=weights.labels | found)

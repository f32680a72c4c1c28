"""A published SAE on disk: a folder or a single file, and what its place says where the files say nothing."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from sae.errors import FormatError

from .reading import read_arrays, read_json, read_yaml

WEIGHT_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")


class Source:
    """`path` as given; `label` is where it was published, `owner/repo/folder/file`, or the path itself.

    Only names written in this package are opened, and only below the folder: no name is read from a file.
    """

    def __init__(self, path: Path, label: str = "") -> None:
        if not path.exists():
            raise FormatError(f"{path} does not exist; expected the folder or the file of a published SAE")
        if not (path.is_dir() or path.is_file()):
            raise FormatError(f"{path} is neither a folder nor a file; expected those of a published SAE")
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.file = path if path.is_file() else None
        self.label = label or path.absolute().as_posix()
        self._json: dict[str, dict[str, Any]] = {}
        self._arrays: dict[Path, dict[str, Any]] = {}

    def has(self, *names: str) -> bool:
        """Whether the folder holds all of these files."""
        return all((self.folder / name).is_file() for name in names)

    def json(self, name: str) -> dict[str, Any]:
        """The object of a JSON file of the folder, {} where there is none."""
        if name not in self._json:
            self._json[name] = read_json(self.folder / name) if self.has(name) else {}
        return self._json[name]

    def yaml(self, name: str, *keys: str) -> dict[str, str]:
        """What a YAML file of the folder gives for these keys, as `read_yaml`; {} where there is none."""
        return read_yaml(self.folder / name, keys) if self.has(name) else {}

    def arrays(self, name: str = "") -> dict[str, Any]:
        """The arrays of a file of the folder; without a name of the file that was given, or the only one there."""
        path = self.folder / name if name else self.weights
        if path is None:
            raise FormatError(f"{self.path} holds no weights ({', '.join(WEIGHT_SUFFIXES)})")
        if path not in self._arrays:
            self._arrays[path] = read_arrays(path)
        return self._arrays[path]

    @cached_property
    def weights(self) -> Path | None:
        """The weights file: the one that was given, or the only one of the folder."""
        if self.file is not None:
            return self.file if self.file.suffix in WEIGHT_SUFFIXES else None
        found = sorted(p for p in self.folder.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
        return found[0] if len(found) == 1 else None

    @property
    def named(self) -> str:
        """`label` with the name of the weights file: what says the layer where the files say nothing."""
        return self.label if self.file is not None or self.weights is None else f"{self.label}/{self.weights.name}"

    def torch_names(self) -> set[str]:
        """Names in the torch file that was given, or the only one; empty where there is none."""
        if self.weights is None or self.weights.suffix not in (".pt", ".pth"):
            return set()
        return set(self.arrays())

"""Which model a file holds: header, hashes, and whether two of them belong together. No llama_cpp here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf

from sae.errors import FormatError, ModelMismatchError

UNKNOWN_TYPE = "unknown"  # `file_type` of a file that does not say it
_CACHE_VERSION = 1
VERSIONS = (2, 3)  # of GGUF, that the reader knows
_PARSE_ERRORS = (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, struct.error, OSError)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelId:
    """A model as SAEs, stores and manifests remember it. `file_type` is llama.cpp's name, `F16`, `Q4_K_M`."""

    sha256: str  # of the file
    architecture: str
    n_embd: int
    n_layer: int
    file_type: str
    vocab_sha256: str  # of the token list
    name: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelId:
        """The inverse of `as_dict`; FormatError names a missing key."""
        try:
            return cls(**{key: values[key] for key in cls.__dataclass_fields__})
        except KeyError as missing:
            raise FormatError(f"a model description lacks {missing}") from None


def open_gguf(path: str | os.PathLike[str]) -> gguf.GGUFReader:
    """The header of a GGUF file, its tensors memory-mapped and known to lie inside the file.

    FormatError, one line, for a file that is missing, empty, not GGUF or truncated.
    """
    file = Path(path)
    if not file.exists():
        raise FormatError(f"no such model file: {file}")
    if not file.is_file():
        raise FormatError(f"{file} is a folder; expected a .gguf file")
    try:
        with file.open("rb") as stream:
            magic, version = stream.read(4), stream.read(4)
    except OSError as error:
        raise FormatError(f"cannot read {file}: {error.strerror}") from None
    size = file.stat().st_size
    if not size:
        raise FormatError(f"{file} is empty; expected a .gguf file")
    if magic != b"GGUF":
        raise FormatError(f"{file} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    if len(version) == 4 and not {int.from_bytes(version, order) for order in ("little", "big")} & set(VERSIONS):
        raise FormatError(f"{file} is GGUF version {int.from_bytes(version, 'little')}; known are 2 and 3")
    try:
        reader = gguf.GGUFReader(file)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except _PARSE_ERRORS:
        raise FormatError(
            f"{file} ({size} bytes) is truncated or damaged: its header and tables do not fit into it; get it again"
        ) from None
    if size < end:
        raise FormatError(f"{file} is truncated: {size} bytes, its tensors need {end}; get it again")
    return reader


def field_value(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    """One metadata value as a Python object."""
    found = reader.get_field(key)
    return default if found is None else found.contents()


def model_id(path: str | os.PathLike[str]) -> ModelId:
    """The identity of a model file. The hashes are kept in the user's cache folder by (path, size, time)."""
    file = Path(path)
    cached, stamp = _cache_entry(file)
    if cached and (found := _read_cache(cached, stamp)):
        return found
    reader = open_gguf(file)
    identity = _identify(reader, file)
    if cached:
        _write_cache(cached, stamp, identity)
    return identity


def _identify(reader: gguf.GGUFReader, file: Path) -> ModelId:
    architecture = field_value(reader, "general.architecture", "")
    tokens = field_value(reader, "tokenizer.ggml.tokens")
    n_embd = field_value(reader, f"{architecture}.embedding_length")
    n_layer = field_value(reader, f"{architecture}.block_count")
    if not tokens or not n_embd or not n_layer:
        kind = f"its general.architecture is '{architecture}'" if architecture else "it names no architecture"
        raise FormatError(f"{file} is a GGUF file but no language model ({kind})")
    return ModelId(
        sha256=_file_sha256(file),
        architecture=architecture,
        n_embd=int(n_embd),
        n_layer=int(n_layer),
        file_type=_file_type(field_value(reader, "general.file_type")),
        vocab_sha256=vocab_sha256(tokens),
        name=str(field_value(reader, "general.name", file.stem)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FileVocabulary:
    """What the file itself says of its vocabulary: enough to read token ids without llama.cpp."""

    n_vocab: int
    bos: int | None
    eos: int | None


def file_vocabulary(path: str | os.PathLike[str]) -> FileVocabulary | None:
    """None where the file leaves its end token to llama.cpp's defaults. FormatError as `open_gguf`."""
    reader = open_gguf(path)
    eos = field_value(reader, "tokenizer.ggml.eos_token_id")
    tokens = reader.get_field("tokenizer.ggml.tokens")
    if eos is None or tokens is None:
        return None
    return FileVocabulary(
        n_vocab=len(tokens.data), bos=field_value(reader, "tokenizer.ggml.bos_token_id"), eos=int(eos)
    )


def vocab_sha256(tokens: list[str]) -> str:
    """sha256 over the token list, each token as its UTF-8 length (4 bytes, little-endian) and bytes."""
    digest = hashlib.sha256()
    for token in tokens:
        data = token.encode("utf-8", "surrogateescape")
        digest.update(struct.pack("<I", len(data)) + data)
    return digest.hexdigest()


def _file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _file_type(value: int | None) -> str:
    if value is None:
        return UNKNOWN_TYPE
    try:
        return gguf.LlamaFileType(value).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return str(value)


def _cache_entry(file: Path) -> tuple[Path | None, list[Any]]:
    try:
        status = file.stat()
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except (OSError, RuntimeError):
        return None, []
    stamp = [_CACHE_VERSION, str(file.resolve()), status.st_size, status.st_mtime_ns]
    name = hashlib.sha256(stamp[1].encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(home) / "ggscope" / "models" / f"{name}.json", stamp


def _read_cache(entry: Path, stamp: list[Any]) -> ModelId | None:
    try:
        kept = json.loads(entry.read_bytes())
        return ModelId.from_dict(kept["id"]) if kept["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(entry: Path, stamp: list[Any], identity: ModelId) -> None:
    """Best effort: a cache that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, suffix=".partial", delete=False) as temporary:
            json.dump({"stamp": stamp, "id": identity.as_dict()}, temporary)
        os.replace(temporary.name, entry)


_MUST_AGREE = {
    "architecture": "architecture",
    "n_embd": "width",
    "n_layer": "number of blocks",
    "vocab_sha256": "vocabulary",
}


def check_same_model(
    expected: dict[str, Any],
    actual: ModelId,
    *,
    what: str = "this SAE",
    allow_mismatch: bool = False,
    setting: str = "",
) -> list[str]:
    """Warnings about differences that are fine (file, quantisation, unknown hashes) between two models.

    `what` was made on the expected one. ModelMismatchError where architecture, width, number of blocks or vocabulary
    differ, unless `allow_mismatch`, which turns that into a warning too; `setting` is what would set it, where
    something does.
    """
    warnings = []
    for key, label in _MUST_AGREE.items():
        want, came = expected.get(key), getattr(actual, key)
        if not want:
            warnings.append(f"the {label} of the model that {what} was made on is not recorded: not checked")
        elif want != came:
            short = (str(want)[:12], str(came)[:12])
            named = f" ({actual.name})" if actual.name else ""
            message = f"{what} was made on a model with {label} {short[0]}, this model{named} has {short[1]}"
            if not allow_mismatch:
                advice = f", or {setting} to try anyway" if setting else ""
                raise ModelMismatchError(f"{message}; give the model it belongs to{advice}")
            warnings.append(message)
    if expected.get("file_type") and expected["file_type"] != actual.file_type:
        warnings.append(f"{what} was made on {expected['file_type']} weights, this file has {actual.file_type}")
    elif expected.get("sha256") and expected["sha256"] != actual.sha256:
        warnings.append(
            f"{what} was made on another file (different sha256) of the same shape: another quantisation, or other weights"
        )
    return warnings

"""A matrix of a GGUF file in the type it is stored in: rows are dequantised when they are asked for.

The file is mapped for single rows, and read (not mapped) where all bytes are wanted: mapped pages count as the
process's memory once they are touched.

Shape letters: F rows, D columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import gguf
import numpy as np

from sae.errors import FormatError
from sae.rows import RowMatrix

PIECE_BYTES = 1 << 20
# F16 numbers at the head of a block; everything else of it is whole numbers, so a value is finite where these are
_SCALES = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2, "Q5_0": 1, "Q5_1": 2}


@final
class StoredRows(RowMatrix):
    """An (F, D) matrix at `start` of a GGUF file, of a type of gguf's. Raises FormatError when the file shrinks under it."""

    def __init__(self, path: Path, start: int, raw: np.ndarray, type_name: str, shape: tuple[int, int]) -> None:
        """`raw`: the matrix's bytes, a view of the mapped file."""
        self.path, self._start = path, start
        self.type_name, self.shape = type_name, shape
        self.kind = gguf.GGMLQuantizationType[type_name]
        self.raw_FB = raw.reshape(shape[0], -1)  # the bytes of each row

    def rows(self, index: Any) -> np.ndarray:
        raw = self.raw_FB[index]
        flat = np.ascontiguousarray(raw).reshape(-1, self.raw_FB.shape[1])
        values = gguf.quants.dequantize(flat, self.kind).astype(np.float32, copy=False)
        return values.reshape(*raw.shape[:-1], self.shape[1])

    def pieces(self) -> Iterator[np.ndarray]:
        width = self.raw_FB.shape[1]
        buffer = np.empty((max(1, PIECE_BYTES // width), width), np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start)
            for first in range(0, self.shape[0], len(buffer)):
                piece = buffer[: self.shape[0] - first].reshape(-1)
                done = 0
                while done < piece.size:
                    read = file.readinto(piece.data[done:])
                    if not read:
                        raise FormatError(
                            f"{self.path}: became shorter while it was read; give a file that is not written to"
                        )
                    done += read
                yield piece

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        for piece in self.pieces():
            if self.type_name in _SCALES:
                block = gguf.GGML_QUANT_SIZES[self.kind][1]
                values = piece.reshape(-1, block)[:, : 2 * _SCALES[self.type_name]].copy().view("<f2")
            else:
                values = gguf.quants.dequantize(piece.reshape(-1, self.raw_FB.shape[1]), self.kind)
            if not np.isfinite(values).all():
                return False
        return True

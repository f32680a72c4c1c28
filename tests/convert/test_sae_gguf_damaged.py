"""SAE GGUFs with flipped, cut and grown bytes: read, or refused in one line."""

from __future__ import annotations

import numpy as np
import pytest

from convert.sae_gguf import read_sae_gguf, write_sae_gguf
from sae.errors import FormatError

from .test_sae_gguf import ARRAYS, random_sae


def _read_or_refuse(path):
    """(message, None) or ("", weights); any exception but FormatError is the test's failure."""
    try:
        return "", read_sae_gguf(path)
    except FormatError as error:
        return str(error), None


def _fuzz(tmp_path, rounds, seed, encoder_type="F16", decoder_type="F16", labels=None):
    sae = random_sae(d_in=32, num_latents=8, k=2, labels=labels or {})
    types = {"encoder_type": encoder_type, "decoder_type": decoder_type}
    whole = write_sae_gguf(tmp_path / "sae.gguf", sae, **types).read_bytes()
    table_end = whole.rfind(b"sae.0.dec.norm") + 40
    rng, refused = np.random.default_rng(seed), 0
    for i in range(rounds):
        data = bytearray(whole)
        if i % 4 == 0:
            data = data[: rng.integers(len(data))]
        elif i % 4 == 1:  # a run of hostile bytes, often a huge count
            at = rng.integers(table_end)
            data[at : at + 8] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF])]) * 8
        else:
            for at in rng.integers(table_end if i % 4 == 2 else len(data), size=rng.integers(1, 6)):
                data[at] = rng.integers(256)
        path = tmp_path / f"{i}.gguf"  # a new file each: some file systems sync one that is rewritten
        path.write_bytes(data)
        message, back = _read_or_refuse(path)
        path.unlink()
        if back is None:
            assert "\n" not in message
            refused += 1
        else:  # what is accepted is usable
            assert back.W_enc_FD.shape == back.W_dec_FD.shape == (8, 32)
            assert all(np.isfinite(getattr(back, name)).all() for name in ARRAYS if getattr(back, name) is not None)
    assert refused > rounds / 2


def test_damaged_files_raise_format_errors_and_nothing_else(tmp_path):
    _fuzz(tmp_path, 1500, seed=0)


@pytest.mark.parametrize("types", [("Q4_0", "Q5_1"), ("BF16", "Q4_1"), ("Q8_0", "F32")])
def test_damaged_files_of_other_types_and_with_labels_raise_format_errors_and_nothing_else(tmp_path, types):
    _fuzz(tmp_path, 500, 2, *types, labels={0: "first", 7: "last"})


@pytest.mark.long
def test_many_damaged_files_raise_format_errors_and_nothing_else(tmp_path):
    _fuzz(tmp_path, 20_000, seed=1)
    _fuzz(tmp_path, 10_000, 3, "Q4_0", "Q5_1", labels={0: "first", 7: "last"})

"""Damaged files through every parser: one line of ours or usable values, never anything else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from convert.control_vector import read_control_vector, write_control_vector
from convert.interop.reading import read_arrays
from convert.keys import MATRIX_TYPES
from convert.sae_gguf import read_sae_gguf, write_sae_gguf
from sae.checkpoint import load_weights, save_weights
from sae.errors import SAEError
from sae.labels import read_labels

from .interop.oracles import draw, imported, write
from .interop.test_hostile import SETTINGS, refusal
from .test_sae_gguf import random_sae


def damaged(whole: bytes, end: int, turn: int, rng) -> bytes:
    """Cut; a run of hostile bytes, often a huge count; some bytes of the first `end` or of all changed."""
    data = bytearray(whole)
    if turn % 4 == 0:
        return bytes(data[: rng.integers(len(data))])
    if turn % 4 == 1:
        at = rng.integers(end)
        data[at : at + 8] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF])]) * 8
        return bytes(data)
    for at in rng.integers(end if turn % 4 == 2 else len(data), size=rng.integers(1, 6)):
        data[at] = rng.integers(256)
    return bytes(data)


def fuzz(rounds, place, whole, call, *, end=0, seed=0):
    """Damage the file `place` again and again and read it with `call`; the share that was refused."""
    rng, refused = np.random.default_rng(seed), 0
    for turn in range(rounds):
        place.unlink(missing_ok=True)  # a new file each: some file systems sync one that is rewritten
        place.write_bytes(damaged(whole, end or len(whole), turn, rng))
        message = refusal(SAEError, lambda _place: call(), place)
        assert "\n" not in message
        refused += bool(message)
    return refused / rounds


def gguf_as_stored(tmp_path, rounds, kind):
    sae = random_sae(d_in=32, num_latents=8, k=2)
    place = write_sae_gguf(tmp_path / "sae.gguf", sae, encoder_type=kind, decoder_type=kind)
    whole = place.read_bytes()

    def call():
        back = read_sae_gguf(place, stored=True)
        assert np.isfinite(np.asarray(back.W_enc_FD)).all()
        assert np.isfinite(back.W_dec_FD[[0, 7]]).all()

    return fuzz(rounds, place, whole, call, end=whole.rfind(b"sae.0.dec.norm") + 40)


def control_vector(tmp_path, rounds, _kind):
    ones = np.ones(64, np.float32)
    place = write_control_vector(tmp_path / "cv.gguf", {1: ones, 3: ones}, model_hint="llama", n_layer=4)
    whole = place.read_bytes()
    return fuzz(rounds, place, whole, lambda: read_control_vector(place), end=whole.rfind(b"direction.3") + 40)


def arrays(tmp_path, rounds, kind):
    place, values = tmp_path / f"w.{kind}", {"W_enc": np.ones((3, 4), np.float32)}
    if kind == "pt":
        torch.save({"encoder.weight": torch.ones(3, 4), "k": torch.tensor(3), "activation": "TopK"}, place)
    elif kind == "npz":
        np.savez(place, **values)  # pyright: ignore[reportArgumentType] - the stubs take the names for other settings
    else:
        write(tmp_path, "none", None, place.name, values)
    return fuzz(rounds, place, place.read_bytes(), lambda: read_arrays(place))


def settings_file(tmp_path, rounds, form):
    name, weights_name, base, made = SETTINGS[form]
    folder = write(tmp_path / "layers.3", name, base, weights_name, made(draw()))
    return fuzz(rounds, folder / name, (folder / name).read_bytes(), lambda: imported(folder))


def yaml_beside(tmp_path, rounds, _kind):
    a = draw()
    rows = {"W_enc": a["W_enc_FD"], "W_dec": a["W_dec_FD"], "b_enc": a["b_enc"], "b_dec": a["b_dec"]}
    folder = write(tmp_path / "t", "none", None, "layer_3.safetensors", rows)
    place, text = folder / "config.yaml", b"model_name: m\nfeature_input_hook: hook_resid_mid\nscan: [a, b]\n"
    return fuzz(rounds, place, text, lambda: imported(folder))


def labels(tmp_path, rounds, _kind):
    place = tmp_path / "labels.json"
    text = b'{"format": "ggscope-labels", "version": 1, "sae_id": "", "labels": {"3": "a", "7": "the word it"}}'
    return fuzz(rounds, place, text, lambda: read_labels(place, num_latents=8))


def checkpoint(tmp_path, rounds, name):
    save_weights(tmp_path / "sae", replace(random_sae(d_in=32, num_latents=8, k=2), training={"step": 3}))
    place = tmp_path / "sae" / name
    whole = place.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little") if name.endswith(".safetensors") else 0
    return fuzz(rounds, place, whole, lambda: load_weights(tmp_path / "sae"), end=head)


PARSERS = [
    *((gguf_as_stored, kind) for kind in MATRIX_TYPES),
    (control_vector, ""),
    *((arrays, kind) for kind in ("pt", "npz", "safetensors")),
    *((settings_file, form) for form in SETTINGS),
    (yaml_beside, ""),
    (labels, ""),
    *((checkpoint, name) for name in ("sae.json", "sae.safetensors")),
]


LEAST = {yaml_beside: 0.2}  # share that is refused: much that is damaged is still YAML


@pytest.mark.parametrize(("parser", "kind"), PARSERS)
def test_damaged_files_are_refused_in_one_line_or_read(tmp_path, parser, kind):
    assert parser(tmp_path, 200, kind) > LEAST.get(parser, 0.5)


@pytest.mark.long
@pytest.mark.parametrize(("parser", "kind"), PARSERS)
def test_many_damaged_files_are_refused_in_one_line_or_read(tmp_path, parser, kind):
    assert parser(tmp_path, 1_000 if parser is settings_file else 5_000, kind) > LEAST.get(parser, 0.5)

"""The encoder as ggml nodes, on every device llama.cpp knows here: against numpy, with operations missing, from the model's own tensor."""

from __future__ import annotations

import dataclasses
import gc
import struct
import weakref

import numpy as np
import pytest

from pipeline.generate import generate
from pipeline.llama import encoder as module
from pipeline.llama.encoder import DeviceRow, GgmlEncoder, open_encoder
from pipeline.llama.ggml_graph import Backend
from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.placement import device_at
from pipeline.llama.session import Session
from pipeline.llama.symbols import device_at as device_number
from pipeline.llama.symbols import device_count, device_name, is_cpu, op_name, tensor_at
from pipeline.readout import Reader
from sae.errors import ShapeError
from sae.runtime import decode, encode
from tests.interventions.tiny import prompt, sae_at, session, tiny
from tests.llama.test_encoder import ROUNDING, D, F, K, check_support, oracle, sae

DEVICES = {"CPU": 0} | {
    device_name(d).decode(): d for d in map(device_number, range(device_count())) if not is_cpu(d)
}  # fmt: skip
VARIANTS = {
    "topk": {},
    "b_dec kept": {"b_dec_subtracted": False},
    "layer norm": {"norm_mode": "layer", "norm_eps": 0.25, "norm_correction": 1},
    "threshold": {"variant": "threshold", "threshold_F": np.linspace(0.5, 2.0, F).astype(np.float32)},
    "groupmax": {"variant": "groupmax", "k": 16},
    "silent": {"b_enc_F": np.full(F, -30.0)},
    "some silent": {"b_enc_F": np.full(F, -4.0)},
    "all latents": {"k": F},
}


@pytest.fixture(autouse=True)
def without_compiled_parts(monkeypatch):
    monkeypatch.setattr(module, "kernels", lambda: None)


@pytest.fixture(params=DEVICES)
def device(request):
    return DEVICES[request.param]


def rows_of(w, rows=11, seed=7):
    return (w.b_dec_D + 3 * np.random.default_rng(seed).standard_normal((rows, D))).astype(np.float32)


def check_equal(found, expected):
    """The same latents; where two activations are equal within the rounding they may have changed places."""
    for idx_K, vals_K, their_idx_K, their_vals_K in zip(*found, *expected, strict=True):
        np.testing.assert_allclose(vals_K, their_vals_K, rtol=1e-4, atol=1e-4)
        ours, theirs = (dict(zip(i[v > 0].tolist(), v[v > 0].tolist(), strict=True)) for i, v in
                        ((idx_K, vals_K), (their_idx_K, their_vals_K)))  # fmt: skip
        edge = min(theirs.values(), default=0.0) + 1e-4
        assert all(
            value < edge for latent, value in (ours | theirs).items() if latent not in ours or latent not in theirs
        )
        assert not idx_K[vals_K == 0].any()
        assert (np.diff(vals_K) <= 0).all()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_numpys_in_float32(changes, device):
    w = dataclasses.replace(sae(np.random.default_rng(7))[0], **changes)
    x_ND = rows_of(w)
    encoder = GgmlEncoder(w, n_threads=2, device=device)
    assert encoder.selects_on_device
    assert encoder._nodes.takes_rows
    for rows in (1, 11):
        found, expected = encoder.encode(x_ND[:rows]), encode(w, x_ND[:rows])
        assert found[0].shape[1] <= expected[0].shape[1]
        check_equal(found, expected)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_every_type_is_the_oracles_within_its_rounding(dtype, device):
    w, stored = sae(np.random.default_rng(1), dtype)
    x_ND = rows_of(w, rows=5)
    encoder = GgmlEncoder(w, n_threads=2, stored=stored, device=device)
    check_support(oracle(w, x_ND), *encoder.encode(x_ND), K, ROUNDING[dtype])


MISSING = {
    "topk": ("TOP_K", {}, (True, False)),
    "topk's values": ("GET_ROWS", {}, (True, False)),
    "groupmax": ("ARGMAX", VARIANTS["groupmax"], (True, False)),
    "threshold": ("UNARY", VARIANTS["threshold"], (True, False)),
    "layer norm": ("MEAN", VARIANTS["layer norm"], (False, True)),
    "layer norm's root": ("SQRT", VARIANTS["layer norm"], (False, True)),
    "b_dec": ("SUB", VARIANTS["topk"], (False, True)),
    "both": ("SUB", VARIANTS["threshold"], (False, False)),
}


@pytest.mark.parametrize(("operation", "changes", "left"), MISSING.values(), ids=MISSING)
def test_what_the_device_cannot_compute_is_computed_on_the_host(operation, changes, left, monkeypatch):
    supports = Backend.supports
    monkeypatch.setattr(
        Backend, "supports", lambda self, t: op_name(tensor_at(t).op).decode() != operation and supports(self, t)
    )
    w = dataclasses.replace(sae(np.random.default_rng(7))[0], **changes)
    x_ND = rows_of(w)
    encoder = GgmlEncoder(w, n_threads=2)
    assert (encoder._nodes.takes_rows, encoder.selects_on_device) == left
    assert (encoder.row_reading() is not None) == left[0]
    check_equal(encoder.encode(x_ND), encode(w, x_ND))


def test_without_the_product_there_is_no_encoder(monkeypatch, listen):
    heard = listen(module)
    supports = Backend.supports
    monkeypatch.setattr(Backend, "supports", lambda self, t: op_name(tensor_at(t).op) != b"ADD" and supports(self, t))
    w, _ = sae(np.random.default_rng(7))
    assert open_encoder(w, "auto", n_threads=1) is None
    assert "CPU cannot compute ADD, a node of the encoder" in "".join(heard)


@pytest.mark.parametrize("changes", [VARIANTS[name] for name in ("topk", "threshold", "groupmax")])
@pytest.mark.parametrize("value", [1e5, np.inf, np.nan])
def test_rows_beyond_the_type_are_encoded_by_numpy(changes, value, device):
    w, stored = sae(np.random.default_rng(3), "F16")
    w = dataclasses.replace(w, **changes)
    x_ND = rows_of(w, rows=3)
    x_ND[1, 4] = value
    encoder = GgmlEncoder(w, n_threads=1, stored=stored, device=device)
    found = encoder.encode(x_ND)
    if np.isfinite(value):
        check_equal(found, encode(w, x_ND))  # a GPU may hold more than a half does
    else:
        for ours, numpys in zip(found, encode(w, x_ND), strict=True):
            np.testing.assert_array_equal(ours, numpys)
    row = encoder.row_reading()
    if not row.tensor:
        row.x_D[:] = x_ND[1]
        assert row.read(3) is None
        row.x_D[:] = x_ND[0]
        assert row.read(3) is not None


@pytest.mark.parametrize("name", ["topk", "threshold", "groupmax", "layer norm", "silent"])
def test_a_row_read_where_it_is_gives_what_its_encoding_gives(name):
    w = dataclasses.replace(sae(np.random.default_rng(7))[0], **VARIANTS[name])
    encoder = GgmlEncoder(w, n_threads=2)
    row = encoder.row_reading()
    assert isinstance(row, DeviceRow)
    for x_D in rows_of(w, rows=3):
        row.x_D[:] = x_D
        pairs, fired, error = row.read(5)
        idx_1K, vals_1K = encode(w, x_D[None])
        expected = [(i, v) for i, v in zip(idx_1K[0], vals_1K[0], strict=True) if v > 0]
        assert fired == len(expected)
        found = list(struct.iter_unpack("=if", pairs))
        assert [latent for latent, _ in found] == [latent for latent, _ in expected[:5]]
        np.testing.assert_allclose([v for _, v in found], [v for _, v in expected[:5]], rtol=1e-4)
        gap_D = x_D.astype(np.float64) - decode(w, idx_1K, vals_1K, x_D[None])[0]
        assert error == pytest.approx((gap_D**2).sum(), rel=1e-4)


def readings(w, encoder, own_session):
    return [
        event.readings[0]
        for event in generate(own_session, tiny()[0], prompt(), readers=[Reader(w, top=4, encoder=encoder)], max_tokens=6)
        if event.readings
    ]  # fmt: skip


@pytest.mark.parametrize("as_tensor", [False, True], ids=["memory", "tensor"])
def test_the_row_of_a_generated_token_goes_from_the_hooked_tensor_to_the_encoders(as_tensor, monkeypatch):
    w = sae_at(1)
    expected = readings(w, None, session())
    encoder = GgmlEncoder(w, n_threads=1)
    taken = []
    compute = DeviceRow.read

    def watched(self, top):
        taken.append(self.x_D.copy())
        return compute(self, top)

    monkeypatch.setattr(DeviceRow, "read", watched)
    if as_tensor:  # as on a device whose memory is not the host's

        class Elsewhere(DeviceRow):
            def __init__(self, *args):
                super().__init__(*args)
                self.tensor = self._graph.x

        monkeypatch.setattr(module, "DeviceRow", Elsewhere)
    found = readings(w, encoder, session())
    assert len(taken) == 6  # the generated tokens; the prompt came as one batch
    assert len(np.unique([row_D[0] for row_D in taken])) > 1
    assert len(found) == len(expected)
    for ours, numpys in zip(found, expected, strict=True):
        assert [latent for latent, _ in ours.latents] == [latent for latent, _ in numpys.latents]
        np.testing.assert_allclose([v for _, v in ours.latents], [v for _, v in numpys.latents], rtol=1e-3)
        assert ours.l0 == numpys.l0
        assert ours.fvu == pytest.approx(numpys.fvu, rel=1e-3)


@pytest.mark.parametrize("name", ["layer norm", "topk"])
def test_rows_whose_squares_float32_cannot_hold_are_numpys(name, device):
    w = dataclasses.replace(sae(np.random.default_rng(7))[0], **VARIANTS[name])
    x_ND = rows_of(w, rows=3)
    x_ND[1] *= np.float32(1e22)
    check_equal(GgmlEncoder(w, n_threads=1, device=device).encode(x_ND), encode(w, x_ND))


def test_rows_of_another_width_are_refused(device):
    w = sae(np.random.default_rng(7))[0]
    encoder = GgmlEncoder(w, n_threads=1, device=device)
    for width in (1, D // 2, 2 * D):
        with pytest.raises(ShapeError, match=f"expected activations of shape .rows, {D}. for this SAE"):
            encoder.encode(np.ones((2, width), np.float32))


def test_a_cleared_session_lets_go_of_the_reader():
    w, own = sae_at(1), session()
    encoder = GgmlEncoder(w, n_threads=1)
    readings(w, encoder, own)
    kept = weakref.ref(encoder)
    own.clear()
    del encoder
    gc.collect()
    assert kept() is None


def test_a_model_on_the_cpu_has_its_hook_points_there():
    model = tiny()[0]
    assert not model.offloads
    assert device_at(model, HookPoint.parse("blocks.1.hook_resid_post")) == 0
    with Session(model, n_ctx=32) as own:
        assert {node.device for node in own.graph.nodes} == {0}


@pytest.mark.skipif(len(DEVICES) == 1, reason="llama.cpp knows no GPU here")
def test_blocks_on_a_gpu_have_their_encoders_there():
    path = tiny()[0].path
    gpu = next(d for d in DEVICES.values() if d)
    model = Model(path, n_gpu_layers=2)  # the output, and the last block
    last = model.id.n_layer - 1
    first_w = sae_at(0)
    assert device_at(model, HookPoint.parse(first_w.hook)) == 0
    assert device_at(model, HookPoint.parse(f"blocks.{last}.hook_mlp_out")) == gpu
    whole = Model(path, n_gpu_layers=-1)
    assert device_at(whole, HookPoint.parse(first_w.hook)) == gpu
    expected = readings(first_w, None, session())
    with Session(whole, n_ctx=64) as own:
        encoder = GgmlEncoder(first_w, n_threads=1, device=gpu)
        assert encoder.row_reading().tensor
        found = [
            event.readings[0]
            for event in generate(own, whole, prompt(), readers=[Reader(first_w, top=4, encoder=encoder)], max_tokens=6)
            if event.readings
        ]  # fmt: skip
    assert len(found) == len(expected)
    for ours, numpys in zip(found, expected, strict=True):
        assert ours.fvu == pytest.approx(numpys.fvu, rel=2e-2)

"""Every format's files with values of other ranks, shapes, dtypes and JSON types, or damaged bytes, through the whole
import: one line of ours or an SAE of finite numbers, never anything else."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from convert.interop.registry import NAMES
from sae.errors import SAEError

from ..test_fuzz import damaged
from .hub_files import places
from .oracles import draw, imported
from .test_formats import DICTIONARIES
from .test_hostile import refusal
from .test_saelens import config, tensors

TORCH, SAFE, NPZ = (".pt", ".pth"), ".safetensors", ".npz"


def cases():
    """{name: (files below the folder, format, what is read, label of the place)}."""
    found = {}
    for place in places():
        name = f"{place.format} {place.repo}/{place.inside}"
        found[name] = dict(place.files), place.format, place.inside, f"{place.repo}/{place.inside}"
    a = draw()
    for kind, (stored, _) in DICTIONARIES.items():
        trainer = {"dict_class": kind, "layer": 8, "lm_name": "m", "submodule_name": "resid_post_layer_8", "k": 6}
        files = {"ae.pt": stored(a), "config.json": {"trainer": trainer, "buffer": {}}}
        found[f"dictionary_learning {kind}"] = files, "dictionary_learning", "", ""
    evaluated = {"l0": 58.5, "frac_variance_explained": 0.75}
    interrupted = {
        "step": 5,
        "ae": DICTIONARIES["BatchTopKSAE"][0](a),
        "optimizer": {},
        "norm_factor": torch.tensor(3.0),
    }
    beside = {"config.json": {"trainer": {"dict_class": "BatchTopKSAE", "layer": 1}}, "eval_results.json": evaluated}
    found["dictionary_learning interrupted"] = {"ae.pt": interrupted, **beside}, "dictionary_learning", "", ""
    for kind, more, settings in SAELENS:
        arrays = {name: value for name, value in (tensors(a) | more(a)).items() if value is not None}
        files = {
            "cfg.json": config(kind, **settings), "sae_weights.safetensors": arrays,
            "sparsity.safetensors": {"sparsity": np.full(40, -2, "f4")}, "activation_scaler.json": {"scaling_factor": 0.4},
        }  # fmt: skip
        found[f"saelens {kind} {' '.join([*more(a), *settings])}"] = files, "saelens", "", ""
    assert len(found) == len(places()) + len(DICTIONARIES) + 1 + len(SAELENS)
    return found


SCALED = {"normalize_activations": "expected_average_only_in"}
SAELENS = [
    ("standard", lambda a: {"scaling_factor": np.full(40, 1.5, "f4")}, {"finetuning_scaling_factor": True}),
    ("topk", lambda a: {}, {"k": 5, "rescale_acts_by_decoder_norm": True, **SCALED}),
    ("jumprelu", lambda a: {"threshold": a["threshold"]}, SCALED),
    ("jumprelu", lambda a: {"log_threshold": np.log(a["threshold"])}, {"normalize_activations": "layer_norm"}),
    ("gated", lambda a: {"b_gate": a["b_enc"], "b_mag": a["b_enc"], "r_mag": a["threshold"], "b_enc": None}, {}),
    ("batchtopk", lambda a: {"topk_threshold": np.float32(0.5)}, {"k": 5}),
    ("skip_transcoder", lambda a: {"W_skip": np.ones((12, 12), "f4")}, {"hook_name_out": "blocks.1.hook_mlp_out"}),
]
CASES = cases()

PLAIN = (
    None, True, False, 0, -1, 3, 7, 2.5, float("nan"), float("inf"), 1e400, -1e-300, 1e300, 2**64, 10**400, "", "topk", "x" * 300,
    "a\nb", [], [1], [[1]], {}, {"k": 1}, {"in": "a"}, ["a", None],
)  # fmt: skip


def other_array(rng, a):
    """The array with another rank, shape, dtype or values."""
    many = np.asarray(a)
    flat = many.reshape(-1)
    forms = (
        lambda: flat[0] if flat.size else np.float32(0), lambda: flat, lambda: many[None], lambda: many.T,
        lambda: np.zeros((0,), "f4"), lambda: np.zeros((0, 12), "f4"), lambda: np.zeros((40, 0), "f4"), lambda: flat[:1],
        lambda: flat[:-1], lambda: many[..., None], lambda: np.zeros((2,) * 8, "f4"), lambda: np.concatenate([flat, flat]),
        lambda: many.astype("i8"), lambda: many.astype("f2"), lambda: many.astype("f8") * 1e300, lambda: many > 0,
        lambda: many * np.float32(np.nan), lambda: many + np.float32(np.inf), lambda: many * np.float32(3e38),
        lambda: 0 - many * 1, lambda: many * np.float32(1e-45), lambda: many.astype("u1"), lambda: np.zeros_like(many),
    )  # fmt: skip
    with np.errstate(all="ignore"):
        return np.array(forms[rng.integers(len(forms))]())


def changed(rng, content, plain_values):
    """A copy of nested dictionaries with one value, at any depth, replaced, taken out, or put under another name."""
    content = copy.deepcopy(content)
    at = content
    while True:
        if not at:
            at["k"] = PLAIN[rng.integers(len(PLAIN))] if plain_values else np.ones(3, "f4")
            return content
        name = list(at)[rng.integers(len(at))]
        if not isinstance(at[name], dict) or rng.random() < 0.3:
            break
        at = at[name]
    turn, value = rng.integers(8), at.pop(name)
    if turn == 0:
        return content
    if turn == 1:
        at[str(rng.choice(["W_enc", "b_dec", "k", "threshold", "new\nline", "ae", "sae"]))] = value
    elif isinstance(value, (np.ndarray, np.generic, torch.Tensor)) and (turn < 6 or not plain_values):
        at[name] = other_array(rng, value)
    elif plain_values:
        at[name] = other_array(rng, np.ones(3, "f4")) if turn == 7 else PLAIN[rng.integers(len(PLAIN))]
    return content


def put(path, content):
    """One file of the content's own kind, made anew: some file systems sync one that is rewritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if path.suffix in TORCH:
        torch.save(tensors_of(content), path)
    elif path.suffix == SAFE:
        save_file({name: np.array(value, order="C") for name, value in content.items()}, path)
    elif path.suffix == NPZ:
        np.savez(path, **content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content, default=str))


def tensors_of(value):
    if isinstance(value, dict):
        return {name: tensors_of(item) for name, item in value.items()}
    return torch.from_numpy(np.array(value)) if isinstance(value, (np.ndarray, np.generic)) else value


def odd_tensors(rng, path, content):
    """What only torch and npz files can hold: complex numbers, text, strides of 0, sparse ones."""
    name = list(content)[rng.integers(len(content))]
    if path.suffix == NPZ:
        put(path, content | {name: np.array(["a"]) if rng.random() < 0.5 else np.ones((40, 12), "c8")})
        return
    odd = (
        torch.ones(3, dtype=torch.complex64),
        torch.zeros(1).expand(40, 12),
        torch.eye(3).to_sparse(),
        [torch.ones(3)],
    )
    put(path, content | {name: odd[rng.integers(len(odd))]})


def tried(place, label, form):
    """The refusal, "" for an SAE of finite numbers."""

    def finite(path):
        weights = imported(path, label=label, format_name=form).weights
        assert all(np.isfinite(value).all() for value in vars(weights).values() if isinstance(value, np.ndarray))

    return refusal(SAEError, finite, place)


def fuzz_case(folder, name, rounds, seed=0):
    """The share that was refused of `rounds` files of one form, each changed in one or two places."""
    files, form, inside, label = CASES[name]
    rng, refused = np.random.default_rng(seed), 0
    for file, content in files.items():
        put(folder / file, content)
    whole = {file: (folder / file).read_bytes() for file in files}
    assert imported(folder / inside, label=label).format == form
    for turn in range(rounds):
        file = list(files)[rng.integers(len(files))]
        path, content = folder / file, files[file]
        if turn % 4 == 3 or isinstance(content, str):
            path.unlink()
            path.write_bytes(damaged(whole[file], len(whole[file]), turn // 4, rng))
        elif turn % 16 == 2 and path.suffix in (*TORCH, NPZ):
            odd_tensors(rng, path, content)
        else:
            for _ in range(rng.integers(1, 3)):
                content = changed(rng, content, path.suffix not in (SAFE, NPZ))
            put(path, content)
        # by name it comes further, without one through all that recognise files
        message = tried(folder / inside, label, form if turn % 2 else "")
        assert "\n" not in message
        assert len(message) < 900
        refused += bool(message)
        path.unlink()
        path.write_bytes(whole[file])
    print(f"{name}: {rounds} files, {refused / rounds:.0%} refused")
    return refused / rounds


def test_every_format_has_files_here():
    assert {form for _, form, _, _ in CASES.values()} == set(NAMES)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_as_one_number_or_as_many_axes_is_read_or_refused_in_one_line(tmp_path, name):
    files, form, inside, label = CASES[name]
    for file, content in files.items():
        put(tmp_path / file, content)
    refused = 0
    for file, content in files.items():
        inner = {} if isinstance(content, str) else content
        for key, value in inner.items():
            if not isinstance(value, (np.ndarray, np.generic)):
                continue
            for other in (np.float32(1), np.ones((2,) * 5, "f4"), np.zeros((0, 0), "f4")):
                put(tmp_path / file, inner | {key: other})
                message = tried(tmp_path / inside, label, form)
                assert "\n" not in message
                refused += bool(message)
        put(tmp_path / file, content)
    assert refused >= 6 or "interrupted" in name  # its tensors lie deeper
    assert not tried(tmp_path / inside, label, form)


@pytest.mark.parametrize(("file", "change", "said"), [
    ("openai", {"activation": torch.ones(3)}, r"activation should be ReLU or TopK, got a tensor of shape \(3,\)"),
    ("openai", {"activation": ["TopK"]}, "got a list"), ("openai", {"decoder.weight": "text"}, "'decoder.weight' should be a tensor, got 'text'"),
    ("openai", {"encoder.weight": np.float32(1)}, r"'encoder.weight' should be a matrix and not empty, got a tensor of shape \(\)"),
    ("interrupted", {"norm_factor": torch.ones(2, 2)}, r"norm_factor should be a number, got a tensor of shape \(2, 2\)"),
    ("interrupted", {"norm_factor": 0.0}, "norm_factor should be above 0"), ("interrupted", {"norm_factor": True}, "should be a number, got True"),
    ("BatchTopKSAE", {"k": torch.ones(4, 4)}, r"k should be a whole number from 1 to 40, got a tensor of shape \(4, 4\)"),
    ("JumpReluAutoEncoder", {"threshold": np.full(40, 1e39)}, "threshold_F holds NaN or infinity"),
    ("gated", {"r_mag": np.full(40, 200, "f4")}, "W_enc_FD holds NaN or infinity"),
    ("topk k", {"scaling_factor": 3e38}, "W_enc_FD is beyond the range of float32"),
])  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, file, change, said):
    name = next(name for name in CASES if file in name)
    files, _, inside, label = CASES[name]
    target = next(key for key in files if set(change) & set(files[key])) if file != "openai" else next(iter(files))
    for key, content in files.items():
        put(tmp_path / key, content | change if key == target else content)
    message = tried(tmp_path / inside, label, "")
    assert re.search(said, message), message


@pytest.mark.parametrize("name", CASES)
def test_values_of_other_types_and_shapes_are_refused_in_one_line_or_read(tmp_path, name):
    assert fuzz_case(tmp_path, name, 60) > 0.2


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_many_values_of_other_types_and_shapes_are_refused_in_one_line_or_read(tmp_path, name):
    assert fuzz_case(tmp_path, name, 2_000, seed=1) > 0.2

"""Each library's own equations in float64, on the arrays as that library stores them; and our side of the comparison."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

from convert.interop.registry import import_sae
from sae.runtime import decode, encode

D, F, N = 12, 40, 64


def rng(seed=0):
    return np.random.default_rng(seed)


def draw(seed=0, d=D, f=F):
    """x_ND with a mean, an encoder, a decoder with rows of several norms, biases."""
    r = rng(seed)
    return {
        "x": (r.standard_normal((N, d)) * 2 + 0.5).astype("f4"),
        "W_enc_FD": (r.standard_normal((f, d)) / 3).astype("f4"),
        "b_enc": (r.standard_normal(f) / 4).astype("f4"),
        "W_dec_FD": (r.standard_normal((f, d)) / 3).astype("f4"),
        "b_dec": (r.standard_normal(d) / 2).astype("f4"),
        "threshold": r.uniform(0.1, 0.8, f).astype("f4"),
    }


def f8(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def relu(x):
    return np.maximum(x, 0)


def jump(pre, threshold):
    return np.where(pre > threshold, relu(pre), 0)


def topk(values, k):
    kept = np.zeros_like(values)
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    np.put_along_axis(kept, order, np.take_along_axis(values, order, 1), 1)
    return kept


def layer_norm(x):
    mu, sigma = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
    return (x - mu) / (sigma + 1e-5), mu, sigma


def dense(w, x):
    idx_NK, vals_NK = encode(w, x)
    acts_NF = np.zeros((len(x), w.num_latents))
    row = np.repeat(np.arange(len(x)), idx_NK.shape[1]).reshape(idx_NK.shape)
    acts_NF[row[vals_NK > 0], idx_NK[vals_NK > 0]] = vals_NK[vals_NK > 0]
    return acts_NF, decode(w, idx_NK, vals_NK, x)


def close(found, wanted):
    scale = np.abs(wanted).max()
    assert scale > 0
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * scale)


def same(w, x, acts_NF, x_hat_NO):
    """Latents and reconstruction equal to 1e-5 of the largest; some latents fire, and not all."""
    found_NF, found_NO = dense(w, x)
    close(found_NF, acts_NF)
    close(found_NO, x_hat_NO)
    assert 0.005 < (acts_NF > 0).mean() < 0.95


def imported(path, **settings):
    return import_sae(path, **settings)


def write(folder, config_name, config, weights_name, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / config_name).write_text(json.dumps(config))
    (folder / weights_name).parent.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(a, "f4") for k, a in arrays.items()}, folder / weights_name)
    return folder

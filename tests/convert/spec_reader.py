"""A reader of SAE GGUF files written from docs/formats.md alone: struct and numpy, float64, nothing of ours.

If this file has to change for a new SAE GGUF to be read, the specification has to change too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 8: (32, 34), 7: (32, 24), 3: (32, 20), 2: (32, 18)}  # elements, bytes


def parse(data):
    """(keys, tensors): {name: value}, {name: (first byte, type, ne)}."""
    at = 4

    def take(code):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def text():
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            item, count = take("I"), take("Q")
            return [value(item) for _ in range(count)]
        return take(SCALARS[kind])

    assert data[:4] == b"GGUF"
    assert take("I") == 3
    n_tensors, n_keys = take("Q"), take("Q")
    keys = {}
    for _ in range(n_keys):
        name = text()
        keys[name] = value(take("I"))
    table = {}
    for _ in range(n_tensors):
        name = text()
        ne = [take("Q") for _ in range(take("I"))]
        table[name] = ne, take("I"), take("Q")
    alignment = keys.get("general.alignment", 32)
    start = -(-at // alignment) * alignment
    return keys, {name: (start + offset, kind, ne) for name, (ne, kind, offset) in table.items()}


class Tensors(Mapping):
    """{name: float64 array in numpy order}. A type the specification does not name matters only of a tensor that is read."""

    def __init__(self, data, table):
        self.data, self.table = data, table

    def __iter__(self):
        return iter(self.table)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, name):
        start, kind, ne = self.table[name]
        if kind not in BLOCKS:
            raise ValueError(f"tensor {name} is of type {kind}, which the specification does not name")
        items, size = BLOCKS[kind]
        raw = np.frombuffer(self.data, np.uint8, int(np.prod(ne)) // items * size, start).reshape(-1, size)
        return decoded(kind, raw).astype(np.float64).reshape(ne[::-1])


def decoded(kind, raw):
    def half(first):
        return raw[:, first : first + 2].copy().view("<f2").astype(np.float64)

    def nibbles(first):
        q = raw[:, first : first + 16]
        return np.concatenate([q & 15, q >> 4], axis=1).astype(np.float64)

    if kind == 0:
        return raw.copy().view("<f4")
    if kind == 1:
        return raw.copy().view("<f2")
    if kind == 30:
        return (raw.copy().view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind == 8:
        return half(0) * raw[:, 2:].view(np.int8)
    if kind == 2:
        return half(0) * (nibbles(2) - 8)
    if kind == 3:
        return half(0) * nibbles(4) + half(2)
    bits = raw[:, 4:8].copy().view("<u4") >> np.arange(32, dtype=np.uint32) & 1
    return half(0) * (nibbles(8) + 16 * bits) + half(2)


class SpecSAE:
    """The equations of the specification for one entry."""

    def __init__(self, path: Path, entry: int = 0):
        data = path.read_bytes()
        keys, tensors = parse(data)
        assert keys["general.architecture"] == keys["general.type"] == "sae"
        assert entry < keys["sae.count"]
        start = f"sae.{entry}."
        self.keys = {name.removeprefix(start): value for name, value in keys.items() if name.startswith(start)}
        own = {name.removeprefix(start): place for name, place in tensors.items() if name.startswith(start)}
        self.tensors = Tensors(data, own)
        self.training = json.loads(self.keys.get("training", "{}"))
        self.labels = {i: text for i, text in enumerate(self.keys.get("labels", [])) if text}

    def acts(self, x_ND):
        t, keys = self.tensors, self.keys
        mu, sigma = 0.0, 1.0
        if keys["norm.mode"] == "layer":
            mu = x_ND.mean(axis=1, keepdims=True)
            gap = ((x_ND - mu) ** 2).sum(axis=1, keepdims=True)
            sigma = np.sqrt(gap / (x_ND.shape[1] - keys["norm.correction"]))
        n_ND = (x_ND - mu) / (sigma + keys.get("norm.eps", 0.0))
        u_ND = n_ND - t["dec.bias"] if keys["b_dec_subtracted"] else n_ND
        pre_NF = u_ND @ t["enc.weight"].T + t["enc.bias"]
        k, rows = keys["k"], np.arange(len(x_ND))[:, None]
        a_NF = np.zeros_like(pre_NF)
        if keys["variant"] == "threshold":
            a_NF = np.where(pre_NF > t.get("threshold", keys.get("threshold")), pre_NF, 0)
        elif keys["variant"] == "groupmax":
            size = pre_NF.shape[1] // k
            best_NK = pre_NF.reshape(len(x_ND), k, size).argmax(axis=2) + size * np.arange(k)
            a_NF[rows, best_NK] = np.maximum(pre_NF[rows, best_NK], 0)
        else:
            best_NK = np.argsort(-pre_NF, axis=1, kind="stable")[:, :k]
            a_NF[rows, best_NK] = np.maximum(pre_NF[rows, best_NK], 0)
        return a_NF, mu, sigma

    def reconstruct(self, x_ND):
        a_NF, mu, sigma = self.acts(x_ND)
        y_NO = a_NF @ self.tensors["dec.weight"] + self.tensors["dec.bias"]
        if "skip.weight" in self.tensors:
            y_NO = y_NO + x_ND @ self.tensors["skip.weight"].T
        return sigma * y_NO + mu

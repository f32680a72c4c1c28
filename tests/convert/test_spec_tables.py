"""The tables of docs/formats.md against what the writer writes: every key and tensor is in both."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np

from convert.sae_gguf import write_sae_gguf

from .test_sae_gguf import FURTHER, random_sae

TEXT = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
READ_ONLY = {"sae.{i}.threshold"}  # as a key; the writer writes the tensor


def documented(heading):
    section = TEXT.split(f"### {heading}\n", 1)[1].split("\n### ", 1)[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_every_key_and_tensor_that_is_written_is_documented_and_the_reverse(tmp_path):
    full = {"freq_F": np.ones(96), "labels": {3: "a"}, "training": {"config": {}}}
    threshold = {"variant": "threshold", "threshold_F": np.ones(96)}
    keys, tensors = set(), set()
    for number, changes in enumerate((full | threshold, *(changes for _, changes in FURTHER.values()))):
        reader = gguf.GGUFReader(write_sae_gguf(tmp_path / f"{number}.gguf", random_sae(**changes)))
        keys |= {re.sub(r"^sae\.\d+\.", "sae.{i}.", key) for key in reader.fields if not key.startswith("GGUF.")}
        tensors |= {re.sub(r"^sae\.\d+\.", "sae.{i}.", tensor.name) for tensor in reader.tensors}
    assert keys == documented("Keys") - READ_ONLY
    assert tensors == documented("Tensors") - set(gguf.GGMLQuantizationType.__members__)

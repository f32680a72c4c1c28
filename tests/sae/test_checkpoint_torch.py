"""The files of training checkpoints by themselves."""

from __future__ import annotations

import pytest
import torch

from sae.checkpoint_torch import checkpoint_steps, load_checkpoint, prune, save_checkpoint
from sae.errors import FormatError


def test_the_checkpoint_that_was_just_written_is_never_pruned(tmp_path):
    for step in (1, 2, 9):
        save_checkpoint(tmp_path, step, {})
    prune(tmp_path, keep_last=1, step=2)
    assert checkpoint_steps(tmp_path) == [2, 9]


def test_checkpoints_are_in_the_order_of_their_steps_however_many_digits_these_have(tmp_path):
    for step in (100_000_000, 99_999_999, 7):
        save_checkpoint(tmp_path, step, {})
    (tmp_path / "step_00000008.pt.partial").touch()  # of a kill
    assert checkpoint_steps(tmp_path) == [7, 99_999_999, 100_000_000]
    prune(tmp_path, keep_last=2, step=100_000_000)
    assert checkpoint_steps(tmp_path) == [99_999_999, 100_000_000]


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed_or_changes_nothing(tmp_path):
    state = {"x": torch.arange(9.0), "meta": '{"step": 3}'}
    path = save_checkpoint(tmp_path, 3, state)
    good, noticed = path.read_bytes(), 0
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
        try:
            found = load_checkpoint(path)
        except FormatError:
            noticed += 1
            continue
        assert torch.equal(found["x"], state["x"])
        assert found["meta"] == state["meta"]
    data = good.index(state["x"].numpy().tobytes())
    assert noticed > 36
    path.write_bytes(good[:data] + bytes([good[data] ^ 1]) + good[data + 1 :])
    with pytest.raises(FormatError, match=r"the checksum of archive/data/0 does not fit\); delete it"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 1}, "is not a ggscope-training file"),
        ({"format": "ggscope-sae", "version": 1}, "is not a ggscope-training file"),
        ([1, 2], "is not a ggscope-training file"),
        ({"format": "ggscope-training", "version": 2}, "has version 2, this program reads version 1"),
        ({"format": "ggscope-training"}, "has version None, this program reads version 1"),
    ],
)
def test_files_of_torch_that_are_no_checkpoint_of_this_version_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / "step_00000003.pt")
    with pytest.raises(FormatError, match=message):
        load_checkpoint(tmp_path / "step_00000003.pt")

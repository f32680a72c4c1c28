"""The files around checkpoints: the best one, the note of one that diverged, and the step that all have."""

from __future__ import annotations

import json
import os

import pytest

from sae.checkpoint_torch import checkpoint_path, checkpoint_steps, save_checkpoint
from sae.errors import ConfigError
from sae.saving import BEST, DIVERGED, Saves, common_step, diverged_at, keep_as, restored


class Stub:
    """What `Saves` asks of a learner."""

    def __init__(self, *, better=False, best=None):
        self.step, self.diverged, self.better, self.best, self.loaded, self.asked = 0, "", better, best, None, 0

    def check_finite(self):
        pass

    def check_identity(self, identity):
        if identity != "same":
            raise ConfigError("another identity")

    def judge(self):
        self.asked += 1
        return self.better

    def tensors(self):
        return {}

    def facts(self):
        return {"identity": "same"}

    def load(self, meta, state):
        self.loaded = meta["data_state"]


def saves(folder, *, writes=True, save_best=True, keep_last=1, **learners):
    return Saves(folder, learners, keep_last=keep_last, save_best=save_best, writes=writes)


def note(folder, name, step):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / DIVERGED).write_text(json.dumps({"step": step, "message": "nan"}))


def test_only_a_checkpoint_in_its_turn_that_is_better_becomes_the_best(tmp_path):
    good, bad = Stub(better=True), Stub()
    both = saves(tmp_path, good=good, bad=bad)
    both.save(3, {}, scheduled=False)
    assert (good.asked, bad.asked) == (0, 0)
    both.save(4, {}, scheduled=True)
    assert (good.asked, bad.asked) == (1, 1)
    assert (tmp_path / "good" / BEST).exists()
    assert not (tmp_path / "bad" / BEST).exists()
    saves(tmp_path, save_best=False, bad=good).save(5, {}, scheduled=True)
    assert not (tmp_path / "bad" / BEST).exists()
    saves(tmp_path, writes=False, good=good).save(6, {}, scheduled=True)
    assert checkpoint_steps(tmp_path / "good") == [4]
    assert good.asked == 3  # every rank judges


def test_where_the_checkpoint_lies_is_the_file_of_one_and_the_folder_of_several(tmp_path):
    assert saves(tmp_path, one=Stub()).save(3, {}, scheduled=False) == checkpoint_path(tmp_path / "one", 3)
    assert saves(tmp_path, one=Stub(), two=Stub()).save(4, {}, scheduled=False) == tmp_path


def test_parameters_that_are_not_finite_are_not_saved_by_any(tmp_path):
    one, two = Stub(), Stub()
    two.check_finite = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        saves(tmp_path, one=one, two=two).save(3, {}, scheduled=True)
    assert not list(tmp_path.rglob("*.pt"))


def test_no_old_checkpoint_goes_before_all_new_ones_are_there(tmp_path):
    one, two = Stub(), Stub()
    both = saves(tmp_path, one=one, two=two)
    both.save(3, {}, scheduled=True)
    two.tensors = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        both.save(4, {}, scheduled=True)
    assert common_step(tmp_path, ["one", "two"]) == 3


def test_one_that_diverged_is_neither_saved_nor_restored(tmp_path):
    one, two = Stub(), Stub()
    both = saves(tmp_path, one=one, two=two)
    both.save(3, {"at": 3}, scheduled=True)
    two.diverged, two.step = "nan", 4
    saves(tmp_path, writes=False, two=two).leave_out("two")
    assert diverged_at(tmp_path / "two") is None
    both.leave_out("two")
    both.save(4, {"at": 4}, scheduled=True)
    assert checkpoint_steps(tmp_path / "two") == [3]
    one, two = Stub(), Stub()
    assert saves(tmp_path, one=one, two=two).restore(4) == {"at": 4}
    assert (two.step, two.diverged, two.loaded, one.loaded) == (4, "nan", None, {"at": 4})
    save_checkpoint(tmp_path / "one", 3, {"meta": json.dumps({"identity": "same", "data_state": {"at": 3}})})
    again = saves(tmp_path, one=Stub(), two=Stub())
    assert again.restore(3) == {"at": 3}  # from before it diverged
    assert diverged_at(tmp_path / "two") is None
    again.forget_after(3)
    assert checkpoint_steps(tmp_path / "one") == [3]


def test_a_best_checkpoint_that_a_kill_left_out_is_made_up_for(tmp_path):
    saves(tmp_path, one=Stub()).save(3, {}, scheduled=True)
    for step, made in ((2, False), (3, True)):
        saves(tmp_path, one=Stub(best={"step": step})).restore(3)
        assert (tmp_path / "one" / BEST).exists() == made


def test_only_the_process_that_writes_changes_the_folder_and_the_best_is_kept_only_where_it_is_asked_for(tmp_path):
    saves(tmp_path, keep_last=2, one=Stub()).save(3, {}, scheduled=True)
    saves(tmp_path, keep_last=2, one=Stub()).save(4, {}, scheduled=True)
    note(tmp_path, "one", 5)
    before = sorted(path.name for path in (tmp_path / "one").iterdir())
    other = saves(tmp_path, writes=False, one=Stub(best={"step": 4}))
    other.restore(4)
    other.forget_after(3)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == before
    saves(tmp_path, save_best=False, one=Stub(best={"step": 4})).restore(4)
    assert not (tmp_path / "one" / BEST).exists()
    saves(tmp_path, one=Stub()).forget_after(3)
    assert checkpoint_steps(tmp_path / "one") == [3]


def test_another_check_takes_the_place_of_the_learners_own(tmp_path):
    path = save_checkpoint(tmp_path, 3, {"meta": json.dumps({"identity": "other", "data_state": {}})})
    seen = []
    assert restored(Stub(), path, seen.append) == {}
    assert seen == ["other"]
    with pytest.raises(ConfigError, match="another identity"):
        restored(Stub(), path)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_kept_under_a_second_name_outlives_the_first(tmp_path, links, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    path, copy = tmp_path / "a.pt", tmp_path / BEST
    path.write_bytes(b"new")
    copy.write_bytes(b"old")
    (tmp_path / "older.pt").write_bytes(b"older")
    (tmp_path / f"{BEST}.partial").hardlink_to(tmp_path / "older.pt")  # of a run that was killed
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    keep_as(path, copy)
    path.unlink()
    assert copy.read_bytes() == b"new"
    assert (tmp_path / "older.pt").read_bytes() == b"older"
    assert sorted(file.name for file in tmp_path.iterdir()) == [BEST, "older.pt"]


def test_the_common_step_counts_one_that_was_left_out_as_having_what_came_after(tmp_path):
    for name, steps in (("a", (4, 8)), ("b", (4,))):
        for step in steps:
            save_checkpoint(tmp_path / name, step, {})
    assert common_step(tmp_path, ["a", "b"]) == 4
    for left, common in ((6, 8), (8, 8), (9, 4)):
        note(tmp_path, "b", left)
        assert common_step(tmp_path, ["a", "b"]) == common
    checkpoint_path(tmp_path / "a", 8).unlink()
    assert common_step(tmp_path, ["a", "c"], first=4) == 0  # a kill in the midst of the first
    with pytest.raises(ConfigError, match="a: 4; c: none"):
        common_step(tmp_path, ["a", "c"], first=3)
    assert common_step(tmp_path, ["c", "d"]) == 0

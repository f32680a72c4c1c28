"""Settings that a command does not read are said to be ignored, and no others."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import replace

import pytest

from pipeline.cli import checked_overrides, main, take_texts, take_words
from pipeline.commands import COMMANDS
from pipeline.config import Config, SAEConfig, TogetherConfig, TrainerConfig
from pipeline.help import settings_of
from pipeline.unread import every_setting, warnings
from tests.cli.test_cli import composed
from tests.tiny_llama import write_tiny_llama

STREAM = TrainerConfig(source="stream")


@pytest.mark.parametrize(
    ("name", "keys", "config", "expected"),
    [
        ("lens", ["hook.points", "lens.top"], {}, ["`ggscope lens` does not read hook.points"]),
        ("evaluate", ["corpus.split"], {}, ["`ggscope evaluate` does not read corpus.split"]),
        ("evaluate", ["apply.allow_model_mismatch", "corpus", "experiment", "run_dir"], {}, []),
        ("inspect", ["model.path", "run_dir"], {}, ["`ggscope inspect` does not read run_dir"]),
        ("train", ["model.path", "corpus", "sae.k"], {},
         ["with trainer.source=store `ggscope train` does not read model.path, corpus"]),
        ("train", ["model.path", "corpus.max_tokens"], {"trainer": STREAM}, []),
        ("train", ["store.path"], {"trainer": STREAM}, ["with trainer.source=stream `ggscope train` does not read store.path"]),
        ("train", ["sae.k", "sae.l1_coef", "sae.l0_coef"], {"sae": SAEConfig(variant="relu")},
         ["with sae.variant=relu `ggscope train` does not read sae.l0_coef", "with sae.variant=relu `ggscope train` does not read sae.k"]),
        ("train", ["trainer.lr"], {"trainer": TrainerConfig(lr_search=[1e-3, 2e-3])}, ["with trainer.lr_search `ggscope train` does not read trainer.lr"]),
        ("train", ["sae.k", "together.k"], {"together": TogetherConfig(k=[1, 2])}, ["with together.k `ggscope train` does not read sae.k"]),
        ("extract", ["corpus.token_dtype"], {}, ["with corpus.kind=stdlib `ggscope extract` does not read corpus.token_dtype"]),
        ("extract", ["executor", "executor.workers"], {}, ["with executor=local `ggscope extract` does not read executor.workers"]),
        ("apply", ["intervention.coeff"], {}, ["with intervention=none `ggscope apply` does not read intervention.coeff"]),
    ],
)  # fmt: skip
def test_what_is_typed_and_not_read_is_named(name, keys, config, expected):
    assert warnings(name, keys, replace(Config(), **config)) == expected


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.groups])
def test_no_setting_of_the_examples_in_the_help_is_ignored(name):
    for example in COMMANDS[name].examples:
        words = shlex.split(example.split("|")[-1])
        overrides = checked_overrides(
            name, take_texts(name, [w for w in take_words(name, words[2:])[2] if w != "-"])[1]
        )
        if "-m" not in overrides:
            keys = [override.partition("=")[0] for override in overrides]
            assert warnings(name, keys, composed(name, *overrides)) == [], example


@pytest.fixture
def reads(monkeypatch):
    """The settings that code of ours looks at, but for the check of their ranges."""
    found = set()
    for group in dataclasses.fields(Config):
        node = getattr(Config(), group.name)
        if dataclasses.is_dataclass(node):
            record(monkeypatch, type(node), group.name, found)
    return found


def record(monkeypatch, cls, group, found):
    names = {field.name for field in dataclasses.fields(cls)}

    def looked_up(self, name):
        file = sys._getframe(1).f_code.co_filename
        if name in names and "/pipeline/" in file and not file.endswith(("ranges.py", "unread.py")):
            found.add(f"{group}.{name}")
        return object.__getattribute__(self, name)

    monkeypatch.setattr(cls, "__getattribute__", looked_up)


@pytest.mark.parametrize(
    ("name", "args", "not_read"),
    [
        ("extract", ["corpus=text", "corpus.paths=[a.txt]", "corpus.split=all", "corpus.context_tokens=24", "extract.calibration_tokens=400"],
         {"store.verify", "corpus.dataset", "corpus.token_dtype", "executor.workers", "corpus.generate_temperature"}),
        ("lens", ["--prompt", "def f(x):"], set()),
        ("patch", ["--clean", "x = a", "--corrupted", "x = b", "--answer", "a", "--wrong", "b"], set()),
        ("heads", ["--prompt", "def f(x):", "--answer", "x", "--wrong", "y"], set()),
        ("inspect", [], set()),
    ],
)  # fmt: skip
def test_what_a_command_reads_is_what_it_is_said_to_read(name, args, not_read, reads, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_llama(tmp_path / "tiny.gguf")
    (tmp_path / "a.txt").write_text("def walk(tree):\n    return [node for node in tree]\n" * 40)
    points = ["hook.points=[blocks.1.hook_resid_post]"] if name == "extract" else []
    assert (
        main(
            [
                name,
                *(["tiny.gguf"] if name == "inspect" else ["model.path=tiny.gguf"]),
                "model.n_threads=1",
                *points,
                *args,
            ]
        )
        == 0
    )
    said = set(settings_of(name, every_setting()))
    assert reads <= said
    assert not_read <= said - reads
    assert "does not read" not in capsys.readouterr().err


def test_the_line_comes_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["lens", "hook.points=[x]", "--prompt", "x", "model.path=no.gguf"]) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first == "warning: `ggscope lens` does not read hook.points"
    assert "no.gguf" in last

"""What help says: choices beside the defaults, and only what a command takes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict

import pytest

from convert.keys import MATRIX_TYPES
from pipeline.cli import main
from pipeline.commands import COMMANDS
from pipeline.config import Config, CorpusConfig
from pipeline.corpus.cutting import PACKINGS
from pipeline.corpus.encoding import BOS_POLICIES
from pipeline.corpus.plan import DTYPES
from pipeline.corpus.readers import KINDS, SPLITS
from pipeline.corpus.sources.tokens import TOKEN_DTYPES
from pipeline.executors import KINDS as EXECUTORS
from pipeline.help import settings_of
from pipeline.interventions.base import PHASES
from pipeline.meanings import meanings
from pipeline.ranges import CHOICES, check_ranges
from pipeline.run import flat
from pipeline.stages.live import KINDS as INTERVENTIONS
from pipeline.stages.rows import SOURCES
from sae.errors import ConfigError


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")


def help_lines(name, capsys):
    assert main([name, "--help"]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_settings_and_groups_show_their_choices_beside_the_default(capsys):
    lines = help_lines("extract", capsys)
    assert any(
        line.startswith("extract.dtype=auto (auto | float16 | bfloat16 | float32) of stored values") for line in lines
    )
    assert "corpus=stdlib (datasets | jsonl | parquet | stdin | stdlib | text | tokens)" in lines
    assert "executor=local (local | pool | ray | submitit)" in lines
    assert "extract.batch_tokens=2048 tokens of one llama_decode" in lines
    assert "intervention=none (ablate | clamp | heads | none | reconstruct | steer)" in help_lines("apply", capsys)
    assert "logger=jsonl (jsonl | mlflow | tensorboard | trackio | wandb)" in help_lines("train", capsys)


def test_what_a_0_stands_for_is_said(capsys):
    lines = help_lines("evaluate", capsys)
    assert "evaluate.tokens=500000 rows for the reconstruction metrics; 0: all that are held out" in lines
    assert any(line.endswith("0: all that are held out") for line in lines if "CE and KL" in line)
    assert "intervention=steer takes 8 where none is given" in " ".join(help_lines("apply", capsys))


def test_only_commands_that_go_on_where_they_stopped_say_that_resuming_continues(capsys):
    for name in ("run", "extract", "train"):
        assert "resume=RUN|latest continues;" in help_lines(name, capsys)[-1]
    assert "resume=RUN|latest starts again with a run's settings;" in help_lines("evaluate", capsys)[-1]


def test_every_setting_of_every_command_says_what_it_means():
    said, silent = meanings(), set()
    for name, command in COMMANDS.items():
        silent |= {key for key in settings_of(name, flat(asdict(Config()))) if key not in said and command.groups}
    assert not silent
    assert said["sae.k_start"] == "topk, batchtopk, matryoshka: k falls from here to k ..."
    assert said["corpus.packing"].startswith(
        "documents: one window never crosses"
    )  # the comment is on a line of its own


@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["train", "--help"]) == 0
    _, settings = capsys.readouterr().out.split("settings:\n")
    assert max(len(line) for line in settings.splitlines() if line.startswith("  ")) <= int(columns)


def test_the_choices_are_those_of_the_code_that_takes_them():
    for key, known in {
        "corpus.kind": KINDS, "corpus.split": SPLITS, "corpus.packing": PACKINGS, "corpus.bos": BOS_POLICIES,
        "corpus.token_dtype": TOKEN_DTYPES, "extract.dtype": DTYPES, "executor.kind": EXECUTORS,
        "trainer.source": SOURCES, "intervention.kind": INTERVENTIONS, "intervention.phase": PHASES,
        "convert.encoder_type": MATRIX_TYPES, "convert.decoder_type": MATRIX_TYPES,
    }.items():  # fmt: skip
        assert set(CHOICES[key]) == set(known), key


def test_every_default_is_one_of_its_choices_and_another_value_is_refused():
    check_ranges(Config())
    with pytest.raises(ConfigError, match=r"^corpus\.split='test'; expected train, held_out, all$"):
        check_ranges(Config(corpus=CorpusConfig(split="test")))


@pytest.mark.parametrize(("name", "keeps"), [("extract", True), ("store", False), ("inspect", False)])
def test_only_commands_that_keep_a_run_folder_offer_to_continue_or_name_it(name, keeps, capsys):
    text = "\n".join(help_lines(name, capsys))
    assert ("resume=" in text, "run_dir=" in text) == (keeps, keeps)


def test_usage_says_how_many_paths_a_command_takes(capsys):
    assert any(line.startswith("usage: ggscope inspect [PATH] [key") for line in help_lines("inspect", capsys))
    assert any("info|verify|merge|compact [PATH...] [key" in line for line in help_lines("store", capsys))


@pytest.mark.parametrize(("name", "there"), [("store", True), ("extract", False), ("train", False)])
def test_settings_of_the_store_command_are_listed_for_it_alone(name, there, capsys):
    lines = help_lines(name, capsys)
    assert any(line.startswith("store.inputs=") for line in lines) == there
    assert any(line.startswith("store.format=") for line in lines) == there
    assert any(line.startswith("store.path=") for line in lines)


def test_a_reader_that_stops_reading_ends_the_help_without_a_word():
    command = f"{sys.executable} -m pipeline.cli extract --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("ggscope extract")
    assert done.stderr == ""

"""What commands say on the way: edits, warnings about where things run and what is measured."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from pipeline.config import Config, CorpusConfig, InterventionConfig, ModelConfig
from pipeline.llama.symbols import lc
from pipeline.readout import ReadoutEvent
from pipeline.resuming import run_to_resume, same_place
from pipeline.run import RunContext, running
from pipeline.stages.apply import line
from pipeline.stages.evaluate_rows import warn_other_corpus
from pipeline.stages.inputs import open_model
from pipeline.stages.live import said
from sae.errors import ConfigError, InterruptedRunError


def context_of(folder, **settings):
    heard = io.StringIO()
    console = Console(file=heard, width=400)
    return RunContext(command="train", folder=folder, config=replace(Config(), **settings), console=console), heard


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (InterventionConfig(kind="steer", latents=[123], coeff=150), "steer latent 123 by 150"),
        (InterventionConfig(kind="steer", latents=[1, 2], coeffs=[8, -2.5]), "steer latents 1, 2 by 8, -2.5"),
        (InterventionConfig(kind="clamp", latents=[3], value=0), "clamp latent 3 at 0"),
        (InterventionConfig(kind="clamp", latents=[3, 4], value=2), "clamp latents 3, 4 at 2"),
        (InterventionConfig(kind="ablate", latents=[3, 4]), "ablate latents 3, 4"),
        (InterventionConfig(kind="reconstruct", keep_error=True), "reconstruct and keep the error"),
        (InterventionConfig(kind="heads", heads=["L3H5"]), "head L3H5 off"),
        (InterventionConfig(kind="heads", heads=["L3H5", "L4H0"], mean="a.zarr"), "heads L3H5, L4H0 at the mean"),
        (InterventionConfig(kind="heads", heads=["L3H*"]), "heads L3H* off"),
        (InterventionConfig(kind="heads", heads=["L3H5"], keep=True), "all heads but L3H5 of their blocks off"),
    ],
)
def test_an_edit_is_said_with_its_latents_and_how_far(config, text):
    assert said(config) == text


@pytest.mark.parametrize(("pos", "why"), [(0, "first row of a window"), (3, "BOS or special")])
def test_a_row_that_is_not_read_says_why(pos, why):
    event = ReadoutEvent(pos=pos, token=5, text="def", phase="prompt", flagged=True, logprob=None, readings=())
    assert line(event, 3, {}).endswith(f"(not read: {why})")


def test_layers_for_a_gpu_that_is_not_there_are_warned_about(tmp_path):
    if lc.llama_supports_gpu_offload():
        pytest.skip("llama.cpp has a GPU here")
    for layers, warned in ((0, False), (-1, True)):
        context, heard = context_of(tmp_path, model=ModelConfig(n_gpu_layers=layers))
        open_model(context).close()
        assert ("all layers run on the CPU" in heard.getvalue()) == warned


def test_a_run_that_was_refused_is_not_the_one_to_go_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "runs" / "train" / name for name in "ab"]
    for number, (folder, error) in enumerate(zip(folders, (KeyboardInterrupt(), ConfigError("no")), strict=True)):
        folder.mkdir(parents=True)
        context, _ = context_of(folder)
        context.started = 1e9 + number
        (folder / "corpus").mkdir()
        (folder / "metrics.jsonl").write_text("" if number else "{}")
        with pytest.raises((InterruptedRunError, ConfigError)), running(context):
            raise error
    assert run_to_resume("train", "latest")[0].name == "a"
    context, _ = context_of(folders[0])
    context.resumed = True
    with pytest.raises(ConfigError), running(context):
        raise ConfigError("other settings")
    assert run_to_resume("train", "latest")[0].name == "a", "a fault on resuming loses nothing"


def test_another_corpus_than_that_of_the_training_is_warned_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / "extract" / "a"
    place.mkdir(parents=True)
    made, _ = context_of(place, corpus=CorpusConfig(kind="text", paths=["b.txt"]))
    made.command = "extract"
    with running(made):
        made.outputs["store"] = str(place / "store")

    class Store:
        path = place / "store"

    for corpus, warned in ((CorpusConfig(kind="text", paths=["b.txt"], max_tokens=5), False), (CorpusConfig(), True)):
        context, heard = context_of(tmp_path, corpus=corpus)
        warn_other_corpus(context, Store())  # type: ignore[arg-type]
        assert ("trained on other documents: corpus.kind=text corpus.paths=['b.txt']" in heard.getvalue()) == warned


def test_one_place_has_several_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same_place("a/../b", str(tmp_path / "b"))
    assert not same_place("a", "b")
    assert same_place("s3://bucket/a", "s3://bucket/a")
    assert not same_place("s3://bucket/a", "s3://bucket/b")

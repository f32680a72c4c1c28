"""What a path may mean as an SAE, and where its labels come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convert.sae_gguf import write_sae_gguf
from pipeline.stages.inputs import load_sae, sae_sha256
from pipeline.stages.sae_files import entry_number, located, split_entry
from sae.checkpoint import save_weights
from sae.errors import ConfigError, FormatError
from tests.convert.test_sae_gguf import random_sae
from tests.tiny_llama import write_tiny_llama


def manifest(folder, output):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"command": "convert", "outputs": {"sae": str(output)}}))
    return folder


def test_a_path_is_a_file_a_checkpoint_or_the_run_folder_around_either(tmp_path):
    save_weights(tmp_path / "train" / "sae", random_sae(training={}))
    manifest(tmp_path / "train", tmp_path / "train" / "sae")
    file = write_sae_gguf(manifest(tmp_path / "convert", tmp_path / "convert" / "sae.gguf") / "sae.gguf", random_sae())
    for given in (tmp_path / "train", tmp_path / "train" / "sae"):
        assert located(given) == tmp_path / "train" / "sae"
    for given in (tmp_path / "convert", file, str(file)):
        assert located(given) == file
    assert load_sae(tmp_path / "convert").hook == load_sae(tmp_path / "train").hook
    hashes = {sae_sha256(tmp_path / name) for name in ("train", "convert", "train/sae", "convert/sae.gguf")}
    assert len(hashes) == 2
    assert all(len(one) == 64 for one in hashes)


def test_a_copied_run_folder_gives_its_own_file_not_the_one_it_was_copied_from(tmp_path):
    old = write_sae_gguf(manifest(tmp_path / "old", tmp_path / "old" / "sae.gguf") / "sae.gguf", random_sae())
    new = write_sae_gguf(manifest(tmp_path / "new", old) / "sae.gguf", random_sae(seed=1))
    assert located(tmp_path / "new") == new
    new.unlink()
    assert located(tmp_path / "new") == old  # convert.out= puts it elsewhere


def test_a_folder_with_one_sae_gguf_is_that_and_a_model_beside_it_does_not_count(tmp_path):
    file = write_sae_gguf(tmp_path / "any.gguf", random_sae())
    write_tiny_llama(tmp_path / "model.gguf", blocks=1)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "manifest.json").write_text('{"outputs": ["sae"]}')
    assert located(tmp_path) == file
    write_sae_gguf(tmp_path / "other.gguf", random_sae())
    with pytest.raises(ConfigError, match=r"holds 2 SAEs; name one: .*any\.gguf, .*other\.gguf"):
        located(tmp_path)


def test_a_run_that_trained_several_lists_them(tmp_path):
    outputs = {"sae:k4": "runs/train/x/k4/sae", "sae:k8": "runs/train/x/k8/sae", "metrics:k4": "m"}
    (tmp_path / "manifest.json").write_text(json.dumps({"command": "train", "outputs": outputs}))
    with pytest.raises(ConfigError, match=r"holds 2 SAEs; name one: .*runs/train/x/k4/sae, .*runs/train/x/k8/sae$"):
        located(tmp_path)


def test_what_is_not_there_or_no_sae_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/sae\.gguf does not exist"):
        located("nowhere/sae.gguf#0")
    with pytest.raises(ConfigError, match=r"holds no SAE: neither sae\.json nor"):
        located(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"command": "train", "status": "interrupted", "outputs": {}}))
    with pytest.raises(ConfigError, match=r"not finished, it holds no SAE yet: `ggscope train resume=.*` goes on"):
        located(tmp_path)
    (tmp_path / "sae.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"is no \.gguf file"):
        located(tmp_path / "sae.txt")


def test_one_of_several_saes_is_named_by_number_or_hook_point(tmp_path):
    hooks = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post", "blocks.2.hook_resid_post", "ggml:norm-1#0"]
    file = write_sae_gguf(tmp_path / "sae.gguf", [random_sae(seed=i, hook=hook) for i, hook in enumerate(hooks)])
    for entry, number in (("0", 0), ("2", 2), (hooks[0], 0), (hooks[3], 3)):
        path = located(f"{file}#{entry}")
        assert split_entry(path) == (file, entry)
        assert entry_number(file, entry) == number
        assert load_sae(path).hook == hooks[number]
        assert sae_sha256(path) == sae_sha256(Path(f"{file}#1"))
    for entry, said in (
        ("", "holds 4 SAEs; choose one: .*#0 .blocks.0"),
        (hooks[1], "names 2 SAEs of it"),
        ("9", "names no SAE of it"),
    ):
        with pytest.raises(ConfigError, match=said):
            entry_number(file, entry)
    with pytest.raises(ConfigError, match="choose one"):
        load_sae(file)


def test_a_file_whose_name_holds_the_mark_is_itself(tmp_path):
    file = write_sae_gguf(tmp_path / "sae.gguf", random_sae())
    odd = file.rename(tmp_path / "a.gguf#1.gguf")
    assert located(odd) == odd
    assert load_sae(odd).k == 8


def test_a_side_file_s_labels_stand_before_the_file_s_own(tmp_path):
    sae = random_sae(labels={1: "own", 2: "kept"})
    file = write_sae_gguf(tmp_path / "sae.gguf", sae)
    (tmp_path / "sae.labels.json").write_text('{"1": "beside", "5": "new"}')
    assert load_sae(file).labels == {1: "beside", 2: "kept", 5: "new"}
    save_weights(tmp_path / "checkpoint", random_sae(training={}))
    (tmp_path / "checkpoint" / "labels.json").write_text('{"4": "four"}')
    assert load_sae(tmp_path / "checkpoint").labels == {4: "four"}
    two = write_sae_gguf(tmp_path / "two.gguf", [sae, random_sae(seed=1)])
    (tmp_path / "two.1.labels.json").write_text('{"9": "nine"}')
    assert load_sae(Path(f"{two}#1")).labels == {9: "nine"}
    assert load_sae(Path(f"{two}#0")).labels == sae.labels
    (tmp_path / "sae.labels.json").write_text('{"96": "no such latent"}')
    with pytest.raises(FormatError, match=r"sae\.labels\.json: label of latent 96"):
        load_sae(file)

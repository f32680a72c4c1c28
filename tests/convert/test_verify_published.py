"""`ggscope convert verify` of a file made from a published SAE: read again as the run that wrote the file read it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.gguf_file import read_gguf
from convert.sae_gguf import read_sae_gguf
from tests.cli.conftest import ggscope, last_line
from tests.cli.test_published import published

FEW = ["corpus.max_documents=3", "model.n_threads=1"]
HOOK = "blocks.1.hook_resid_post"
AS = ["convert.format=saelens", f"convert.hook={HOOK}", "convert.probe_tokens=250", "convert.encoder_type=Q8_0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two published SAEs whose files name no hook point that is known here, and the GGUF files made of them."""
    folder = tmp_path_factory.mktemp("published")
    published(folder / "jump", hook_name="nowhere")
    published(folder / "top", architecture="topk", hook_name="nowhere", activation_fn_kwargs={"k": 9})
    settings = json.loads((folder / "top" / "cfg.json").read_text())
    (folder / "top" / "cfg.json").write_text(json.dumps(settings | {"k": 9}))
    for name, more in (("jump", []), ("top", ["convert.thresholds=global"])):
        ggscope("convert", f"convert.source={name}", f"run_dir=of_{name}", *AS, *more, *FEW, cwd=folder)
    return folder


@pytest.mark.parametrize("name", ["jump", "top"])
def test_what_the_run_measured_and_how_it_read_its_source_are_taken_over(made, name):
    done = ggscope("convert", "verify", f"of_{name}", *FEW, cwd=made)
    given, _, output = done.stdout.splitlines()[-3:]
    assert f"{name} (saelens, sha256" in given
    assert "they match" in output
    manifest = json.loads((made / f"of_{name}" / "manifest.json").read_text())
    newest = max(made.glob("runs/convert/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    report = json.loads(newest.read_text())["metrics"]
    for key in ("fvu_source", "fvu_file", "l0_source", "l0", "topk_overlap", "relative.W_enc_FD"):
        assert report[key] == manifest["metrics"][key], key  # the same rows, through the same thresholds
    stored = read_sae_gguf(made / f"of_{name}" / "sae.gguf")
    assert (stored.hook, stored.variant) == (HOOK, "threshold")
    assert report["verified"] is True
    if name == "jump":
        assert (
            stored.k == max(1, round(manifest["metrics"]["l0_source"])) > 1
        )  # no file says it: measured when it was written


def test_without_the_run_s_manifest_the_source_and_how_to_read_it_must_be_named(made):
    shutil.copy(made / "of_jump" / "sae.gguf", made / "alone.gguf")
    done = ggscope("convert", "verify", "alone.gguf", *FEW, cwd=made, code=2)
    assert "name what alone.gguf was made from: convert.source=SAE" in last_line(done)
    done = ggscope("convert", "verify", "alone.gguf", "convert.source=jump", *FEW, cwd=made, code=2)
    assert "'nowhere' has no counterpart here" in last_line(done)
    done = ggscope("convert", "verify", "alone.gguf", "convert.source=jump", *AS, *FEW, cwd=made)
    assert "they match" in done.stdout


@pytest.mark.parametrize("what", ["file", "source"])
def test_a_tampered_file_and_another_source_fail_with_exit_code_3(made, tmp_path, what):
    for name in ("jump", "of_jump"):
        shutil.copytree(made / name, tmp_path / name)
    manifest = tmp_path / "of_jump" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(made), str(tmp_path)))
    if what == "file":
        path = tmp_path / "of_jump" / "sae.gguf"
        entry = read_gguf(path).tensors["sae.0.dec.weight"]
        data = bytearray(path.read_bytes())
        data[entry.start : entry.start + entry.n_bytes // 20] = bytes(entry.n_bytes // 20)  # a twentieth of the rows
        path.write_bytes(data)
    else:
        path = tmp_path / "jump" / "sae_weights.safetensors"
        arrays = load_file(path)
        save_file(arrays | {"threshold": arrays["threshold"] + np.float32(0.01)}, path)
    done = ggscope("convert", "verify", "of_jump", *FEW, cwd=tmp_path, code=3)
    assert "does not match its source" in last_line(done)
    assert ("relative.W_dec_FD" if what == "file" else "relative.threshold_F") in last_line(done)

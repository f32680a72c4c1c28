"""Building the compiled step, and which kernel runs."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae.errors import ConfigError
from sae.kernels import encoder_dtype
from sae.native import build, library
from sae.native.build import BuildError
from sae.native.library import native_library, selects_in_int8
from sae.steppers import make_stepper, pick_kernel
from sae.train_config import TrainConfig
from sae.trainer import Trainer

from .test_model_and_kernels import loss_settings, make
from .test_native import BF16, bits, config_of
from .toy import Toy

BUILD = native_library.__wrapped__  # without the memory of earlier calls


@pytest.fixture
def lib():
    return native_library()


# ---- which kernel runs ----


def fresh_library(monkeypatch, tmp_path, compiler=None):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiler is not None:
        monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(library, "native_library", BUILD)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_without_a_working_compiler_or_cache_torch_trains_after_one_warning(monkeypatch, tmp_path, listen):
    heard = listen(library)
    cpu, model = torch.device("cpu"), make()
    (tmp_path / "file").write_text("")
    broken = script(tmp_path / "broken-cc", "echo 'internal error: no luck' >&2; exit 1")
    for cache, compiler, said in (
        (tmp_path, "no-such-compiler", "no C compiler: no-such-compiler is not there"),
        (tmp_path, broken, "internal error: no luck"),
        (tmp_path / "file", None, "Not a directory"),
    ):
        fresh_library(monkeypatch, cache, compiler)
        heard.clear()
        config = config_of(model)
        assert pick_kernel(model, config, cpu) == "torch"
        assert [said in message for message in heard] == [True]
        assert make_stepper(model, loss_settings(), config, "torch").name == "torch"
        with pytest.raises(ConfigError, match="kernel=native needs a C compiler that works"):
            pick_kernel(model, replace(config, kernel="native"), cpu)
        monkeypatch.delenv("CC", raising=False)


def test_a_library_that_does_not_load_counts_as_not_built(monkeypatch, tmp_path, listen):
    heard = listen(library)
    fake = script(tmp_path / "fake-cc", 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"')
    fresh_library(monkeypatch, tmp_path, fake)
    assert library.native_library() is None
    assert "training without compiled kernels" in heard[0]


def test_a_compiler_without_openmp_or_native_still_builds_and_the_bits_are_the_same(monkeypatch, tmp_path, lib):
    plain = script(
        tmp_path / "plain-cc",
        'for flag in "$@"; do case "$flag" in -fopenmp) echo "no $flag" >&2; exit 1;; esac; done; exec cc "$@"',
    )
    fresh_library(monkeypatch, tmp_path, plain)
    single = library.native_library()
    assert single is not None
    assert single.has_int8 == lib.has_int8
    assert (single.has_threads, lib.has_threads) == (False, True)
    assert bits(single, 2, steps=2) == bits(lib, 2, steps=2)


@pytest.mark.parametrize("threads", [2, 3])
def test_a_step_of_one_thread_is_not_taken_where_torch_has_several(monkeypatch, lib, threads):
    model, cpu = make(), torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert pick_kernel(model, config_of(model), cpu) == "native"
    monkeypatch.setattr(lib, "has_threads", False)
    assert pick_kernel(model, config_of(model), cpu) == ("native" if threads == 2 else "torch")
    assert pick_kernel(model, replace(config_of(model), kernel="native"), cpu) == "native"


@pytest.mark.parametrize(
    "knows",
    ["-march=native -fopenmp", "-mcpu=native -fopenmp", "-Xclang", "-march=native", "-mcpu=native", "-fopenmp", ""],
)
def test_the_first_flags_that_a_compiler_knows_are_taken(monkeypatch, tmp_path, knows):
    """A compiler that accepts these alone; "-Xclang": threads by a library that is named, as Apple's."""
    source, runtime = tmp_path / "one.c", tmp_path / "libomp.so"
    source.write_text("int one(void) { return 1; }\n")
    asked = [
        "-march=native -fopenmp",
        "-mcpu=native -fopenmp",
        f"-march=native -Xclang -fopenmp {runtime} -Wl,-rpath,{tmp_path}",
    ]
    asked += [asked[-1].replace("-march", "-mcpu"), "-march=native", "-mcpu=native", "-fopenmp", ""]
    wanted = next(flags for flags in asked if flags == knows or (knows == "-Xclang" and knows in flags))
    compiler = script(
        tmp_path / "cc",
        f'case "$*" in "-O2 {wanted + " " if wanted else ""}-shared"*) ;; *) echo "$*" >> {tmp_path}/refused; exit 1;; esac; '
        'while [ "$1" != -o ]; do shift; done; : > "$2"',
    )
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.build("one", [source], build.flag_variants(("-O2",), openmp=runtime))
    refused = (tmp_path / "refused").read_text().splitlines() if (tmp_path / "refused").exists() else []
    assert [line.split(" -shared")[0] for line in refused] == [f"-O2 {flags}" for flags in asked[: asked.index(wanted)]]


def test_a_processor_without_these_instructions_gives_the_same_weights_up_to_rounding(monkeypatch, tmp_path, lib):
    portable = script(
        tmp_path / "portable-cc",
        'for flag in "$@"; do case "$flag" in *=native) echo "no $flag" >&2; exit 1;; esac; done; exec cc "$@"',
    )
    fresh_library(monkeypatch, tmp_path, portable)
    general = library.native_library()
    assert general is not None
    assert not general.has_int8
    monkeypatch.setattr(library, "native_library", lambda: general)
    weights = [np.frombuffer(bits(each, 2, steps=2), np.float32) for each in (general, lib)]
    assert np.linalg.norm(weights[0] - weights[1]) < 1e-6 * np.linalg.norm(weights[1])


def test_processes_that_build_at_once_end_with_one_library(monkeypatch, tmp_path):
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }\n")
    monkeypatch.setenv("CC", str(script(tmp_path / "slow-cc", 'sleep 0.5; exec cc "$@"')))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "from pathlib import Path; from sae.native.build import build\n"
        f"build('slow', [Path({str(source)!r})], [('-O2',)])"
    )
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(subprocess.run, [sys.executable, "-c", code], check=True, timeout=120) for _ in range(2)]
    assert all(run.result().returncode == 0 for run in runs)
    (built,) = (tmp_path / "ggscope" / "native").iterdir()
    stamp = built.stat().st_mtime_ns
    assert build.build("slow", [source], [("-O2",)]) == built
    assert built.stat().st_mtime_ns == stamp


def test_the_name_of_the_library_follows_source_flags_and_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }\n")
    paths = [build.build("one", [source], [flags]) for flags in (("-O1",), ("-O2",))]
    source.write_text("int one(void) { return 2; }\n")
    paths.append(build.build("one", [source], [("-O1",)]))
    monkeypatch.setenv("CC", str(script(tmp_path / "my-cc", 'exec cc "$@"')))
    paths.append(build.build("one", [source], [("-O1",)]))
    assert len(set(paths)) == 4
    source.write_text("int one(void) {\n")
    with pytest.raises(BuildError, match="error"):
        build.build("one", [source], [("-O1",)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto tries Triton's kernels on a GPU")
def test_auto_is_native_on_a_cpu_and_what_another_device_needs_is_refused(lib):
    model = make()
    config = config_of(model)
    assert pick_kernel(model, config, torch.device("cpu")) == "native"
    assert pick_kernel(model, config, torch.device("cuda")) == "torch"
    assert pick_kernel(model, replace(config, kernel="torch"), torch.device("cpu")) == "torch"
    with pytest.raises(ConfigError, match="runs on a CPU, the device is cuda"):
        pick_kernel(model, replace(config, kernel="native"), torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"kernel=triton cannot be had: (triton is not installed|there is no CUDA)"):
        pick_kernel(model, replace(config, kernel="triton"), torch.device("cuda"))
    with pytest.raises(ConfigError, match="kernel=triton is for variant topk"):
        pick_kernel(model, replace(config, kernel="triton", optimizer="signum"), torch.device("cuda"))
    with pytest.raises(ConfigError, match="kernel must be one of auto, torch, native, triton, got cython"):
        replace(config, kernel="cython")


def test_what_the_compiled_step_cannot_do_goes_to_torch(lib):
    model = make()
    config = replace(config_of(model), optimizer="signum")
    assert pick_kernel(model, config, torch.device("cpu")) == "torch"
    with pytest.raises(ConfigError, match="kernel=native is for variant topk"):
        pick_kernel(model, replace(config, kernel="native"), torch.device("cpu"))


def test_auto_chooses_by_float32_where_that_is_the_faster_way(lib):
    cpu = torch.device("cpu")
    assert encoder_dtype("auto", cpu, float32_is_fast=True) is torch.float32
    assert encoder_dtype("bfloat16", cpu, float32_is_fast=True) is BF16
    assert selects_in_int8(64, 4096, 32) == lib.has_int8
    assert not selects_in_int8(64, 4096, 200)


def test_a_run_of_one_kernel_is_not_resumed_with_the_other(lib, tmp_path):
    toy = Toy(batch=128)
    config = TrainConfig(num_latents=64, k=4, batch_tokens=128, tokens=512, encoder_dtype="float32", kernel="torch")
    Trainer(config, toy, **toy.statistics(), folder=tmp_path).fit()
    with pytest.raises(ConfigError, match="stepper: 'torch' there, 'native' now"):
        Trainer(replace(config, kernel="native"), toy, **toy.statistics(), folder=tmp_path).fit(resume=True)

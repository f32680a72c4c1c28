"""C files built with the machine's compiler into the user's cache, once per source, compiler and processor.

Standard library only; `pipeline/llama` builds its file with it too.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

BUILD_SECONDS = 120
OPENMP = ("-fopenmp",)
NATIVE = ("-march=native", "-mcpu=native")  # what compilers call this processor


class BuildError(RuntimeError):
    """No compiler, one that failed, or no place for what it makes; the message is one line."""


def build(name: str, sources: Sequence[Path], variants: Sequence[Sequence[str]], headers: Sequence[Path] = ()) -> Path:
    """The shared library `name` made of `sources`, from the cache where it was built before.

    `variants`: compiler flags, the first that work are taken. The compiler is $CC or cc. Several processes may build
    at once: each writes a file of its own and puts it in place whole.

    Raises:
        BuildError: it cannot be had.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    digest = hashlib.sha256(repr((_stamp(compiler), processor(), variants)).encode())
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    try:
        library = cache_folder() / f"{name}-{digest.hexdigest()[:16]}.so"
        if library.exists():
            return library
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            _compile(compiler, sources, variants, made)
            made.replace(library)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise BuildError(str(error)) from error
    return library


def flag_variants(common: Sequence[str], *, openmp: Path | None = None) -> tuple[tuple[str, ...], ...]:
    """Flags to try one after the other: for this processor before any of its kind, with threads before without.

    `openmp`: the runtime library for a compiler that knows OpenMP but has none of its own, as Apple's.
    """
    threads = [OPENMP] + ([] if openmp is None else [("-Xclang", *OPENMP, str(openmp), f"-Wl,-rpath,{openmp.parent}")])
    tried = [(name, *flags) for flags in (*threads, ()) for name in NATIVE] + [OPENMP, ()]
    return tuple((*common, *flags) for flags in tried)


def cache_folder() -> Path:
    """Where what was built for this machine, and found out about it, is kept. RuntimeError without a home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ggscope" / "native"


def _compile(compiler: list[str], sources: Sequence[Path], variants: Sequence[Sequence[str]], made: Path) -> None:
    said = ""
    for flags in variants:
        command = [*compiler, *flags, "-shared", "-fPIC", "-o", str(made), *map(str, sources), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler[0]} did not finish in {BUILD_SECONDS} s") from error
        if done.returncode == 0:
            return
        lines = done.stderr.strip().splitlines()
        said = next((line for line in lines if "error" in line), lines[-1] if lines else f"exit {done.returncode}")
    raise BuildError(f"{compiler[0]} failed: {said}")


def _stamp(compiler: list[str]) -> tuple[object, ...]:
    """Which compiler it is, without starting it."""
    found = shutil.which(compiler[0])
    if found is None:
        raise BuildError(f"no C compiler: {compiler[0]} is not there (set CC, or install gcc or clang)")
    real = os.stat(found)
    return (*compiler, os.path.realpath(found), real.st_size, real.st_mtime_ns)


@functools.cache
def processor() -> str:
    """The system, and the instructions of its processor: a library built for another one may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        seen = {line for line in lines if line.partition("\t")[0] in ("model name", "flags", "Features", "CPU part")}
        detail = "\n".join(sorted(seen))
    except OSError:
        detail = platform.processor()
    return f"{platform.platform()}\n{platform.machine()}\n{detail}"

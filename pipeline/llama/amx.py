"""Whether llama.cpp's products in the processor's tile registers (AMX) can be used.

GCC 11 to 13 (before 11.5, 12.4 and 13.3; its bug 114098) leaves out most of the bytes that set the registers up. A
llama.cpp compiled by one of them dies by a signal, or computes nonsense, at its first product with a quantised matrix
on such a processor. What this build does is tried in a process of its own, once per build and processor.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from sae.native.build import cache_folder, processor

from .symbols import lc, library_files

PROBE_SECONDS = 60
WORST = 0.02  # of the largest value: rounding rows and weights to 8 bits is below 0.01
_log = logging.getLogger(__name__)


@functools.cache
def usable() -> bool:
    """True where there is nothing to try."""
    if not there():
        return True
    try:
        kept = _kept()
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return bool(_tried())
    try:
        return bool(json.loads(kept.read_text())["usable"])
    except (OSError, ValueError, KeyError):
        pass
    good = _tried()
    if good is None:
        return False  # tried again the next time
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"{kept.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({"usable": good}))
        partial.replace(kept)
    except OSError:
        pass  # as above
    return good


def there() -> bool:
    """Whether both the processor and this build of llama.cpp have them."""
    return "amx_int8" in processor() and b"AMX_INT8 = 1" in lc.llama_print_system_info()


def _kept() -> Path:
    """Where the answer is kept."""
    digest = hashlib.sha256(processor().encode())
    for path in library_files():
        found = path.stat()
        digest.update(repr((str(path), found.st_size, found.st_mtime_ns)).encode())
    return cache_folder() / f"amx-{digest.hexdigest()[:16]}.json"


def _tried() -> bool | None:
    """None: it could not be found out."""
    root = str(Path(__file__).parents[2])
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join((root, os.environ.get("PYTHONPATH", "")))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.llama.amx"], env=environment, capture_output=True, text=True,
            timeout=PROBE_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.info("AMX could not be tried: %s", error)
        return None
    if done.returncode:
        _log.info("llama.cpp's AMX products are not used: they ended with %d", done.returncode)
    return done.returncode == 0


def _probe() -> int:
    """0: products with Q8_0 and Q4_0 matrices there are right."""
    import gguf

    from .ggml_graph import AMX, Affine, Backend, buffer_type_name

    backend = Backend(n_threads=1)
    places = [each for each in backend.all_buffer_types() if buffer_type_name(each) == AMX]
    rng = np.random.default_rng(0)
    weight_FD, x_ND = rng.standard_normal((256, 512), np.float32), rng.standard_normal((40, 512), np.float32)
    for place in places:
        for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
            raw = gguf.quantize(weight_FD, kind)
            exact_NF = x_ND @ gguf.dequantize(raw, kind).T
            product = Affine(backend, int(kind), raw, 512, np.zeros(256, np.float32), place=place)
            for rows in (40, 1):
                if not np.abs(product.pre_acts(x_ND[:rows]) - exact_NF[:rows]).max() < WORST * np.abs(exact_NF).max():
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(_probe())

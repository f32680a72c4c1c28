"""The default corpus: the running interpreter's own standard library, and the held-out rule.

The demo model's trainer, `extract` and `evaluate` all call `is_held_out` of this module, so no
stage can see a file that another one keeps back.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

# Not every interpreter ships these (Debian packages the tests apart), and installed packages are
# not the standard library.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
EXCLUDED_PREFIX = "_sysconfigdata"  # machine-generated build paths, different on every machine

HELD_OUT_SHARE = 0.1


def is_held_out(name: str) -> bool:
    """Whether the document called `name` (a relative POSIX path) is kept out of all training.

    True where the first 8 bytes of sha256(name), read as a fraction of 2**64, lie in the lowest tenth.
    """
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return fraction < HELD_OUT_SHARE


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files(root: Path | None = None) -> list[tuple[str, Path]]:
    """`(relative POSIX path, file)` of every Python source file of the library, sorted by name."""
    root = root or stdlib_root()
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.isdisjoint(relative.parts[:-1]) and not relative.name.startswith(EXCLUDED_PREFIX):
            found.append((relative.as_posix(), path))
    return sorted(found)

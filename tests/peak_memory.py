"""The peak memory of this process alone, for scripts that tests run in a process of their own."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_kib() -> int:
    """Largest resident set so far. Linux counts that of the parent in `ru_maxrss` of a child, so VmHWM is read there."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak

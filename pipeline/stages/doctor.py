"""`ggscope doctor`: what this installation can do."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sae.errors import ConfigError

from ..run import versions
from .inputs import threads


def run(args: list[str]) -> None:
    if args:
        raise ConfigError(f"expected `ggscope doctor` alone, got {' '.join(args)}")
    from ..llama import doctor as devices

    out = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in versions().items():
        table.add_row(name, value)
    try:
        metadata.version("torch")
    except metadata.PackageNotFoundError:
        table.add_row("torch", "not installed: everything but `train` works; pip install 'ggscope[train]'")
    table.add_row("threads", str(threads(0)))
    for name, value in devices.versions().items():
        if name not in versions():
            table.add_row(name, value)
    for device in devices.backends():
        memory = f"{device['memory_free'] / 2**30:.1f} of {device['memory_total'] / 2**30:.1f} GiB free"
        table.add_row(f"device {device['name']}", f"{device['description']} ({device['type']}), {memory}")
    usage = shutil.disk_usage(Path.cwd())
    table.add_row("disk here", f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free")
    out.print(table)

"""`ggscope compare`: train runs beside each other, as a table and as a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from sae.errors import ConfigError

from ..compare.collect import Row, collect, groups, rows_of_group
from ..compare.picture import draw_pareto
from ..run import RunContext, write_json
from .inputs import counted, print_wide, relative

TABLE, PICTURE = "compare.json", "pareto.png"
COLUMNS = {
    "kind": ("kind", "s"), "variant": ("variant", "s"), "num_latents": ("latents", "d"), "k": ("k", "d"), "lr": ("lr", "g"), "seed": ("seed", "d"),
    "tokens": ("tokens", ",d"), "fvu": ("FVU", ".4f"), "l0": ("L0", ".1f"), "dead_share": ("dead", ".1%"),
    "held_out_fvu": ("held-out FVU", ".4f"), "held_out_l0": ("held-out L0", ".1f"), "ce_recovered": ("CE recovered", ".4f"),
    "delta_ce_nats": ("delta CE (nats)", ".4f"), "tokens_per_s": ("tokens/s", ",.0f"),
}  # fmt: skip


def run(context: RunContext) -> None:
    config = context.config.compare
    rows, unfinished = collect(config.runs)
    if not rows:
        raise ConfigError(f"expected finished train runs, got only unfinished ones: {', '.join(unfinished)}")
    if unfinished:
        context.console.print(f"left out, not finished: {', '.join(unfinished)}", style="yellow", highlight=False)
    write_json(context.folder / TABLE, [asdict(row) for row in rows])
    grouped = groups(rows)
    draw_pareto(grouped, context.folder / PICTURE)
    context.outputs |= {"table": str(context.folder / TABLE), "picture": str(context.folder / PICTURE)}
    if config.format == "json":
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    else:
        for name, members in grouped.items():
            print_wide(table(members, name if len(grouped) > 1 else ""))
    warn_other_rows(context, grouped)
    evaluated = sum(row.held_out_fvu is not None for row in rows)
    context.metrics = {"saes": len(rows), "evaluated": evaluated}
    context.three_lines(
        f"{counted(len(rows), 'SAE')}, {evaluated} of them evaluated{apart(grouped)}",
        "; ".join(lowest(members, name if len(grouped) > 1 else "") for name, members in grouped.items()),
        f"{relative(context.folder / PICTURE)} and {relative(context.folder / TABLE)}",
        stderr=config.format == "json",
    )


def warn_other_rows(context: RunContext, grouped: dict[str, list[Row]]) -> None:
    for name, rows in grouped.items():
        if len(rows_of_group(rows)) > 1:
            start = f"{name}: " if len(grouped) > 1 else ""
            context.console.print(
                f"warning: {start}these SAEs were evaluated on different held-out rows (another model file, text, seed, "
                "evaluate.tokens or evaluate.splice_tokens), so their held-out numbers do not rank them; evaluate them alike",
                style="yellow", highlight=False,
            )  # fmt: skip


def apart(grouped: dict[str, list[Row]]) -> str:
    """That there is more than one group."""
    return f"; {len(grouped)} hook points or stores, whose FVU do not compare" if len(grouped) > 1 else ""


def lowest(rows: Sequence[Row], where: str) -> str:
    best = min((row for row in rows if row.fvu is not None), key=lambda row: row.fvu or 0.0, default=rows[0])
    start = f"{where}: " if where else ""
    return f"{start}lowest FVU {cell(best.fvu, '.4f')} at L0 {cell(best.l0, '.1f')}: {best.name}"


def table(rows: Sequence[Row], title: str) -> Table:
    """A line an SAE; without a column that is of no interest: kinds where all are SAEs, seeds where all are one."""
    made = Table(title=title or None, title_justify="left")
    plain = {"kind": {row.kind for row in rows} == {"sae"}, "seed": len({row.seed for row in rows}) == 1}
    columns = {key: column for key, column in COLUMNS.items() if not plain.get(key)}
    made.add_column("SAE")
    for title, _ in columns.values():
        made.add_column(title, justify="right")
    for row in rows:
        made.add_row(row.name, *(cell(getattr(row, key), form) for key, (_, form) in columns.items()))
    return made


def cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)

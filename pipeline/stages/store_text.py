"""The tables `ggscope store info` prints for people; `found` is what `pipeline.store.summary.info` returns."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..store.summary import ranges


def facts_table(found: dict[str, Any]) -> Table:
    """Two columns: what, and its value."""
    missing = found["shards_missing"]
    flags = ", ".join(f"{name} {rows:,}" for name, rows in found["flags"].items() if rows)
    model, share = found["model"], found["flagged_rows"] / max(found["rows"], 1)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("model", f"{model.get('name', '')} {model.get('architecture', '')}".strip())
    table.add_row("corpus", found["corpus_hash"][:12])
    table.add_row("rows", f"{found['rows']:,} of {found['rows_planned']:,} planned, {found['bytes'] / 1e6:,.1f} MB")
    table.add_row(
        "shards", f"{found['shards_committed']} of {found['shard_rows']:,} rows; missing: {ranges(missing) or 'none'}"
    )
    table.add_row("flagged", f"{found['flagged_rows']:,} ({share:.2%} left out of training): {flags or 'none'}")
    return table


def hooks_table(found: dict[str, Any]) -> Table:
    """One row a hook; statistics over the unflagged rows."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = (
        "width",
        "dtype",
        "outlier above",
        "mean norm",
        "norm 1 %",
        "50 %",
        "99 %",
        "variance",
        "max",
        "outlier dims (rms)",
    )
    table.add_column("hook")
    for name in columns:
        table.add_column(name, justify="right")
    for name, hook in found["hooks"].items():
        given = [name, str(hook["width"]), hook["dtype"], short(hook["outlier_threshold"])]
        stats = found["statistics"].get(name)
        table.add_row(*given, *(["-"] * 7 if stats is None else statistics_cells(stats)))
    return table


def statistics_cells(stats: dict[str, Any]) -> list[str]:
    norms = stats["norm_quantiles"]
    dims = [f"{top['dim']} ({short(top['rms'])})" for top in stats["top_outlier_dims"][:3]]
    more = stats["outlier_dims"] - len(dims)
    named = ", ".join(dims + [f"{more} more"] * (more > 0)) or "none"
    numbers = (stats["mean_norm"], norms["0.01"], norms["0.5"], norms["0.99"], stats["variance"], stats["max_abs"])
    return [*map(short, numbers), named]


def short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"

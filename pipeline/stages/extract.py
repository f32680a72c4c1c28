"""`ggscope extract`: a GGUF model and a corpus to a store of activations."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sae.errors import ConfigError

from ..corpus.plan import Plan, make_plan
from ..extract import Estimate, estimate, extract
from ..llama.hooks import HookPoint, describe
from ..run import RunContext
from ..store.backends import Location, absolute
from ..store.picture import draw_stats
from ..store.reader import ActivationStore
from ..store.schema import is_store
from ..store.writer import invalidate
from .corpora import window_table
from .executing import capture_model, capture_work, executor_of, refuse_early
from .inputs import STORE_NAME, counted, describe_model, relative, store_sha256, warn_not_finite

PICTURE_NAME = "statistics.png"


def run(context: RunContext) -> None:
    config = context.config
    if not config.hook.points:
        raise ConfigError("missing required setting: hook.points; give it as hook.points=[blocks.3.hook_resid_post]")
    path = absolute(config.store.path or context.folder / STORE_NAME)  # workers may start in another folder
    if context.resumed and is_store(path):
        take_back_damaged(context, path)
    # what is misspelt or cannot be had is found before the corpus is read
    with capture_model(context) as (model, widths):
        refuse_early(config, path)
        executor = executor_of(context)
        table = window_table(context, model, spool=True)
        plan = make_plan(table, hooks=widths, extract=config.extract, store=config.store)
        given = (
            f"{describe_model(model)}; {counted(len(table.documents), 'document')} (corpus {table.corpus_hash[:12]})"
        )
        settings: dict[str, Any] = {"config": config.extract, "model_config": config.model, "store_path": path}
        if config.extract.plan_only:
            cost = estimate(model, table, plan, **settings)
            if cost.rows_missing:  # a whole store stays a finished run
                only_plan(context, plan, cost, given)
                cost.check(path)
                return
        with context.progress("capturing", plan.rows) as progress:
            summary = extract(
                model, table, plan, **settings, progress=progress, planned=lambda cost: print_plan(context, plan, cost),
                elsewhere=executor and (executor, capture_work(context, model, plan, path)),
            )  # fmt: skip
    context.outputs["store"] = str(path)
    if summary["flagged_share"] < 1:  # else there is nothing to draw
        draw_stats(ActivationStore(path), context.folder / PICTURE_NAME)
        context.outputs["statistics"] = str(context.folder / PICTURE_NAME)
    context.metrics = summary
    warn_not_finite(context, summary["not_finite_rows"], summary["not_finite"])
    context.three_lines(
        given,
        f"{summary['rows']:,} rows at {describe(map(HookPoint.parse, plan.hooks))} as {summary['dtype']}, {summary['flagged_share']:.2%} flagged, "
        f"{captured(summary)}{summary['shards_skipped']} were there",
        f"{relative(path)} ({store_sha256(path)[:12]}, {summary['bytes'] / 1e6:,.0f} MB)",
    )


def captured(summary: dict[str, Any]) -> str:
    """What this run captured, in front of the shards that were there."""
    if not summary["shards_done"]:
        return "no shard missing, "
    return f"{summary['tokens_per_s']:,.0f} tokens/s, {counted(summary['shards_done'], 'shard')} written, "


def only_plan(context: RunContext, plan: Plan, cost: Estimate, given: str) -> None:
    """Print what the capture would cost; the run counts as planned, and `resume=` captures with its tokenised corpus."""
    print_plan(context, plan, cost)
    context.ends_as = "planned"
    context.metrics = {"rows": plan.rows, "bytes": cost.bytes_missing, "seconds": cost.seconds}
    output = f"nothing was captured (extract.plan_only=true); `ggscope extract resume={relative(context.folder)}` does"
    context.three_lines(given, what_it_costs(plan, cost), output)


def what_it_costs(plan: Plan, cost: Estimate) -> str:
    """`900,000 rows of 256 values at 1 hook point, 16 shards, 462 MB, about 0:01:02 at 14,400 tokens/s, 118 GB free`."""
    time = timedelta(seconds=round(cost.seconds))
    speed = f"about {time} at {cost.tokens_per_s:,.0f} tokens/s" if cost.rows_missing else "nothing left to capture"
    room = f", {cost.free_bytes / 1e9:,.1f} GB free" if cost.free_bytes is not None else ""
    return (
        f"{cost.rows_missing:,} of {cost.rows:,} rows x {sum(plan.hooks.values()):,} values at "
        f"{counted(len(plan.hooks), 'hook point')}, {counted(cost.shards_missing, 'shard')}, {cost.bytes_missing / 1e6:,.0f} MB{room}; {speed}"
    )


def print_plan(context: RunContext, plan: Plan, cost: Estimate) -> None:
    context.console.print(f"plan: {what_it_costs(plan, cost)}", highlight=False, soft_wrap=True)


def take_back_damaged(context: RunContext, path: Location) -> None:
    """Shards whose files are not what their commit says lose the commit, so that they are captured again."""
    problems = ActivationStore(path).verify(checksums=context.config.store.verify)
    for problem in problems:
        context.console.print(f"captured again: {problem}", style="yellow", highlight=False)
    for shard in sorted({problem.shard for problem in problems}):
        invalidate(path, shard)

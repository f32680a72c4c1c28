"""`ggscope extract`: a GGUF model and a corpus to a store of activations."""

from __future__ import annotations

from pathlib import Path

from sae.errors import ConfigError

from ..extract import extract, plan_extraction
from ..run import RunContext
from ..store.reader import ActivationStore
from ..store.schema import META_FILE
from ..store.writer import invalidate
from .corpora import window_table
from .inputs import STORE_NAME, describe_model, open_model, relative, store_sha256


def run(context: RunContext) -> None:
    config = context.config
    if not config.hooks.points:
        raise ConfigError("missing required setting: hooks.points; give it as hooks.points=[blocks.3.hook_resid_post]")
    path = Path(config.store.path).expanduser() if config.store.path else context.folder / STORE_NAME
    if context.resumed and (path / META_FILE).exists():
        take_back_damaged(context, path)
    with open_model(context) as model:
        table = window_table(context, model, spool=True)
        plan = plan_extraction(model, table, config.hooks.points, extract=config.extract, store=config.store)
        with context.progress("capturing", plan.rows) as progress:
            summary = extract(
                model, table, plan, config=config.extract, model_config=config.model, store_path=path,
                progress=lambda done, total: progress(done, total),
            )  # fmt: skip
        given = describe_model(model)
    context.outputs["store"] = str(path)
    context.metrics = summary
    context.three_lines(
        f"{given}; {summary['documents']} documents (corpus {table.corpus_hash[:12]})",
        f"{summary['rows']:,} rows at {', '.join(plan.hooks)} as {summary['dtype']}, {summary['flagged_share']:.2%} flagged, "
        f"{summary['tokens_per_s']:,.0f} tokens/s, {summary['shards_done']} shards written, {summary['shards_skipped']} were there",
        f"{relative(path)} ({store_sha256(path)[:12]}, {summary['bytes'] / 1e6:,.0f} MB)",
    )


def take_back_damaged(context: RunContext, path: Path) -> None:
    """Shards whose files are not what their commit says lose the commit, so that they are captured again."""
    problems = ActivationStore(path).verify(checksums=context.config.store.verify)
    for problem in problems:
        context.console.print(f"captured again: {problem}", style="yellow", highlight=False)
    for shard in sorted({problem.shard for problem in problems}):
        invalidate(path, shard)

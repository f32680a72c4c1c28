"""`ggscope store info|verify|merge|compact`: what a store holds, whether it is whole, one store out of others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from sae.errors import CheckFailedError, ConfigError

from ..run import RunContext
from ..store.backends import as_location
from ..store.reader import ActivationStore
from ..store.rewrite import compact as compact_store
from ..store.rewrite import merge as merge_stores
from ..store.schema import CHECKSUMS_FILE
from ..store.summary import info as describe
from ..store.verify import unchecked, verify_store
from .inputs import print_wide, relative, store_path, store_place
from .store_text import facts_table, hooks_table


def run(context: RunContext) -> None:
    VERBS[context.verb](context)


def info(context: RunContext) -> None:
    """Rows, shards, flags and statistics of one store."""
    store = one_store(context)
    found = describe(store)
    as_json = context.config.store.format == "json"
    if as_json:
        sys.stdout.write(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    else:
        print_wide(facts_table(found))
        print_wide(hooks_table(found))
    missing = len(found["shards_missing"])
    context.three_lines(
        f"{relative(store.path)}, {model_of(store)}",
        f"{found['rows']:,} of {found['rows_planned']:,} rows at {', '.join(found['hooks'])}; {missing} of {missing + found['shards_committed']} shards missing",
        "nothing was written",
        stderr=as_json,
    )


def verify(context: RunContext) -> None:
    """Every byte of one store. Raises CheckFailedError (exit code 3) when something is wrong."""
    store = one_store(context, damaged_commits=True)
    total = sum(file["bytes"] for commit in store.commits for file in commit.files.values())
    out, problems = Console(highlight=False, soft_wrap=True, markup=False), 0
    with context.progress("verifying", total, "bytes") as progress:
        for problem in verify_store(store, progress=lambda done, _: progress(done)):
            out.print(str(problem))
            problems += 1
    if problems:
        raise CheckFailedError(f"{relative(store.path)}: {problems} problem{'s' * (problems > 1)} found, see above")
    if files := unchecked(store):
        context.console.print(
            f"note: {CHECKSUMS_FILE} has no checksum of {', '.join(files[:3])}{', ...' * (len(files) > 3)}: what they say was "
            "checked, not every byte; stores of an older ggscope and of a run that did not end have none",
            highlight=False,
        )
    context.three_lines(
        f"{relative(store.path)}, {model_of(store)}",
        f"{len(store.commits)} shards of {store.n_rows:,} rows, {total:,} bytes read: all as their commits say",
        "nothing was written",
    )


def merge(context: RunContext) -> None:
    """Several stores into a new one."""
    places = [store_place(name) for name in context.config.store.inputs]
    rewrite(context, places, merge_stores)


def compact(context: RunContext) -> None:
    """One store, packed anew into another."""
    places = given_or_newest(context, newest=False)
    rewrite(context, places, lambda given, out, **settings: compact_store(given[0], out, **settings))


def rewrite(context: RunContext, places: list[Path | str], make: Callable[..., ActivationStore]) -> None:
    settings = context.config.store
    if not settings.path:
        raise ConfigError(f"`ggscope store {context.verb}` writes a new store: give store.path=OUT")
    with context.progress("writing, then comparing", 0, "rows") as progress:
        made = make(places, as_location(settings.path), shard_rows=settings.shard_rows, progress=progress)
    context.three_lines(
        f"{', '.join(relative(place) for place in places)}; {model_of(made)}",
        f"{made.n_rows:,} rows in {len(made.commits)} shards of {made.meta.shard_rows:,}, every one read back equal",
        relative(made.path),
    )


def one_store(context: RunContext, *, damaged_commits: bool = False) -> ActivationStore:
    return ActivationStore(given_or_newest(context, newest=True)[0], damaged_commits=damaged_commits)


def given_or_newest(context: RunContext, *, newest: bool) -> list[Path | str]:
    """The one store of the command line; where `newest`, else that of `store.path` or the newest run."""
    named = context.config.store.inputs
    if len(named) == 1:
        return [store_place(named[0])]
    if named or not newest:
        raise ConfigError(f"`ggscope store {context.verb}` takes one store, got {len(named)}")
    return [store_path(context)]


def model_of(store: ActivationStore) -> str:
    model = store.meta.model
    return f"{model.get('name') or 'a model'} (sha256 {str(model.get('sha256', ''))[:12]})"


VERBS: dict[str, Callable[[RunContext], None]] = {"info": info, "verify": verify, "merge": merge, "compact": compact}

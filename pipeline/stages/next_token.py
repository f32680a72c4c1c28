"""How `ggscope heads` and `ggscope latents` say what they look at."""

from __future__ import annotations

from typing import Any

from ..lenses.next_token import NextToken
from ..lenses.side_by_side import check_fits
from ..llama.model import Model
from ..llama.session import Session
from ..run import RunContext
from .inputs import context_tokens, session_options

SIDE_BY_SIDE = 16  # prompts of a batch at most ...
BATCH_TOKENS = 2048  # ... and tokens, unless two prompts are more
MEASURES = {"logprob": "log-probability (nats)", "logit_difference": "logit difference"}
OTHER_TOKEN = "bold"  # of a row without which another token is the likeliest


def session_for(context: RunContext, model: Model, count: int) -> Session:
    """A context for prompts of so many tokens side by side, as many as a batch or `model.n_ctx` holds.

    All in one pass through the graph, where that can be, and each with cells of its own: equal prompts of one pass are
    then computed alike. ConfigError where not even one fits.
    """
    count = max(1, count)
    cells = context.config.model.n_ctx or SIDE_BY_SIDE * context_tokens(context, model, count)
    beside = max(1, min(SIDE_BY_SIDE, cells // count, max(2, BATCH_TOKENS // count)))
    n_batch = min(beside * count, cells)
    session = Session(
        model, n_ctx=context.config.model.n_ctx or n_batch, n_seq_max=beside, n_batch=n_batch,
        n_ubatch=min(n_batch, BATCH_TOKENS), kv_unified=False, **session_options(context.config.model),
    )  # fmt: skip
    check_fits(session, count)
    return session


def text(model: Model, token: int) -> str:
    return model.piece(int(token)).decode("utf-8", "replace")


def said(model: Model, target: NextToken) -> str:
    """`logit difference 'name' - 'path'`."""
    wrong = "" if target.wrong is None else f" - {text(model, target.wrong)!r}"
    return f"{MEASURES[target.measure].split(' (')[0]} {text(model, target.answer)!r}{wrong}"


def title(model: Model, target: NextToken) -> str:
    return f"{said(model, target)}: {target.plain:.3f}, likeliest next token {text(model, target.likeliest)!r}"


def with_text(model: Model, values: dict[str, Any], rows: str) -> dict[str, Any]:
    """A result's `to_dict` with the text of its tokens, and of those of its list `rows`."""
    texts = {
        f"{name}_text": None if values[name] is None else text(model, values[name])
        for name in ("answer", "wrong", "likeliest")
    }
    listed = [row | {"likeliest_text": text(model, row["likeliest"])} for row in values[rows]]
    return values | texts | {"text": [text(model, token) for token in values["tokens"]], rows: listed}

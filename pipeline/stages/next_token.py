"""How `ggscope heads` and `ggscope latents` say what they look at."""

from __future__ import annotations

from typing import Any

from ..lenses.next_token import NextToken
from ..llama.model import Model
from ..llama.session import Session
from ..run import RunContext
from .inputs import context_tokens, session_options

SIDE_BY_SIDE = 16
MEASURES = {"logprob": "log-probability (nats)", "logit_difference": "logit difference"}
OTHER_TOKEN = "bold"  # of a row without which another token is the likeliest


def session_for(context: RunContext, model: Model, count: int) -> Session:
    """A context that holds sixteen prompts of so many tokens, unless `model.n_ctx` says otherwise."""
    n_ctx = context.config.model.n_ctx or SIDE_BY_SIDE * context_tokens(context, model, max(1, count))
    return Session(model, n_ctx=n_ctx, n_seq_max=SIDE_BY_SIDE, **session_options(context.config.model))


def text(model: Model, token: int) -> str:
    return model.piece(int(token)).decode("utf-8", "replace")


def said(model: Model, target: NextToken) -> str:
    """`logit difference 'name' - 'path'`."""
    wrong = "" if target.wrong is None else f" - {text(model, target.wrong)!r}"
    return f"{MEASURES[target.measure].split(' (')[0]} {text(model, target.answer)!r}{wrong}"


def title(model: Model, target: NextToken) -> str:
    return f"{said(model, target)}: {target.plain:.3f}, likeliest next token {text(model, target.likeliest)!r}"


def with_text(model: Model, values: dict[str, Any], rows: str) -> dict[str, Any]:
    """A result's `to_dict`, its tokens and those of its list `rows` as text."""
    shown = values | {rows: [row | {"likeliest": text(model, row["likeliest"])} for row in values[rows]]}
    shown["tokens"] = [text(model, token) for token in values["tokens"]]
    for name in ("answer", "wrong", "likeliest"):
        shown[name] = None if values[name] is None else text(model, values[name])
    return shown

"""`ggscope heads`: what each attention head does for the next token, by switching it off."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae.errors import ConfigError

from ..interventions.heads import head_name
from ..lenses.heads import HeadsResult, head_sweep
from ..lenses.patching import blocks_with_heads, prompt_tokens
from ..llama.model import Model
from ..llama.session import Session
from ..run import RunContext, write_json
from .inputs import context_tokens, describe_model, open_model, print_wide, relative, session_options
from .live import head_means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS_NAME = "heads.json"
PICTURE_NAME = "heads.png"
SIDE_BY_SIDE = 16
MEASURES = {"logprob": "log-probability (nats)", "logit_difference": "logit difference"}


def run(context: RunContext) -> None:
    config = context.config.heads
    if not config.prompt:
        raise ConfigError("expected a prompt: --prompt TEXT, --prompt-file FILE, or - for standard input")
    with open_model(context) as model:
        counts = model.graph.heads()
        blocks = blocks_with_heads(counts, config.blocks)
        means = head_means(context, config.mean, model, blocks)
        count = max(1, len(prompt_tokens(model, config.prompt)))
        n_ctx = context.config.model.n_ctx or SIDE_BY_SIDE * context_tokens(context, model, count)
        session = Session(model, n_ctx=n_ctx, n_seq_max=SIDE_BY_SIDE, **session_options(context.config.model))
        with context.progress("switching heads off", sum(counts[block] for block in blocks), "heads") as progress:
            result = head_sweep(
                session,
                model,
                config.prompt,
                config.answer,
                config.wrong,
                blocks=blocks,
                means=means,
                progress=progress,
            )
        session.close()
        values = as_dict(model, result)
        said = what_is_measured(model, result)
        if config.format == "json":
            Console(soft_wrap=True, highlight=False).print(json.dumps(values), markup=False)
        else:
            print_wide(table(model, result, config.top))
        given = f"{describe_model(model)}, {len(result.tokens)} tokens, {sum(result.counts)} heads"
    write_json(context.folder / HEADS_NAME, values)
    picture(result, said).savefig(context.folder / PICTURE_NAME, dpi=110)
    context.outputs |= {"heads": str(context.folder / HEADS_NAME), "picture": str(context.folder / PICTURE_NAME)}
    row, head = result.ranked()[0]
    strongest = head_name(result.blocks[row], head)
    context.metrics = {"plain": result.plain, "strongest": strongest, "effect": float(result.effect_LH[row, head])}
    context.three_lines(
        given,
        f"{said} {result.plain:.3f}; strongest {strongest}, {result.effect_LH[row, head]:+.3f} without it",
        relative(context.folder / PICTURE_NAME),
        stderr=config.format == "json",
    )


def text(model: Model, token: int) -> str:
    return model.piece(int(token)).decode("utf-8", "replace")


def what_is_measured(model: Model, result: HeadsResult) -> str:
    """`logit difference 'name' - 'path'`."""
    wrong = "" if result.wrong is None else f" - {text(model, result.wrong)!r}"
    return f"{MEASURES[result.measure].split(' (')[0]} {text(model, result.answer)!r}{wrong}"


def as_dict(model: Model, result: HeadsResult) -> dict[str, Any]:
    """All numbers, with the tokens as text."""
    values = result.to_dict()
    for item in (values, *values["heads"]):
        item["likeliest"] = text(model, item["likeliest"])
    values["tokens"] = [text(model, token) for token in result.tokens]
    values["answer"] = text(model, result.answer)
    values["wrong"] = None if result.wrong is None else text(model, result.wrong)
    return values


def table(model: Model, result: HeadsResult, top: int) -> Table:
    """The strongest heads; in bold those without which another token is the likeliest."""
    title = (
        f"{what_is_measured(model, result)}: {result.plain:.3f}, likeliest next token {text(model, result.likeliest)!r}"
    )
    shown = Table(title=Text(title), title_justify="left")
    shown.add_column("head off")
    for name in (f"change of {MEASURES[result.measure]}", "KL (nats)", "likeliest without it"):
        shown.add_column(name, justify="right")
    for row, head in result.ranked()[:top]:
        likeliest = int(result.likeliest_LH[row, head])
        cells = (
            head_name(result.blocks[row], head),
            f"{result.effect_LH[row, head]:+.3f}",
            f"{result.kl_LH[row, head]:.3f}",
            repr(text(model, likeliest)),
        )
        shown.add_row(*map(Text, cells), style="bold" if likeliest != result.likeliest else "")
    return shown


def picture(result: HeadsResult, said: str) -> Figure:
    """Effect and KL of every head as two heat maps."""
    from matplotlib.figure import Figure

    lines, columns = result.effect_LH.shape
    figure = Figure(figsize=(2 * max(4.5, 1.6 + 0.3 * columns), max(3.0, 1.6 + 0.3 * lines)), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max(float(np.nanmax(np.abs(result.effect_LH))), 1e-9)
    parts = (
        (
            left,
            result.effect_LH,
            {"cmap": "RdBu", "vmin": -most, "vmax": most},
            f"change of {MEASURES[result.measure]}",
        ),
        (right, result.kl_LH, {"cmap": "Greens", "vmin": 0.0}, "KL to the model as it is (nats)"),
    )
    for ax, grid_LH, colours, label in parts:
        image = ax.imshow(grid_LH, origin="lower", aspect="auto", interpolation="nearest", **colours)
        ax.set_xlabel("head")
        ax.set_ylabel("block")
        ax.set_yticks(range(lines), [str(block) for block in result.blocks], fontsize=8)
        ax.set_xticks(range(columns), [str(head) for head in range(columns)], fontsize=8)
        figure.colorbar(image, ax=ax, label=label)
    off = "its mean in place of what it writes" if result.by_mean else "off"
    figure.suptitle(f"each head {off}: {said}".replace("$", r"\$"), fontsize=11)
    return figure

"""`ggscope heads`: what each attention head does for the next token, by switching it off."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..interventions.heads import head_name
from ..lenses.heads import HeadsResult, head_sweep
from ..lenses.patching import blocks_with_heads, prompt_tokens
from ..llama.model import Model
from ..run import RunContext, write_json
from .inputs import check_prompt, describe_model, open_model, print_wide, relative
from .live import head_means
from .next_token import MEASURES, OTHER_TOKEN, said, session_for, text, title, with_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS_NAME = "heads.json"
PICTURE_NAME = "heads.png"


def run(context: RunContext) -> None:
    config = context.config.heads
    check_prompt(config.prompt)
    with open_model(context) as model:
        counts = model.graph.heads()
        blocks = blocks_with_heads(counts, config.blocks)
        means = head_means(context, "heads.mean", config.mean, model, blocks)
        session = session_for(context, model, len(prompt_tokens(model, config.prompt)))
        with context.progress("switching heads off", sum(counts[block] for block in blocks), "heads") as progress:
            result = head_sweep(
                session, model, config.prompt, config.answer, config.wrong,
                blocks=blocks, means=means, progress=progress,
            )  # fmt: skip
        session.close()
        values = with_text(model, result.to_dict(), "heads")
        measured = said(model, result.target)
        if config.format == "json":
            Console(soft_wrap=True, highlight=False).print(json.dumps(values), markup=False)
        else:
            print_wide(table(model, result, config.top))
        given = f"{describe_model(model)}, {len(result.target.tokens)} tokens, {sum(result.counts)} heads"
    write_json(context.folder / HEADS_NAME, values)
    picture(result, measured).savefig(context.folder / PICTURE_NAME, dpi=110)
    context.outputs |= {"heads": str(context.folder / HEADS_NAME), "picture": str(context.folder / PICTURE_NAME)}
    row, head = result.ranked()[0]
    strongest = head_name(result.blocks[row], head)
    context.metrics = {
        "plain": result.target.plain,
        "strongest": strongest,
        "effect": float(result.effect_LH[row, head]),
    }
    context.three_lines(
        given,
        f"{measured} {result.target.plain:.3f}; strongest {strongest}, {result.effect_LH[row, head]:+.3f} {'at its mean' if result.by_mean else 'without it'}",
        relative(context.folder / PICTURE_NAME),
        stderr=config.format == "json",
    )


def table(model: Model, result: HeadsResult, top: int) -> Table:
    """The strongest heads; in bold those without which another token is the likeliest."""
    shown = Table(title=Text(title(model, result.target)), title_justify="left")
    shown.add_column("head at its mean" if result.by_mean else "head off")
    for name in (f"change of {MEASURES[result.target.measure]}", "KL (nats)", "likeliest then"):
        shown.add_column(name, justify="right")
    for row, head in result.ranked()[:top]:
        likeliest = int(result.likeliest_LH[row, head])
        cells = (
            head_name(result.blocks[row], head),
            f"{result.effect_LH[row, head]:+.3f}",
            f"{result.kl_LH[row, head]:.3f}",
            repr(text(model, likeliest)),
        )
        shown.add_row(*map(Text, cells), style=OTHER_TOKEN if likeliest != result.target.likeliest else "")
    return shown


def picture(result: HeadsResult, measured: str) -> Figure:
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
            f"change of {MEASURES[result.target.measure]}",
        ),
        (right, result.kl_LH, {"cmap": "Greens", "vmin": 0.0}, "KL to the model as it is (nats)"),
    )
    for ax, grid_LH, colours, label in parts:
        image = ax.imshow(grid_LH, origin="lower", aspect="auto", interpolation="nearest", **colours)
        ax.set_facecolor("#d9d9d9")  # of heads that a block does not have
        ax.set_xlabel("head")
        ax.set_ylabel("block")
        ax.set_yticks(range(lines), [str(block) for block in result.blocks], fontsize=8)
        ax.set_xticks(range(columns), [str(head) for head in range(columns)], fontsize=8)
        figure.colorbar(image, ax=ax, label=label)
    off = "its mean in place of what it writes" if result.by_mean else "off"
    figure.suptitle(f"each head {off}: {measured}".replace("$", r"\$"), fontsize=11)
    return figure

"""`ggscope patch`: which block and position, or which head, carries the answer, by activation patching."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae.errors import ConfigError

from ..config import PatchConfig
from ..interventions.heads import head_name
from ..lenses.patching import HEADS_SITE, PatchResult, patch_sweep, prompt_tokens
from ..run import RunContext, write_json
from .inputs import describe_model, open_model, print_wide, relative
from .next_token import session_for, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATCH_NAME = "patch.json"
PICTURE_NAME = "patch.png"
SMALL_GAP = 0.1  # between clean and corrupted: f16 and quantised models round by a hundredth
LEAST_WIDTH = 6.5  # inches of the picture, for its title


def run(context: RunContext) -> None:
    config = context.config.patch
    for flag in ("clean", "corrupted", "answer", "wrong"):
        if not getattr(config, flag):
            raise ConfigError(f"expected --clean, --corrupted, --answer and --wrong, --{flag} is missing")
    if config.heads and config.site not in (HEADS_SITE, PatchConfig().site):
        raise ConfigError(f"patch.heads=true patches {HEADS_SITE}, got patch.site={config.site}; leave one of them out")
    with open_model(context) as model:
        count = len(prompt_tokens(model, config.clean))
        session = session_for(context, model, count)
        runs = sum(model.graph.heads().values()) if config.heads else model.n_layer * count
        with context.progress("patching", runs, "runs") as progress:
            result = patch_sweep(
                session, model, config.clean, config.corrupted, config.answer, config.wrong,
                site=config.site, heads=config.heads, progress=progress,
            )  # fmt: skip
        session.close()
        clean, corrupted = (
            [text(model, t) for t in tokens] for tokens in (result.clean_tokens, result.corrupted_tokens)
        )
        given = describe_model(model)
    values = result.to_dict() | {"clean": clean, "corrupted": corrupted}
    if config.format == "json":
        Console(soft_wrap=True, highlight=False).print(json.dumps(values), markup=False)
    else:
        print_wide(table(result, clean, corrupted))
    write_json(context.folder / PATCH_NAME, values)
    picture(result, clean, corrupted).savefig(context.folder / PICTURE_NAME, dpi=110)
    if result.clean_difference <= 0:
        context.console.print(
            f"warning: after the clean prompt {config.answer!r} is no likelier than {config.wrong!r} (logit difference "
            f"{result.clean_difference:.3f}): a share of 1 restores no answer", style="yellow", highlight=False, markup=False,
        )  # fmt: skip
    gap = abs(result.clean_difference - result.corrupted_difference)
    if gap < SMALL_GAP:
        context.console.print(
            f"warning: the logit differences of the two prompts are {gap:.3g} apart: shares of so little are mostly rounding",
            style="yellow", highlight=False, markup=False,
        )  # fmt: skip
    context.outputs |= {"patch": str(context.folder / PATCH_NAME), "picture": str(context.folder / PICTURE_NAME)}
    context.metrics = {"clean_difference": result.clean_difference, "corrupted_difference": result.corrupted_difference}
    row, column = result.strongest()
    block = result.blocks[row]
    place = head_name(block, column) if result.heads else f"block {block}, position {result.positions[column]}"
    context.three_lines(
        f"{given}; {result.site}, {int(np.isfinite(result.grid_LP).sum())} patches",
        f"logit difference clean {result.clean_difference:.3f}, corrupted {result.corrupted_difference:.3f}; strongest "
        f"{result.grid_LP[row, column]:.3f} at {place}",
        relative(context.folder / PICTURE_NAME),
        stderr=config.format == "json",
    )


def label(clean: str, corrupted: str) -> str:
    clean, corrupted = repr(clean)[1:-1], repr(corrupted)[1:-1]
    return clean if clean == corrupted else f"{clean} | {corrupted}"


def labels(result: PatchResult, clean: list[str], corrupted: list[str]) -> list[str]:
    """What the columns of the grid are."""
    if result.heads:
        return [f"head {head}" for head in result.heads]
    return [label(clean[position], corrupted[position]) for position in result.positions]


def table(result: PatchResult, clean: list[str], corrupted: list[str]) -> Table:
    shown = Table(title="share of the clean answer restored (1: all, 0: none)", title_justify="left")
    shown.add_column("block", justify="right")
    for name in labels(result, clean, corrupted):
        shown.add_column(Text(name), justify="right", no_wrap=True)
    for row in reversed(range(len(result.blocks))):
        cells = [
            Text(
                "" if np.isnan(v) else f"{v:.2f}".replace("-0.00", "0.00"),
                style="bold green" if v > 0.5 else "" if v > 0.1 else "dim",
            )
            for v in result.grid_LP[row]
        ]
        shown.add_row(str(result.blocks[row]), *cells)
    return shown


def picture(result: PatchResult, clean: list[str], corrupted: list[str]) -> Figure:
    """The grid as a heat map."""
    from matplotlib.figure import Figure

    names = labels(result, clean, corrupted)
    width = max(LEAST_WIDTH, 2 + 0.8 * len(names))
    figure = Figure(figsize=(width, 1.5 + 0.45 * len(result.blocks)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(result.grid_LP, origin="lower", aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(
        range(len(names)),
        [name.replace("$", r"\$") for name in names],
        rotation=45,
        ha="right",
    )
    axes.set_yticks(range(len(result.blocks)), [str(b) for b in result.blocks])
    axes.set_ylabel("block")
    figure.suptitle(f"clean {result.site} patched into the corrupted run", fontsize=11)
    figure.colorbar(image, label="(patched - corrupted) / (clean - corrupted)")
    return figure

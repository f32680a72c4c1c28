"""`ggscope latents`: what each active latent of the SAE does for the next token, by switching it off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae.errors import ConfigError

from ..lenses.latents import LatentsResult, latent_sweep
from ..lenses.patching import prompt_tokens
from ..llama.model import Model
from ..run import RunContext, write_json
from .inputs import check_prompt, describe_model, open_model, print_wide, relative, sae_path
from .live import LiveSAEs, place_of
from .next_token import MEASURES, OTHER_TOKEN, said, session_for, text, title, with_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LATENTS_NAME = "latents.json"
PICTURE_NAME = "latents.png"
MOST_BARS = 40
MOST_LETTERS = 40  # of a label


def run(context: RunContext) -> None:
    config = context.config.latents
    check_prompt(config.prompt)
    own = sae_path(context)
    with open_model(context) as model:
        sae = LiveSAEs(context, model, own).get()
        session = session_for(context, model, len(prompt_tokens(model, config.prompt)))
        with context.progress("switching latents off", config.most or sae.weights.num_latents, "latents") as progress:
            result = latent_sweep(
                session, model, sae.weights, config.prompt, config.answer, config.wrong,
                most=config.most, encoder=sae.encoder, progress=progress,
            )  # fmt: skip
        session.close()
        if not result.active:
            raise ConfigError("no latent fires on this prompt: it needs a token that is not BOS, special or the first")
        labels = sae.weights.labels
        values = with_text(model, result.to_dict(), "latents")
        for row in values["latents"]:
            row["label"] = labels.get(row["latent"])
        measured = said(model, result.target)
        if config.format == "json":
            Console(soft_wrap=True, highlight=False).print(json.dumps(values), markup=False)
        else:
            print_wide(table(model, result, labels, config.top))
        given = f"{describe_model(model)} and {relative(sae.path)} at {place_of(sae.weights)}"
    write_json(context.folder / LATENTS_NAME, values)
    picture(result, labels, measured).savefig(context.folder / PICTURE_NAME, dpi=110)
    context.outputs |= {"latents": str(context.folder / LATENTS_NAME), "picture": str(context.folder / PICTURE_NAME)}
    first = result.ranked()[0]
    latent, effect = int(result.latents_N[first]), float(result.effect_N[first])
    context.metrics = {"plain": result.target.plain, "active": result.active, "strongest": latent, "effect": effect}
    context.three_lines(
        f"{given}, {len(result.target.tokens)} tokens, {len(result.latents_N)} of {result.active} active latents",
        f"{measured} {result.target.plain:.3f}; strongest latent {named(latent, labels)}, {effect:+.3f} without it",
        relative(context.folder / PICTURE_NAME),
        stderr=config.format == "json",
    )


def named(latent: int, labels: Mapping[int, str]) -> str:
    """`123`, or `123 (its label)`, shortened."""
    label = labels.get(latent, "")
    return (
        f"{latent} ({label if len(label) <= MOST_LETTERS else label[: MOST_LETTERS - 1] + '…'})"
        if label
        else str(latent)
    )


def table(model: Model, result: LatentsResult, labels: Mapping[int, str], top: int) -> Table:
    """The strongest latents; in bold those without which another token is the likeliest."""
    shown = Table(title=Text(title(model, result.target)), title_justify="left")
    shown.add_column("latent off")
    for name in (
        f"change of {MEASURES[result.target.measure]}",
        "KL (nats)",
        "likeliest then",
        "largest activation",
        "at token",
    ):
        shown.add_column(name, justify="right")
    for row in result.ranked()[:top]:
        likeliest = int(result.likeliest_N[row])
        cells = (
            named(int(result.latents_N[row]), labels),
            f"{result.effect_N[row]:+.3f}",
            f"{result.kl_N[row]:.3f}",
            repr(text(model, likeliest)),
            f"{result.activation_N[row]:.2f}",
            f"{text(model, int(result.target.tokens[result.position_N[row]]))!r} at {result.position_N[row]}",
        )
        shown.add_row(*map(Text, cells), style=OTHER_TOKEN if likeliest != result.target.likeliest else "")
    return shown


def picture(result: LatentsResult, labels: Mapping[int, str], measured: str) -> Figure:
    """Bars of the strongest effects, and their KL."""
    from matplotlib.figure import Figure

    rows = result.ranked()[:MOST_BARS]
    figure = Figure(figsize=(10, 1.6 + 0.24 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    effects, kls = result.effect_N[rows], result.kl_N[rows]
    left.barh(range(len(rows)), effects, color=["#2166ac" if effect > 0 else "#b2182b" for effect in effects])
    right.barh(range(len(rows)), kls, color="#1b7837")
    left.set_yticks(
        range(len(rows)), [named(int(result.latents_N[r]), labels).replace("$", r"\$") for r in rows], fontsize=8
    )
    left.margins(y=0.01)
    left.invert_yaxis()
    left.axvline(0, color="#777777", linewidth=0.8)
    left.set_ylabel("latent off")
    left.set_xlabel(f"change of {MEASURES[result.target.measure]}")
    right.set_xlabel("KL to the model as it is (nats)")
    figure.suptitle(f"each latent off: {measured}".replace("$", r"\$"), fontsize=11)
    return figure

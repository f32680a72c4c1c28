"""`ggscope lens`: what every block would predict, through the model's own final norm and unembedding."""

from __future__ import annotations

import json

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..lenses.attention import attention, draw_attention
from ..lenses.logit_lens import LensResult, logit_lens
from ..lenses.patching import prompt_tokens
from ..llama.model import Model
from ..llama.session import Session
from ..run import RunContext, write_json
from .inputs import check_prompt, context_tokens, describe_model, open_model, print_wide, relative, session_options
from .next_token import text

LENS_NAME = "lens.json"
ATTENTION_NAME = "attention.npz"
PICTURE_NAME = "attention.png"
COLUMNS_SHOWN = 10  # the terminal shows the last positions, the file has all


def run(context: RunContext) -> None:
    config = context.config.lens
    check_prompt(config.prompt)
    with open_model(context) as model:
        tokens = prompt_tokens(model, config.prompt)
        options = session_options(context.config.model)
        if config.attention:
            options["flash_attn"] = "off"
        session = Session(model, n_ctx=context_tokens(context, model, len(tokens)), **options)
        patterns = attention(session, tokens, list(dict.fromkeys(config.attention))) if config.attention else {}
        result = logit_lens(session, model, tokens, top=config.top)
        session.close()
        values = as_dict(model, result)
        if config.format == "json":
            Console(soft_wrap=True, highlight=False).print(json.dumps(values), markup=False)
        else:
            print_wide(table(model, result))
        given = f"{describe_model(model)}, {len(tokens)} tokens"
        labels = [written(model, token).replace("$", r"\$") for token in tokens]
    path, made = context.folder / LENS_NAME, [context.folder / LENS_NAME]
    write_json(path, values)
    context.outputs["lens"] = str(path)
    if patterns:
        arrays, picture = context.folder / ATTENTION_NAME, context.folder / PICTURE_NAME
        columns = {f"blocks.{block}.attn.hook_pattern": weights_HTT for block, weights_HTT in patterns.items()}
        np.savez(arrays, allow_pickle=False, **columns)
        draw_attention(picture, patterns, labels)
        context.outputs |= {"attention": str(arrays), "attention_picture": str(picture)}
        made += [arrays, picture]
    context.metrics = {"last_block_error": result.last_block_error, "tokens": len(tokens)}
    context.three_lines(
        given,
        f"last block against the model's logits: relative {result.last_block_error:.1e}; "
        f"KL to the model at the last position (nats), from the first block on: {' '.join(f'{v:.2f}' for v in result.kl_LT[:, -1])}",
        ", ".join(relative(file) for file in made),
        stderr=config.format == "json",
    )


def as_dict(model: Model, result: LensResult) -> dict:
    """All numbers of the lens, with the tokens as text."""
    return {
        "tokens": [text(model, t) for t in result.tokens_T],
        "hooks": list(result.hooks),
        "top_tokens": [[[text(model, t) for t in cell] for cell in row] for row in result.top_tokens_LTK],
        "top_probs": result.top_probs_LTK.tolist(),
        "entropy_nats": result.entropy_LT.tolist(),
        "kl_nats": result.kl_LT.tolist(),
        "last_block_error": result.last_block_error,
    }


def table(model: Model, result: LensResult) -> Table:
    """Blocks from the last up, positions across, `lens.top` tokens in each cell; the brighter one is the surer the lens."""
    start = max(0, len(result.tokens_T) - COLUMNS_SHOWN)
    title = "most probable next tokens after each block, with their probabilities"
    shown = Table(title=title, title_justify="left", show_lines=result.top_tokens_LTK.shape[2] > 1)
    shown.add_column("")
    for position in range(start, len(result.tokens_T)):
        shown.add_column(Text(written(model, result.tokens_T[position])), justify="right", no_wrap=True)
    for row in reversed(range(len(result.hooks))):
        cells = [
            cell(model, result.top_tokens_LTK[row, position], result.top_probs_LTK[row, position])
            for position in range(start, len(result.tokens_T))
        ]
        shown.add_row(result.hooks[row].replace("hook_", ""), *cells)
    return shown


def cell(model: Model, tokens_K: np.ndarray, probs_K: np.ndarray) -> Text:
    """A line for each token."""
    lines = []
    for token, p in zip(tokens_K, probs_K.tolist(), strict=True):
        style = "bold green" if p > 0.5 else "green" if p > 0.2 else "dim"
        lines.append(Text(f"{written(model, token)} {p:.2f}", style=style))
    return Text("\n").join(lines)


def written(model: Model, token: int) -> str:
    """A token as Python writes it, without the quotes."""
    return repr(text(model, token))[1:-1]

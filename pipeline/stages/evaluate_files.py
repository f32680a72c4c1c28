"""What an evaluation leaves in its run folder, and which of its numbers the manifest holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..evaluation.latents import save_columns
from ..evaluation.picture import draw_evaluation
from ..run import RunContext, write_json

EVALUATION_NAME = "evaluation.json"
LATENTS_NAME = "latents.npz"
PICTURE_NAME = "evaluation.png"
NOT_IN_MANIFEST = ("density_histogram", "dictionary", "saebench")


def write(context: RunContext, result: dict[str, Any], columns: dict[str, np.ndarray], title: str) -> None:
    """The numbers as JSON, the latents as arrays, and a picture of both."""
    names = {"evaluation": EVALUATION_NAME, "latents": LATENTS_NAME, "picture": PICTURE_NAME}
    write_json(context.folder / EVALUATION_NAME, result)
    save_columns(context.folder / LATENTS_NAME, columns)
    draw_evaluation(context.folder / PICTURE_NAME, result, title)
    context.outputs |= {output: str(context.folder / name) for output, name in names.items()}
    context.metrics = {key: value for key, value in result.items() if key not in NOT_IN_MANIFEST}

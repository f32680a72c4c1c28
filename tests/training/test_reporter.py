"""What a training run says: which rate a search took and why, the note beside the bar, the warning about waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.config import Config, TrainerConfig
from pipeline.run import RunContext
from pipeline.stages.train import MOST_WAITING, warn_waiting
from pipeline.training.lr_search import smallest_good
from pipeline.training.reporter import note, searched_lines


def found(fvu):
    finite = {float(lr): value for lr, value in fvu.items() if value is not None}
    return {"best": smallest_good(finite), "tokens": 20_480, "fvu": fvu}


def test_a_search_says_why_its_rate_was_taken_where_another_has_the_lowest_fvu():
    close = found({"0.004": 0.2428, "0.008": 0.2258, "0.016": 0.2240})
    clear = found({"0.004": 0.2428, "0.008": 0.2258, "1e+38": None})
    assert list(searched_lines({"k8": close, "k16": clear})) == [
        "k8: lr 0.008 taken: the smallest within 2% of the lowest FVU, 0.016's, after 20,480 tokens "
        "(0.004: 0.2428, 0.008: 0.2258, 0.016: 0.2240)",
        "k16: lr 0.008 taken: the lowest FVU after 20,480 tokens (0.004: 0.2428, 0.008: 0.2258, 1e+38: diverged)",
    ]
    assert next(searched_lines({"": clear})).startswith("lr 0.008 taken")


def test_the_note_has_one_number_or_the_least_and_the_most():
    row = {"tokens_per_s": 150_000.4, "fvu": 0.12341, "l0": 32.0, "dead": 5}
    assert note([row]) == "150,000/s  FVU 0.1234  L0 32.0  dead 5"
    other = {"tokens_per_s": 90_000.0, "fvu": 0.5, "l0": 32.04, "dead": 17}
    assert note([row, other]) == "90,000-150,000/s  FVU 0.1234-0.5000  L0 32.0  dead 5-17"


@pytest.mark.parametrize(
    ("share", "source", "wanted"),
    [
        (MOST_WAITING, "store", ""),
        (
            MOST_WAITING + 0.01,
            "store",
            "training waited for rows 6% of the time; the store is the slower side: a faster",
        ),
        (0.5, "stream", "training waited for rows 50% of the time; the capture is the slower side: model.n_threads"),
    ],
)
def test_waiting_for_rows_above_a_twentieth_of_the_time_is_a_warning(tmp_path, share, source, wanted):
    config = replace(Config(), trainer=TrainerConfig(source=source))
    context = RunContext(command="train", folder=tmp_path, config=config)
    with context.console.capture() as said:
        warn_waiting(context, share)  # of a training that has just begun
    assert not said.get()
    context.started -= 1000
    with context.console.capture() as said:
        warn_waiting(context, share)
    line = " ".join(said.get().split())
    assert line.startswith(f"warning: {wanted}") if wanted else not line

"""Trains SAEs of every variant and wiring on the ranks of torchrun, a few steps each:
`torchrun ... -m tests.sae.train_variants FOLDER`.

Rank 0 leaves `weights.npz` and `rows.json`; every rank the hash of its weights in `rank-N.txt`, and in `chosen-N.npz`
what it chose of its rows of `batches()`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.batch_select import batch_edge, entries_from, largest, select_batch, take
from sae.options import SAEOptions
from sae.ranks import Ranks, torchrun_ranks
from sae.trainer import JointTrainer, TrainConfig

from .test_wirings import A, B, Rows, Wiring, Y, Z
from .toy import Toy

STEPS, BATCH = 10, 128
CHOSEN = 3  # of `batches`
FIELDS = ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "threshold_F", "W_skip_OD", "freq_F")
JUMPS: dict[str, Any] = {"threshold_start": 1.0}  # of JumpReLU: low enough that thresholds are near pre-activations


def config(variant: str, *, top: dict[str, Any] | None = None, **options: Any) -> TrainConfig:
    """`top`: settings that are not the variant's."""
    settings: dict[str, Any] = {
        "num_latents": 240, "k": 2, "batch_tokens": BATCH, "tokens": STEPS * BATCH, "lr": 2e-3, "warmup_steps": 2,
        "dead_after_tokens": BATCH, "checkpoint_steps": 0, "log_steps": 4, "kernel": "torch", "auxk_k": 8,
        "encoder_dtype": "float32", "auxk_dtype": "float32",
    }  # fmt: skip
    return TrainConfig(variant=variant, options=SAEOptions(**options), **settings | (top or {}))


def wired(kind: str, *, inputs: tuple[Any, ...], outputs: tuple[Any, ...] = (), skip: bool = False) -> Wiring:
    return Wiring(kind=kind, inputs=inputs, outputs=outputs, skip=skip)


CASES: dict[str, tuple[Wiring | None, dict[str, TrainConfig]]] = {
    "sae": (
        None,
        {
            "topk bf16": config("topk", top={"encoder_dtype": "bfloat16"}),
            "topk multi": config("topk", multi_k=20),
            "topk free": config("topk", decoder_rows="free"),
            "topk layer": config("topk", input_norm="layer"),
            "groupmax": config("groupmax"),
            "batchtopk": config("batchtopk"),
            "batchtopk bf16": config("batchtopk", top={"encoder_dtype": "bfloat16"}),
            "batchtopk falling": config("batchtopk", k_start=40, k_anneal_share=0.8),
            "batchtopk free": config("batchtopk", decoder_rows="free"),
            "batchtopk muon": config("batchtopk", top={"optimizer": "muon"}),
            "matryoshka signum": config("matryoshka", top={"optimizer": "signum", "lr": 1e-3}),
            "matryoshka": config("matryoshka"),
            "relu": config("relu"),
            "relu free": config("relu", decoder_rows="free"),
            "gated": config("gated"),
            "jumprelu": config("jumprelu", **JUMPS),
        },
    ),
    "transcoder": (
        wired("transcoder", inputs=(A,), outputs=(Y,), skip=True),
        {"topk": config("topk"), "batchtopk": config("batchtopk"), "gated": config("gated")},
    ),
    "crosscoder": (
        wired("crosscoder", inputs=(A, Y, Z)),
        {"batchtopk": config("batchtopk"), "relu": config("relu", decoder_rows="free")},
    ),
    "cross_layer": (
        wired("cross_layer", inputs=(A, B), outputs=(Y, Z)),
        {"matryoshka": config("matryoshka"), "jumprelu": config("jumprelu", **JUMPS)},
    ),
}


def trained(folder: Path, ranks: Ranks) -> tuple[dict[str, Any], dict[str, list[dict[str, float]]]]:
    """Arrays (`kind.name.field`) and metric rows (`kind.name`) of every case."""
    arrays: dict[str, Any] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    for kind, (wiring, configs) in CASES.items():
        source: Any = Rows(wiring, batch=BATCH) if wiring else Toy(batch=BATCH)
        statistics: dict[str, Any] = {"hook": "blocks.0.hook_resid_mid", "host": {}} | source.statistics()

        def log(name: str, row: dict[str, float], kind: str = kind) -> None:
            rows.setdefault(f"{kind}.{name}", []).append(row)

        run = JointTrainer(configs, source, **statistics, folder=folder / kind, ranks=ranks, log=log)
        for name, weights in run.fit().items():
            for field in FIELDS:
                if (value := getattr(weights, field)) is not None:
                    arrays[f"{kind}.{name}.{field}"] = value
    return arrays, rows


def batches() -> dict[str, torch.Tensor]:
    """Pre-activations of two ranks' rows, of which CHOSEN each row are to be chosen: what is hard about the choice."""
    generator = torch.Generator().manual_seed(0)
    values_BF = torch.randn(20, 30, generator=generator)
    later_BF = values_BF.clone()
    later_BF[:10] = -1.0
    return {
        "spread": values_BF,
        "equal values on both sides of the cut": torch.randint(-2, 3, (20, 30), generator=generator).float(),
        "all of one value": torch.ones(20, 30),
        "all on the first rank": later_BF.flip(0),
        "all on the last rank": later_BF,
        "too few": torch.where(values_BF > 1.5, values_BF, -1.0),
        "none": -values_BF.abs(),
    }


def chosen(ranks: Ranks) -> dict[str, Any]:
    """Of every batch the choice among this rank's rows, by the general path and by entries."""
    found = {}
    for name, values_BF in batches().items():
        values_NF = ranks.part(values_BF)
        count = CHOSEN * len(values_NF)
        general_NF = select_batch(values_NF, count, ranks=ranks)
        entries = entries_from(values_NF, 1e-30, CHOSEN)
        kept = take(entries, largest(entries, batch_edge(entries.value_P, count, ranks), values_NF.shape[1]))
        entries_NF = torch.zeros_like(general_NF)
        entries_NF[kept.row_P, kept.latent_P] = True
        found[name] = torch.stack([general_NF, entries_NF]).numpy()
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with torchrun_ranks(torch.device("cpu")) as ranks:
        np.savez(folder / f"chosen-{ranks.rank}.npz", **chosen(ranks))
        arrays, rows = trained(folder, ranks)
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
        (folder / f"rank-{ranks.rank}.txt").write_text(digest)
        if ranks.first:
            np.savez(folder / "weights.npz", **arrays)
            (folder / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()

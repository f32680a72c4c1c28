"""Reading an SAE while generating, beside HF transformers with SAELens on the same weights; the sides take turns.

Shape letters: D width, F latents, K top-k, T tokens.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bench import live_readings, models
from bench import live_steps as steps
from bench.common import ROOT, TRAIN_PEER_PYTHON, Row, Worker
from convert.sae_gguf import StoredMatrix
from pipeline.llama.encoder import GgmlEncoder
from pipeline.llama.model import Model
from pipeline.readout import Reader, Reading

PEERS = (("bfloat16", "bfloat16"), ("float32", "float32"))  # dtype of the model, of the SAE
ROUNDS = 3


def available() -> bool:
    """Whether `make bench-env` made the environment."""
    return TRAIN_PEER_PYTHON.exists()


def peer_rows(
    name: str, path: Path, folder: Path, settings: steps.Settings, say: steps.Say
) -> tuple[list[Row], dict[str, Any]]:
    """A row for each dtype of the peer: milliseconds of a token with a reading, ours on the Q8_0 file."""
    latents = live_readings.SHARE_OF[0] if live_readings.SHARE_OF[0] in settings.latents else max(settings.latents)
    hf = folder / settings.shape.name / "hf"
    if not (hf / "model.safetensors").exists():
        say(f"writing {hf}")
        models.write_hf(hf, settings.shape)
    rows, facts = [], {}
    with Model(path) as model:
        weights = live_readings.random_sae(model, latents, settings)
        matrix = folder / f"sae_{model.n_embd}_{latents}.npy"
        np.save(matrix, weights.W_dec_FD)
        reader = _reader(weights, settings)
        kept: list[Reading] = []
        step = steps.session_step(
            steps.session_of(model, settings.prompt + settings.peer_tokens, settings), reader, kept
        )
        for model_dtype, sae_dtype in PEERS:
            say(f"{name}: HF {model_dtype} with SAELens {sae_dtype}")
            with peer_worker(settings.threads) as worker:
                versions = worker.ask("load", folder=str(hf), dtype=model_dtype, threads=settings.threads)
                versions |= worker.ask("sae", path=str(matrix), k=settings.k, dtype=sae_dtype)
                turns = in_turns(step, kept, worker, model.n_layer // 2, settings)
            facts |= versions
            rows.append(_row(f"{name} token with n{latents} k{settings.k}, Q8_0", f"hf-saelens-{model_dtype}", turns))
        matrix.unlink()
    return rows, facts


def peer_worker(threads: int) -> Worker:
    return Worker([str(TRAIN_PEER_PYTHON), "-P", str(ROOT / "bench" / "live_peers.py")], threads=threads)


def in_turns(
    step: steps.Step, kept: list[Reading], worker: Worker, block: int, settings: steps.Settings
) -> dict[str, Any]:
    """Seconds of every token of both sides, and the share of the last token's latents that both name."""
    token_T = np.random.default_rng(settings.seed).integers(3, 500, max(1, settings.peer_tokens // ROUNDS)).tolist()
    ours, theirs, plain = [], [], []
    last: dict[str, Any] = {}
    for _ in range(ROUNDS):
        for pos in range(settings.prompt):
            step(3 + pos, pos)
        ours += steps.timed(step, token_T, settings.prompt)
        plain += worker.ask("generate", prompt=settings.prompt, tokens_T=token_T, block=block, read=False)["seconds"]
        last = worker.ask("generate", prompt=settings.prompt, tokens_T=token_T, block=block, read=True)
        theirs += last["seconds"]
    shared = len({latent for latent, _ in kept[0].latents} & set(last["latents"])) / len(last["latents"])
    return {"ours": ours, "theirs": theirs, "plain": plain, "shared": shared}


def _row(case: str, peer: str, turns: dict[str, Any]) -> Row:
    ours, theirs, plain = (1e3 * statistics.median(turns[side]) for side in ("ours", "theirs", "plain"))
    note = f"theirs without the SAE {plain:.1f}; {100 * turns['shared']:.0f} % of the latents are the same"
    return Row(case=case, peer=peer, unit="ms/token", ours=ours, theirs=theirs, ratio=theirs / ours, note=note)


def _reader(weights: Any, settings: steps.Settings) -> Reader:
    raw = np.ascontiguousarray(gguf.quants.quantize(weights.W_enc_FD, gguf.GGMLQuantizationType.Q8_0))
    stored = StoredMatrix(dtype="Q8_0", shape=weights.W_enc_FD.shape, raw=raw.view(np.uint8).reshape(-1))
    encoder = GgmlEncoder(weights, n_threads=settings.threads, stored=stored)
    return Reader(weights, top=settings.k, encoder=encoder)

"""What values the settings of `config.py` may have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from convert.interop.exporting import TARGETS as EXPORT_TARGETS
from convert.interop.registry import NAMES as FORMAT_NAMES
from convert.keys import MATRIX_TYPES
from sae.errors import ConfigError
from sae.options import B_DEC_INITS, DECODER_ROWS, INPUT_NORMS, OPTIMIZERS, VARIANT_NAMES
from sae.thresholds import MODES as THRESHOLD_MODES
from sae.wiring import KINDS

from .config import Config

FORMATS = ("text", "json")
ENCODERS = ("auto", "ggml", "numpy")
CHOICES: dict[str, tuple[str, ...]] = {
    "model.kv_type": ("f16", "f32"),
    "model.flash_attn": ("auto", "on", "off"),
    "corpus.kind": ("stdlib", "text", "stdin", "jsonl", "parquet", "datasets", "tokens"),
    "corpus.token_dtype": ("uint16", "uint32", "int32"),
    "corpus.split": ("train", "held_out", "all"),
    "corpus.packing": ("documents", "concat"),
    "corpus.bos": ("auto", "always", "never"),
    "store.format": FORMATS,
    "extract.dtype": ("auto", "float16", "bfloat16", "float32"),
    "extract.load": ("auto", "whole"),
    "extract.backend": ("auto", "callback", "layer_inp"),
    "executor.kind": ("local", "pool", "ray", "submitit"),
    "executor.cluster": ("slurm", "local", ""),
    "inspect.format": FORMATS,
    "sae.variant": VARIANT_NAMES,
    "sae.kind": KINDS,
    "sae.decoder_rows": DECODER_ROWS,
    "sae.input_norm": INPUT_NORMS,
    "sae.b_dec_init": B_DEC_INITS,
    "trainer.optimizer": OPTIMIZERS,
    "trainer.source": ("store", "stream"),
    "trainer.encoder_dtype": ("auto", "float32", "bfloat16"),
    "trainer.auxk_dtype": ("auto", "float32", "bfloat16"),
    "trainer.kernel": ("auto", "torch", "native", "triton"),
    "trainer.parallel": ("data", "latent"),
    "trainer.device": ("auto", "cpu", "cuda"),
    "convert.format": ("", *FORMAT_NAMES),
    "convert.export": ("", *EXPORT_TARGETS),
    "convert.encoder_type": MATRIX_TYPES,
    "convert.decoder_type": MATRIX_TYPES,
    "drift.encoder": ENCODERS,
    "drift.format": FORMATS,
    "convert.thresholds": ("none", *THRESHOLD_MODES),
    "intervention.kind": ("none", "steer", "clamp", "ablate", "reconstruct", "heads"),
    "intervention.phase": ("all", "prompt", "response"),
    "apply.encoder": ENCODERS,
    "apply.format": ("text", "jsonl"),
    "lens.format": FORMATS,
    "heads.format": FORMATS,
    "latents.format": FORMATS,
    "patch.format": FORMATS,
    "compare.format": FORMATS,
}

# settings, or their items, with a least value; counts whose 0 means "all" or "chosen" start at 0
LEAST: dict[str, float] = {
    "model.n_threads": 0, "model.n_gpu_layers": -1, "model.n_ctx": 0,
    "corpus.context_tokens": 2, "corpus.max_tokens": 0, "corpus.max_documents": 0, "corpus.seed": -1,
    "corpus.generate_tokens": 0, "corpus.generate_temperature": 0,
    "store.buffer_bytes": 1, "store.chunk_bytes": 1, "store.shard_rows": 0,
    "extract.batch_tokens": 1, "extract.ubatch_tokens": 1, "extract.calibration_tokens": 1, "extract.outlier_factor": 1,
    "executor.workers": 0, "executor.threads_per_worker": 0, "executor.gpus_per_worker": 0, "executor.retries": 0,
    "executor.timeout_minutes": 1, "executor.memory_gb": 1, "trainer.queue_batches": 1,
    "sae.num_latents": 1, "sae.k": 1, "sae.init_scale": 0, "sae.seed": -1, "trainer.lr_search_share": 0, "sae.k_start": 0, "sae.k_anneal_share": 0, "sae.multi_k": 0, "sae.multi_coef": 0,
    "sae.l1_coef": 0, "sae.l0_coef": 0, "sae.sparsity_warmup_share": 0, "sae.threshold_start": 0, "sae.bandwidth": 0,
    "sae.prefixes": 1, "together.num_latents": 1, "together.k": 1, "together.seed": 0,
    "trainer.momentum": 0, "trainer.beta1": 0, "trainer.beta2": 1e-6, "trainer.warmup_steps": 0, "trainer.decay_share": 0,
    "trainer.auxk_coef": 0, "trainer.auxk_k": 0, "trainer.dead_after_tokens": 0, "trainer.checkpoint_steps": 0,
    "trainer.keep_last": 1, "trainer.log_steps": 1,
    "trainer.tokens": 1, "trainer.batch_tokens": 1, "trainer.n_threads": 0, "trainer.seed": 0, "trainer.buffer_rows": 1,
    "evaluate.tokens": 0, "evaluate.splice_tokens": 0, "evaluate.random_model_tokens": 1, "evaluate.seed": 0,
    "evaluate.probe_k": 1, "evaluate.probe_test_share": 0, "evaluate.structure_latents": 0,
    "drift.tokens": 1, "drift.splice_tokens": 1, "drift.copies_bytes": 0, "drift.seed": 0,
    "convert.latent": -1, "convert.probe_tokens": 1,
    "apply.max_tokens": 0, "apply.temperature": 0, "apply.top_latents": 0, "apply.seed": 0,
    "lens.top": 1, "heads.top": 1, "heads.blocks": 0, "latents.most": 0, "latents.top": 1, "sweep.trials": 0, "sweep.seed": 0,
    "report.top_latents": 0, "report.contexts": 1, "report.tokens": 1, "report.steer_latent": -1,
}  # fmt: skip


MOST_WHOLE = 2**31 - 1  # what llama.cpp and the compiled kernels count with
MOST_FLOAT = 3.4e38  # about what a float32 holds
# the greatest value where another one than these, by the last word of a setting's name ...
MOST_OF: dict[str, float] = {
    "seed": 2**63 - 1, "tokens": 2**48, "rows": 2**48, "bytes": 2**48, "documents": 2**48, "threads": 512, "share": 1, "coef": 1e6,
}  # fmt: skip
# ... or of one setting
MOST: dict[str, float] = {
    "trainer.beta1": 0.9999, "trainer.beta2": 0.999999, "trainer.momentum": 0.9999, "trainer.eps": 1,
    "sae.init_scale": 1e6, "sae.threshold_start": 1e6, "sae.bandwidth": 1e6,
    "corpus.context_tokens": MOST_WHOLE, "corpus.generate_tokens": MOST_WHOLE, "apply.max_tokens": MOST_WHOLE,
    "extract.batch_tokens": MOST_WHOLE, "extract.ubatch_tokens": MOST_WHOLE, "sweep.seed": MOST_WHOLE,
    "executor.threads_per_worker": 512,
}  # fmt: skip

# lists that a value stands in once
NAMED_ONCE = (
    "hook.points", "sae.inputs", "sae.outputs", "sae.prefixes", "trainer.lr_search", "together.variant",
    "together.num_latents", "together.k", "together.lr", "together.seed", "evaluate.probe_k",
)  # fmt: skip


def numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of the settings, those in lists too, with its setting."""
    if is_dataclass(value):
        for field in fields(value):
            yield from numbers(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def check_number(key: str, value: float) -> None:
    """ConfigError for a number too small, too large or none at all."""
    general = MOST_WHOLE if isinstance(value, int) else MOST_FLOAT
    most = MOST.get(key, MOST_OF.get(key.rpartition(".")[2].rpartition("_")[2], general))
    least = LEAST.get(key, -most)
    if not value >= least:
        raise ConfigError(f"{key}={value}: expected a number of at least {least}")
    if not value <= most:
        raise ConfigError(f"{key}={value}: expected a number of at most {most}")


def check_ranges(config: Config) -> None:
    """ConfigError for a value that is none of its choices, a number out of its range or not finite, one named twice in a list."""
    for key, choices in CHOICES.items():
        group, item = key.split(".")
        value = getattr(getattr(config, group), item)
        if value not in choices:
            raise ConfigError(f"{key}={value!r}; expected {', '.join(choice or 'nothing' for choice in choices)}")
    for key, value in numbers(config):
        check_number(key, value)
    if not config.evaluate.probe_k or config.evaluate.probe_test_share == 1:
        raise ConfigError(
            f"evaluate.probe_k={config.evaluate.probe_k} evaluate.probe_test_share={config.evaluate.probe_test_share}: "
            "expected one number or more, and a share below 1"
        )
    for key in NAMED_ONCE:
        group, item = key.split(".")
        values = getattr(getattr(config, group), item)
        if len(set(values)) != len(values):
            raise ConfigError(f"{key} names a value twice: {', '.join(map(str, values))}")
    if config.intervention.latents and config.intervention.kind == "none":
        raise ConfigError("intervention.latents without a kind does nothing: add intervention=steer, clamp or ablate")
    of_heads = config.intervention.heads or config.intervention.keep or config.intervention.mean
    if of_heads and config.intervention.kind == "none":
        raise ConfigError("intervention.heads, keep and mean without a kind do nothing: add intervention=heads")

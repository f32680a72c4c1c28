"""What values the settings of `config.py` may have."""

from __future__ import annotations

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
    "intervention.kind": ("none", "steer", "clamp", "ablate", "reconstruct"),
    "intervention.phase": ("all", "prompt", "response"),
    "apply.encoder": ENCODERS,
    "apply.format": ("text", "jsonl"),
    "lens.format": FORMATS,
    "patch.format": FORMATS,
    "compare.format": FORMATS,
}

# settings with a least value; counts whose 0 means "all" or "chosen" start at 0
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
    "trainer.momentum": 0,
    "trainer.tokens": 1, "trainer.batch_tokens": 1, "trainer.n_threads": 0, "trainer.seed": 0, "trainer.buffer_rows": 1,
    "evaluate.tokens": 0, "evaluate.splice_tokens": 0, "evaluate.random_model_tokens": 1, "evaluate.seed": 0,
    "evaluate.probe_test_share": 0, "evaluate.structure_latents": 0,
    "drift.tokens": 1, "drift.splice_tokens": 1, "drift.copies_bytes": 0, "drift.seed": 0,
    "convert.latent": -1, "convert.probe_tokens": 1,
    "apply.max_tokens": 0, "apply.temperature": 0, "apply.top_latents": 0, "apply.seed": 0,
    "lens.top": 1, "sweep.trials": 0, "sweep.seed": 0,
    "report.top_latents": 0, "report.contexts": 1, "report.tokens": 1, "report.steer_latent": -1,
}  # fmt: skip


def check_ranges(config: Config) -> None:
    """ConfigError for a value that is none of its choices, a number too small or not finite, a hook point named twice."""
    for key, choices in CHOICES.items():
        group, item = key.split(".")
        value = getattr(getattr(config, group), item)
        if value not in choices:
            raise ConfigError(f"{key}={value!r}; expected {', '.join(choice or 'nothing' for choice in choices)}")
    for key, least in LEAST.items():
        group, item = key.split(".")
        value = getattr(getattr(config, group), item)
        if not least <= value < float("inf"):
            raise ConfigError(f"{key}={value}: expected a number of at least {least}")
    ks, share = config.evaluate.probe_k, config.evaluate.probe_test_share
    if not ks or min(ks) < 1 or share >= 1:
        raise ConfigError(
            f"evaluate.probe_k={ks} evaluate.probe_test_share={share}: expected numbers of at least 1, and a share below 1"
        )
    points = config.hook.points
    if len(set(points)) != len(points):
        raise ConfigError(f"hook.points names a point twice: {', '.join(points)}")
    if config.intervention.latents and config.intervention.kind == "none":
        raise ConfigError("intervention.latents without a kind does nothing: add intervention=steer, clamp or ablate")

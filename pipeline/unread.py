"""Which settings typed on the command line the command will not read: accepted, since files set more than one needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass

from sae.options import WITHOUT_K

from .commands import COMMANDS, WRITING
from .config import Config
from .help import settings_of

ALWAYS = {"experiment", "schema", "base"}
RECORDS = ("jsonl", "parquet", "datasets")  # kinds of corpora with fields
PENALISED = ("relu", "gated", "jumprelu")
STREAM = ("model.", "corpus.", "extract.", "trainer.queue_batches")  # of a training: for its own capture
SUBMITIT = tuple(
    f"executor.{key}" for key in ("cluster", "partition", "account", "timeout_minutes", "memory_gb", "folder")
)
# setting to the variants that read it; what sae/options.py refuses elsewhere is left out
OF_VARIANTS = {
    "sae.multi_coef": ("topk",),
    "sae.k_anneal_share": ("topk", "batchtopk", "matryoshka"),
    "sae.l1_coef": ("relu", "gated"),
    "sae.l0_coef": ("jumprelu",),
    "sae.sparsity_warmup_share": PENALISED,
    "sae.threshold_start": ("jumprelu",),
    "sae.bandwidth": ("jumprelu",),
}


def warnings(name: str, keys: Sequence[str], config: Config) -> list[str]:
    """A line for the settings that the command never reads, and one for each other setting that shuts some out.

    `keys`: what was typed, without values; a bare group is a file of conf/.
    """
    command = COMMANDS[name]
    read = set(settings_of(name, every_setting()))
    if command.keeps_run:
        read |= {"run_dir", "resume"}
    never = [
        key
        for key in keys
        if key not in read and key not in command.groups and key not in ALWAYS and not key.startswith("hydra.")
    ]
    found = [f"`ggscope {name}` does not read {', '.join(never)}"] if never else []
    rest = [key for key in keys if key not in never]
    for why, shut_out in conditions(name, config):
        ignored = [key for key in rest if f"{key}=".startswith(shut_out) or f"{key}." in shut_out]
        found += [f"with {why} `ggscope {name}` does not read {', '.join(ignored)}"] if ignored else []
    return found


def every_setting() -> list[str]:
    """`group.item` of all there are."""
    groups = {group.name: getattr(Config(), group.name) for group in fields(Config)}
    return [f"{name}.{item.name}" for name, node in groups.items() if is_dataclass(node) for item in fields(node)]


def conditions(name: str, config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(setting, the beginnings of those that are not read beside it)."""
    groups = COMMANDS[name].groups
    if name == "train":
        yield from of_source(config)
    if "trainer" in groups:
        yield from of_training(config)
    if "corpus" in groups and (name != "train" or config.trainer.source == "stream"):
        yield from of_corpus(config)
    if "executor" in groups:
        yield from of_executor(config)
    if name == "apply":
        kind = config.intervention.kind
        if kind == "none":
            yield (
                "intervention=none",
                tuple(f"intervention.{key}" for key in ("coeff", "value", "phase", "positions", "token_range", "hook")),
            )
        elif kind != "steer":
            yield f"intervention={kind}", ("intervention.coeff",)
        if kind not in ("none", "clamp"):
            yield f"intervention={kind}", ("intervention.value",)
    if "evaluate" in groups and not config.evaluate.probe:
        yield "evaluate.probe empty", ("evaluate.probe_",)
    if name == "evaluate" and not config.evaluate.baselines:
        yield "evaluate.baselines=false", ("store.",)
    if name == "convert" and config.convert.source:
        yield "convert.source", ("sae.path",)
    if "convert" in groups and config.convert.latent < 0:
        yield "convert.latent=-1", ("convert.coeff",)


def of_source(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where a training's rows come from."""
    if config.trainer.source == "store":
        yield "trainer.source=store", (*STREAM, *WRITING)
    else:
        yield "trainer.source=stream", ("store.path",)


def of_training(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the kind of SAE, the optimizer and the search leave unused."""
    sae, trainer = config.sae, config.trainer
    variants = config.together.variant or [sae.variant]
    named = "together.variant" if config.together.variant else f"sae.variant={sae.variant}"
    yield named, tuple(key for key, by in OF_VARIANTS.items() if not set(by) & set(variants))
    if set(variants) <= set(WITHOUT_K):
        yield named, ("sae.k=", "together.k=", "trainer.auxk_")
    if sae.kind == "sae":
        yield "sae.kind=sae", ("sae.inputs", "sae.outputs", "sae.skip")
    else:
        yield f"sae.kind={sae.kind}", ("hook.",)
    if trainer.optimizer == "adam":
        yield "trainer.optimizer=adam", ("trainer.momentum",)
    if trainer.lr_search:
        yield "trainer.lr_search", ("trainer.lr=",)
    else:
        yield "trainer.lr_search empty", ("trainer.lr_search_share",)
    for key in ("num_latents", "k", "variant", "seed"):
        if getattr(config.together, key):
            yield f"together.{key}", (f"sae.{key}=",)
    if config.together.lr:
        yield "together.lr", ("trainer.lr=",)


def of_corpus(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the kind of corpus has no use for."""
    kind = config.corpus.kind
    if kind != "datasets":
        yield f"corpus.kind={kind}", ("corpus.dataset",)
    if kind != "tokens":
        yield f"corpus.kind={kind}", ("corpus.token_dtype",)
    if kind not in RECORDS:
        yield f"corpus.kind={kind}", ("corpus.text_key", "corpus.messages_key", "corpus.filter")
    if not config.corpus.generate_tokens:
        yield "corpus.generate_tokens=0", ("corpus.generate_temperature",)


def of_executor(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the executor has no use for."""
    kind = config.executor.kind
    if kind == "local":
        yield "executor=local", ("executor.workers", "executor.threads", "executor.gpus", "executor.retries")
    if kind != "ray":
        yield f"executor={kind}", ("executor.address",)
    if kind != "submitit":
        yield f"executor={kind}", SUBMITIT

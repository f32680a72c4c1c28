"""What `ggscope evaluate` does beyond one SAE: several spliced together, a second one to compare with, labelled texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.errors import ConfigError
from sae.weights import SAEWeights

from ..evaluation.joint import Further, hooks_of
from ..evaluation.optional import needed
from ..evaluation.probing import SETTING, Labelled, Pooled, pool, probe, read_labelled
from ..evaluation.stability import check_same_kind, seed_stability
from ..llama.model import Model
from ..run import RunContext, file_sha256
from .inputs import check_one_point, load_sae, number, outlier_norm, sae_sha256, session_options


@dataclass(frozen=True, kw_only=True, slots=True)
class Extras:
    """The further inputs of the settings, read and checked before the model runs."""

    also: list[Further]
    against: SAEWeights | None = None
    labelled: Labelled | None = None


def open_extras(context: RunContext, weights: SAEWeights) -> Extras:
    """ConfigError for what cannot be used, and where a package is missing that will be needed."""
    config = context.config.evaluate
    also = []
    for i, name in enumerate(config.also):
        path = Path(name).expanduser()
        other = load_sae(path)
        check_one_point(other, path)
        context.add_input(f"also_{i}", path, sae_sha256(path))
        also.append(Further(weights=other, outlier_norm=outlier_norm(other)))
    hooks_of(weights, also)
    against = labelled = None
    if config.against:
        needed("scipy.optimize", "evaluate.against")
        path = Path(config.against).expanduser()
        against = load_sae(path)
        check_one_point(against, path)
        check_same_kind(weights, against)
        warn_same_start(context, weights, against)
        context.add_input("against", path, sae_sha256(path))
    if config.probe:
        needed("sklearn.linear_model", SETTING)
        most, path = min(weights.num_latents, weights.d_in), Path(config.probe).expanduser()
        if max(config.probe_k) > most:
            raise ConfigError(
                f"evaluate.probe_k={config.probe_k}: expected at most {most}, this SAE has {weights.num_latents} latents of "
                f"width {weights.d_in}"
            )
        labelled = read_labelled(path, text_key=config.probe_text, label_key=config.probe_label)
        context.add_input("probe", path, file_sha256(path), texts=len(labelled.texts))
    return Extras(also=also, against=against, labelled=labelled)


def warn_same_start(context: RunContext, weights: SAEWeights, against: SAEWeights) -> None:
    """A line where both trainings drew the same initial weights: what they share is that, not what the rows say."""
    seeds = [sae.training.get("config", {}).get("seed") for sae in (weights, against)]
    if seeds[0] is not None and seeds[0] == seeds[1]:
        context.console.print(
            f"warning: evaluate.against: both SAEs started from the same weights (sae.seed={seeds[0]}), so much of what they "
            "share is the start; train the other one with another sae.seed",
            style="yellow", highlight=False,
        )  # fmt: skip


def pool_texts(context: RunContext, model: Model, weights: SAEWeights, extras: Extras) -> Pooled:
    assert extras.labelled is not None
    with context.progress("reading the texts to probe", 0) as progress:
        return pool(
            model, weights, extras.labelled.texts,
            context_tokens=context.config.corpus.context_tokens,
            outlier_norm=outlier_norm(weights),
            session=session_options(context.config.model),
            progress=progress,
        )  # fmt: skip


def measure_extras(context: RunContext, weights: SAEWeights, extras: Extras, pooled: Pooled | None) -> dict[str, Any]:
    """`stability` and `probing`, where they are asked for. The model is not needed any more."""
    config = context.config.evaluate
    found: dict[str, Any] = {}
    if extras.against is not None:
        found["stability"] = seed_stability(weights, extras.against)
    if extras.labelled is not None and pooled is not None:
        found["probing"] = probe(
            pooled, extras.labelled.labels, weights.num_latents,
            ks=sorted(set(config.probe_k)), test_share=config.probe_test_share, seed=config.seed,
        )  # fmt: skip
    return found


def numbers_of_extras(result: dict[str, Any]) -> list[str]:
    """What is said of them in the line of numbers."""
    said = []
    if joint := result.get("joint"):
        said.append(
            f"{len(joint['hooks'])} SAEs together: CE recovered {number(joint['ce_recovered'])} "
            f"{interval(joint['ce_recovered_ci95'])}, delta CE {number(joint['delta_ce_nats'])} nats "
            f"{interval(joint['delta_ce_ci95'])}"
        )
    if stability := result.get("stability"):
        said.append(
            f"{stability['shared']:.1%} of the latents shared, matched cosine {number(stability['decoder']['mean'])}"
        )
    if probing := result.get("probing"):
        best = probing["ks"][-1]
        said.append(
            f"probe accuracy {number(probing[f'sae_top_{best}']['accuracy'])} with {best} latents, "
            f"{number(probing['dense']['accuracy'])} dense, {number(probing['majority']['accuracy'])} majority"
        )
    return said


def interval(bounds: Sequence[float | None]) -> str:
    """A 95 % interval as people read it."""
    low, high = bounds
    return f"[{number(low)}, {number(high)}]"

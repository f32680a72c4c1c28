"""SAEs at work inside the running model: opening several of them, and the interventions that the settings name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sae.encoders import Encoder
from sae.errors import ConfigError, StoreError
from sae.weights import SAEWeights

from ..config import InterventionConfig
from ..interventions.ablate import Ablate
from ..interventions.base import Intervention, Sequences, Where
from ..interventions.clamp import Clamp
from ..interventions.heads import AblateHeads, named_heads
from ..interventions.inputs import output_point
from ..interventions.replace import Reconstruct
from ..interventions.steer import Steer
from ..lenses.patching import HEADS_SITE
from ..llama.hooks import HookPoint
from ..llama.identity import check_same_model
from ..llama.model import Model
from ..llama.placement import device_at
from ..ranges import CHOICES
from ..readout import ReadoutEvent
from ..run import RunContext
from .inputs import (
    check_host,
    check_one_point,
    load_sae,
    relative,
    sae_sha256,
    store_place,
    store_sha256,
    threads,
)
from .sae_files import located

KINDS = CHOICES["intervention.kind"]
NUMBER_OF = {"steer": "coeff", "clamp": "value"}
LONGEST = 1 << 20  # positions
NAMED = 4  # positions in a warning


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveSAE:
    """An SAE and what computes its latents (None: numpy)."""

    path: Path
    weights: SAEWeights
    encoder: Encoder | None


@dataclass(slots=True)
class LiveSAEs:
    """The SAEs of a run by the path that named them, each opened once."""

    context: RunContext
    model: Model
    own: Path | None  # what "" stands for
    _open: dict[str, LiveSAE] = field(default_factory=dict)

    def get(self, name: str = "") -> LiveSAE:
        """The SAE of this path; "": the run's own."""
        if name not in self._open:
            path = located(name) if name else self.own
            if path is None:
                raise ConfigError(
                    "no SAE is read here (sae.path=none); latents need one: name it with sae.path or the edit's own sae"
                )
            same = next((sae for sae in self._open.values() if sae.path.resolve() == path.resolve()), None)
            self._open[name] = same or self._opened(path, first=not self._open)
        return self._open[name]

    def distinct(self) -> list[LiveSAE]:
        """Those opened so far, in that order; an SAE named in two ways is one."""
        return list({sae.path: sae for sae in self._open.values()}.values())

    def name_of(self, sae: LiveSAE) -> str:
        """Its hook point; with the file where another one is of the same."""
        place = place_of(sae.weights)
        alike = [other for other in self.distinct() if place_of(other.weights) == place]
        return place if len(alike) == 1 else f"{relative(sae.path)} at {place}"

    def _opened(self, path: Path, *, first: bool) -> LiveSAE:
        choice = self.context.config.apply.encoder
        weights = load_sae(path, stored=choice != "numpy")
        check_one_point(weights, path, transcoders=True)
        check_host(self.context, weights, self.model)
        label = "sae" if first else f"sae:{len({sae.path for sae in self._open.values()})}"
        self.context.add_input(label, path, sae_sha256(path))
        if choice == "numpy":  # before the import: a llama.cpp without these symbols can still be used
            return LiveSAE(path=path, weights=weights, encoder=None)
        from ..llama.encoder import open_encoder

        encoder = open_encoder(
            weights, choice, n_threads=threads(self.context.config.model.n_threads),
            device=device_at(self.model, HookPoint.parse(weights.hook)),
        )  # fmt: skip
        return LiveSAE(path=path, weights=weights if encoder else load_sae(path), encoder=encoder)


def points_of(weights: SAEWeights) -> dict[str, str]:
    """`hook` and, of a transcoder, `hook_out`."""
    return {"hook": weights.hook} | ({"hook_out": weights.hook_out} if weights.hook_out else {})


def place_of(weights: SAEWeights) -> str:
    return " -> ".join(points_of(weights).values())


def interventions(configs: Sequence[InterventionConfig], saes: LiveSAEs) -> list[list[Intervention]]:
    """What each of the settings names, in their order: one change, or one for each block whose heads are switched off.
    At one hook point each acts on the result of the one before."""
    return [intervention(config, saes) for config in configs if config.kind != "none"]


def said(config: InterventionConfig) -> str:
    """What the settings do, for people: `steer latent 123 by 150`."""
    if config.kind == "reconstruct":
        return "reconstruct" + (" and keep the error" if config.keep_error else "")
    if config.kind == "heads":
        named = ", ".join(config.heads)
        what = f"all heads but {named} of their blocks" if config.keep else f"{noun(config.heads)} {named}"
        return f"{what} at the mean" if config.mean else f"{what} off"
    word = {"steer": " by ", "clamp": " at "}.get(config.kind, "")
    numbers = numbers_of(config)
    far = word + ", ".join(f"{number:g}" for number in (numbers[:1] if len(set(numbers)) == 1 else numbers))
    latents = ", ".join(map(str, config.latents))
    return f"{config.kind} {'latent' if len(config.latents) == 1 else 'latents'} {latents}{far}"


def noun(heads: Sequence[str]) -> str:
    return "heads" if len(heads) > 1 or any(head.endswith("*") for head in heads) else "head"


def said_of(config: InterventionConfig, saes: LiveSAEs, read: Sequence[LiveSAE]) -> str:
    """... and of which SAE, where there are several or those `read` are others, and at which point, where it is not its own."""
    where = []
    if config.kind != "heads":
        sae = saes.get(config.sae)
        if len(saes.distinct()) > 1:
            where = [f"SAE of {saes.name_of(sae)}"]
        elif all(sae is not other for other in read):  # nothing else names it
            where = [f"SAE of {relative(sae.path)} at {place_of(sae.weights)}"]
    where += [f"edit at {config.hook}"] if config.hook else []
    return said(config) + (f" ({', '.join(where)})" if where else "")


def without_rows(where: Where, events: Sequence[ReadoutEvent]) -> str:
    """Why an intervention changed nothing of what was read: no row was where it acts. "" where there was one."""
    sequences, pos_N = Sequences(), np.arange(len(events))
    sequences.start(0, [event.flagged for event in events if event.phase == "prompt"])
    for event in events:
        if event.phase != "prompt":
            sequences.append(0, event.flagged)
    if where.covers(np.zeros_like(pos_N), pos_N, sequences).any():
        return ""
    phase = "" if where.phase == "all" else f" of the {where.phase}"
    if where.positions is None:
        return f"every row{phase} is the first one, BOS or a special token"
    named = ", ".join(map(str, where.positions[:NAMED])) + (", ..." if len(where.positions) > NAMED else "")
    return f"no row{phase} was at {named}; the positions were 0 to {len(events) - 1}"


def intervention(config: InterventionConfig, saes: LiveSAEs) -> list[Intervention]:
    """One of them. ConfigError for settings that do not fit its kind."""
    if config.kind not in KINDS:
        raise ConfigError(f"intervention.kind: expected one of {', '.join(KINDS)}, got {config.kind!r}")
    _check_settings(config)
    if config.kind == "heads":
        return list(heads_off(config, saes))
    return [of_latents(config, saes)]


def heads_off(config: InterventionConfig, saes: LiveSAEs) -> Iterable[AblateHeads]:
    """One change for each block that is named. BOS and special tokens too: no SAE speaks for leaving them alone."""
    counts = saes.model.graph.heads()
    by_block = named_heads(config.heads, counts)
    means = head_means(saes.context, "intervention.mean", config.mean, saes.model, by_block)
    for block, heads in by_block.items():
        yield AblateHeads(
            point=HookPoint.parse(f"blocks.{block}.{HEADS_SITE}"),
            where=Where(phase=config.phase, positions=positions_of(config), flagged=True),
            heads=others(block, heads, counts[block]) if config.keep else heads,
            count=counts[block],
            mean_D=None if means is None else means[block],
        )


def others(block: int, heads: Sequence[int], count: int) -> tuple[int, ...]:
    """The heads of a block that are not named. ConfigError where there are none."""
    if len(heads) == count:
        raise ConfigError(
            f"intervention.keep=true keeps all {count} heads of block {block}: nothing would be switched off"
        )
    return tuple(head for head in range(count) if head not in heads)


def head_means(
    context: RunContext, setting: str, place: str, model: Model, blocks: Iterable[int]
) -> dict[int, np.ndarray] | None:
    """Mean row of `attn.hook_z` of each block, (D,) float32, by a store of this model; None without a store."""
    if not place:
        return None
    from ..store.reader import ActivationStore

    try:
        store = ActivationStore(store_place(place))
    except StoreError as error:
        said = str(error).replace(", or set store.path", f" 'hook.points=[blocks.*.{HEADS_SITE}]'")
        raise StoreError(f"{setting}: {said}") from None
    for warning in check_same_model(store.meta.model, model.id, what="this store"):
        context.console.print(f"warning: {warning}", style="yellow", highlight=False)
    hooks = {block: f"blocks.{block}.{HEADS_SITE}" for block in blocks}
    if missing := [hook for hook in hooks.values() if hook not in store.hooks]:
        raise ConfigError(
            f"the store holds {', '.join(store.hooks)}; expected {', '.join(missing)}: "
            f"ggscope extract 'hook.points=[blocks.*.{HEADS_SITE}]'"
        )
    stats = {block: store.stats(hook) for block, hook in hooks.items()}
    known = context.inputs.get("mean", {}).get("path") == str(store.path)  # of another edit
    if not (store.complete or known):
        rows, some = next(iter(stats.values())).count, f"{len(store.commits)} of {store.meta.n_shards} shards"
        context.console.print(
            f"warning: a mean of {rows:,} rows: the capture of {relative(store.path)} is not finished ({some})",
            style="yellow", highlight=False,
        )  # fmt: skip
    context.add_input("mean", store.path, store_sha256(store.path))
    return {block: found.mean_D.astype(np.float32) for block, found in stats.items()}


def of_latents(config: InterventionConfig, saes: LiveSAEs) -> Intervention:
    sae = saes.get(config.sae)
    point = HookPoint.parse(config.hook) if config.hook else output_point(sae.weights)
    where, latents = Where(phase=config.phase, positions=positions_of(config)), tuple(config.latents)
    w, encoder = sae.weights, sae.encoder
    if config.kind == "steer":
        return Steer(point=point, where=where, weights=w, latents=latents, coeffs=numbers_of(config))
    if config.kind == "clamp":
        values = numbers_of(config)
        return Clamp(point=point, where=where, weights=w, latents=latents, values=values, encoder=encoder)
    if config.kind == "ablate":
        return Ablate(point=point, where=where, weights=w, latents=latents, encoder=encoder)
    return Reconstruct(point=point, where=where, weights=w, keep_error=config.keep_error, encoder=encoder)


def numbers_of(config: InterventionConfig) -> tuple[float, ...]:
    """How far each latent is steered, or where it is clamped; () for the other kinds and where nothing is said."""
    one, each = {"steer": (config.coeff, config.coeffs), "clamp": (config.value, config.values)}.get(
        config.kind, (None, [])
    )
    return tuple(each) or (() if one is None else (one,) * len(config.latents))


def _check_settings(config: InterventionConfig) -> None:
    if config.kind != "heads" and (config.heads or config.keep or config.mean):
        raise ConfigError(f"intervention.heads, keep and mean are of intervention=heads, got {config.kind}")
    if config.kind == "heads":
        if config.sae or config.hook or config.latents:
            raise ConfigError("intervention=heads takes heads, no latents, sae or hook: intervention.heads=[L3H5]")
        if not config.heads:
            raise ConfigError("intervention=heads needs heads: intervention.heads=[L3H5], or [L3H*] for all of block 3")
    if config.keep_error and config.kind != "reconstruct":
        raise ConfigError(f"intervention.keep_error is of intervention=reconstruct, got {config.kind}")
    if config.kind == "reconstruct" and config.latents:
        raise ConfigError("intervention=reconstruct takes no latents: it replaces whole rows")
    if config.kind not in ("reconstruct", "heads") and not config.latents:
        raise ConfigError(f"intervention={config.kind} needs latents: intervention.latents=[123]")
    for name, kind in (("coeffs", "steer"), ("values", "clamp")):
        given = getattr(config, name)
        if given and (config.kind != kind or len(given) != len(config.latents)):
            raise ConfigError(
                f"intervention.{name}: expected one for each of {len(config.latents)} latents, of intervention={kind}; "
                f"got {given} for {config.kind}"
            )
    if config.kind in NUMBER_OF and not numbers_of(config):
        key = NUMBER_OF[config.kind]
        raise ConfigError(
            f"{config.kind} of latents {config.latents} needs a number: intervention.{key}=8, or {key}:8 in "
            f"apply.interventions{' (0 is what ablate does)' if config.kind == 'clamp' else ''}"
        )
    for kind, name in NUMBER_OF.items():
        if getattr(config, name) is not None and config.kind != kind:
            raise ConfigError(f"intervention.{name} is of intervention={kind}, got {config.kind}")


def positions_of(config: InterventionConfig) -> tuple[int, ...] | None:
    """The positions named one by one or as a range, None for all."""
    if config.token_range:
        if len(config.token_range) != 2 or config.positions or config.token_range[0] > config.token_range[1]:
            raise ConfigError(
                f"intervention.token_range: expected [first,last] and no positions, got {config.token_range}"
            )
        if config.token_range[1] >= LONGEST:
            raise ConfigError(f"intervention.token_range: positions end at {LONGEST - 1}, got {config.token_range}")
        return tuple(range(config.token_range[0], config.token_range[1] + 1))
    return tuple(config.positions) or None

"""`ggscope apply`: generate with the strongest latents of every token; steer, clamp or ablate on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from sae.encoders import Encoder
from sae.errors import ConfigError
from sae.weights import SAEWeights

from ..config import ApplyConfig, InterventionConfig
from ..generate import generate
from ..interventions.ablate import Ablate
from ..interventions.base import Intervention, Where
from ..interventions.clamp import Clamp
from ..interventions.steer import Steer
from ..lenses.patching import prompt_tokens
from ..llama.hooks import HookPoint
from ..llama.model import Model
from ..llama.session import Session
from ..readout import Reader, ReadoutEvent
from ..run import RunContext
from .inputs import (
    check_host,
    context_tokens,
    describe_model,
    encoder_for,
    open_model,
    open_sae,
    relative,
    session_options,
)

LONGEST = 1 << 20  # positions
READOUT_NAME = "readout.jsonl"
KINDS = ("none", "steer", "clamp", "ablate")


def run(context: RunContext) -> None:
    config = context.config.apply
    if not config.prompt:
        raise ConfigError("expected a prompt: --prompt TEXT, --prompt-file FILE, or - for standard input")
    path, weights = open_sae(context)
    with open_model(context) as model:
        check_host(context, weights, model)
        tokens = tokens_of(model, config)
        n_ctx = context_tokens(context, model, len(tokens) + config.max_tokens)
        session = Session(model, n_ctx=n_ctx, **session_options(context.config.model))
        encoder = encoder_for(context, path, weights, model)
        chosen = interventions(context.config.intervention, weights, encoder)
        reader = Reader(weights, top=config.top_latents, encoder=encoder)
        stream = generate(
            session, model, tokens, interventions=chosen, readers=[reader],
            max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed,
        )  # fmt: skip
        events = show(
            stream,
            context.folder / READOUT_NAME,
            as_json=config.format == "jsonl",
            top=config.top_latents,
            bos=model.bos,
            labels=weights.labels,
        )
        session.close()
        given = f"{describe_model(model)} and {relative(path)} at {weights.hook}"
    made = [e for e in events if e.phase == "response"]
    read = [e for e in events if e.fvu is not None]
    l0 = float(np.mean([e.l0 or 0 for e in read])) if read else float("nan")
    fvu = float(np.mean([e.fvu or 0.0 for e in read])) if read else float("nan")
    context.metrics = {"prompt_tokens": len(events) - len(made), "tokens": len(made), "l0": l0, "fvu": fvu}
    context.metrics["text"] = "".join(e.text for e in made)
    context.metrics["encoder"] = reader.encoder.name
    context.outputs["readout"] = str(context.folder / READOUT_NAME)
    context.three_lines(
        given,
        f"{len(made)} tokens generated after {len(events) - len(made)}, mean L0 {l0:.1f}, mean token FVU {fvu:.4f}",
        relative(context.folder / READOUT_NAME),
        stderr=config.format == "jsonl",
    )


def tokens_of(model: Model, config: ApplyConfig) -> np.ndarray:
    """The prompt's tokens, through the model's chat template where asked for."""
    if not config.chat:
        return prompt_tokens(model, config.prompt)
    text = model.chat([{"role": "user", "content": config.prompt}])
    tokens = model.tokenize(text.encode(), parse_special=True)
    if model.add_bos and model.bos is not None and (not len(tokens) or tokens[0] != model.bos):
        tokens = np.concatenate([[model.bos], tokens]).astype(np.int32)
    return tokens


def interventions(
    config: InterventionConfig, weights: SAEWeights, encoder: Encoder | None = None
) -> list[Intervention]:
    """The intervention that the settings name, or none."""
    if config.kind not in KINDS:
        raise ConfigError(f"intervention.kind: expected one of {', '.join(KINDS)}, got {config.kind!r}")
    if config.kind == "none":
        return []
    if not config.latents:
        raise ConfigError(f"intervention={config.kind} needs latents: intervention.latents=[123]")
    point = HookPoint.parse(config.hook or weights.hook)
    where = Where(phase=config.phase, positions=positions_of(config))
    latents = tuple(config.latents)
    if config.kind == "steer":
        coeffs = (config.coeff,) * len(latents)
        return [Steer(point=point, where=where, weights=weights, latents=latents, coeffs=coeffs)]
    if config.kind == "clamp":
        values = (config.value,) * len(latents)
        return [Clamp(point=point, where=where, weights=weights, latents=latents, values=values, encoder=encoder)]
    return [Ablate(point=point, where=where, weights=weights, latents=latents, encoder=encoder)]


def positions_of(config: InterventionConfig) -> tuple[int, ...] | None:
    if config.token_range:
        if len(config.token_range) != 2 or config.positions or config.token_range[0] > config.token_range[1]:
            raise ConfigError(
                f"intervention.token_range: expected [first,last] and no positions, got {config.token_range}"
            )
        if config.token_range[1] >= LONGEST:
            raise ConfigError(f"intervention.token_range: positions end at {LONGEST - 1}, got {config.token_range}")
        return tuple(range(config.token_range[0], config.token_range[1] + 1))
    return tuple(config.positions) or None


def show(
    stream: object, path: Path, *, as_json: bool, top: int, bos: int | None, labels: Mapping[int, str]
) -> list[ReadoutEvent]:
    """Print every event as it comes and keep it in `path` (JSONL), with the labels of its latents where there are any."""
    out = Console(highlight=False, soft_wrap=True)
    events: list[ReadoutEvent] = []
    if not as_json:
        out.print(f"[bold]{'pos':>4} {'token':<18} {'L0':>3} {'FVU':>6} {'logprob':>8}  latents: activation[/bold]")
    with open(path, "w", encoding="utf-8") as file:
        for event in stream:  # type: ignore[attr-defined]
            events.append(event)
            text = with_labels(event, labels) if labels else event.to_json()
            file.write(text + "\n")
            if as_json:
                out.print(text, markup=False)
            else:
                out.print(line(event, top, labels))
    if not as_json:
        prompt = "".join(e.text for e in events if e.phase == "prompt" and not (e.pos == 0 and e.token == bos))
        made = "".join(e.text for e in events if e.phase == "response")
        out.print(f"\n{escape(prompt)}[bold green]{escape(made)}[/bold green]\n")
    return events


def with_labels(event: ReadoutEvent, labels: Mapping[int, str]) -> str:
    """The event as a line of JSON, with `labels`: {latent: label} of those it lists that have one."""
    named = {str(latent): labels[latent] for latent, _ in event.latents if latent in labels}
    return json.dumps(event.to_dict() | {"labels": named}, ensure_ascii=False)


def line(event: ReadoutEvent, top: int, labels: Mapping[int, str]) -> str:
    """One token as the terminal shows it."""
    text = escape(repr(event.text)[1:-1][:18].ljust(18))
    style = "green" if event.phase == "response" else "cyan"
    logprob = "" if event.logprob is None else f"{event.logprob:.3f}"
    start = f"{event.pos:>4} [{style}]{text}[/{style}]"
    if event.fvu is None or event.l0 is None:
        return f"{start} {'-':>3} {'-':>6} {logprob:>8}  (not read: BOS or special)"
    latents = "  ".join(f"{named(latent, labels)}: {activation:.2f}" for latent, activation in event.latents[:top])
    return f"{start} {event.l0:>3} {event.fvu:>6.3f} {logprob:>8}  {latents}"


def named(latent: int, labels: Mapping[int, str]) -> str:
    """`123`, or `123 (its label)`."""
    return f"{latent} ({escape(labels[latent])})" if latent in labels else str(latent)

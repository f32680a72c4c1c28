"""`ggscope apply`: generate with the strongest latents of every token; steer, clamp or ablate on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from sae.errors import ConfigError, SAEError

from ..config import ApplyConfig, Config
from ..generate import generate
from ..lenses.patching import prompt_tokens
from ..llama.model import Model
from ..llama.session import Session
from ..readout import Reader, ReadoutEvent
from ..run import RunContext
from .inputs import check_prompt, context_tokens, describe_model, open_model, relative, sae_path, session_options
from .live import LiveSAE, LiveSAEs, interventions, place_of, points_of, said_of, without_rows

READOUT_NAME = "readout.jsonl"
NO_SAE = "none"  # as sae.path


def run(context: RunContext) -> None:
    config = context.config.apply
    check_prompt(config.prompt)
    own = own_sae(context)
    with open_model(context) as model:
        saes = LiveSAEs(context, model, own)
        read = opened(saes, context.config)
        tokens = tokens_of(model, config)
        n_ctx = context_tokens(context, model, len(tokens) + config.max_tokens)
        session = Session(model, n_ctx=n_ctx, **session_options(context.config.model))
        chosen = interventions([context.config.intervention, *config.interventions], saes)
        edited = [one for some in chosen for one in some]
        readers = [Reader(sae.weights, top=config.top_latents, encoder=sae.encoder) for sae in read]
        stream = generate(
            session, model, tokens, interventions=edited, readers=readers,
            max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed,
        )  # fmt: skip
        events = show(
            stream,
            context.folder / READOUT_NAME,
            as_json=config.format == "jsonl",
            top=config.top_latents,
            bos=model.bos,
            labels=[sae.weights.labels for sae in read],
        )
        session.close()
        places = ", ".join(f"{relative(sae.path)} at {place_of(sae.weights)}" for sae in read)
        edits = [
            said_of(c, saes, read) for c in (context.config.intervention, *config.interventions) if c.kind != "none"
        ]
        given = "; ".join([describe_model(model) + (f" and {places}" if places else ""), *edits])
    for edit, some in zip(edits, chosen, strict=True):
        if why := without_rows(some[0].where, events):
            context.console.print(f"warning: {edit} changed nothing: {why}", style="yellow", highlight=False)
    made = [e for e in events if e.phase == "response"]
    context.metrics = {"prompt_tokens": len(events) - len(made), "tokens": len(made)}
    if readers:
        context.metrics |= means(events, 0) | {"encoder": readers[0].encoder.name}
    context.metrics["also"] = [points_of(r.weights) | means(events, i) for i, r in enumerate(readers) if i]
    measured = [
        (f"{saes.name_of(sae)}: " if len(read) > 1 else "")
        + f"mean L0 {found['l0']:.1f}, mean token FVU {found['fvu']:.4f}"
        for sae, found in zip(read, (context.metrics, *context.metrics["also"]), strict=False)
    ]
    context.metrics["text"] = "".join(e.text for e in made)
    context.metrics["interventions"] = [one.key() for one in edited]
    context.outputs["readout"] = str(context.folder / READOUT_NAME)
    context.three_lines(
        given,
        ", ".join([f"{len(made)} tokens generated after {len(events) - len(made)}", *measured[:1]])
        + "".join(f"; {one}" for one in measured[1:]),
        relative(context.folder / READOUT_NAME),
        stderr=config.format == "jsonl",
    )


def own_sae(context: RunContext) -> Path | None:
    """What `sae.path` names, or the newest trained. None for `none`; also where there is none to be had and none is needed."""
    path = context.config.sae.path
    if path == NO_SAE:
        return None
    try:
        return sae_path(context)
    except ConfigError:
        if path or needs_own(context.config):
            raise
        return None


def needs_own(config: Config) -> bool:
    """Whether something is asked for that an SAE must do, and none is named for it."""
    edits = [one for one in (config.intervention, *config.apply.interventions) if one.kind != "none"]
    return not (edits or config.apply.also) or any(one.kind != "heads" and not one.sae for one in edits)


def opened(saes: LiveSAEs, config: Config) -> list[LiveSAE]:
    """The SAEs to read. One that nobody named or needs is left out where it cannot be used, with a word."""
    own = []
    if saes.own is not None:
        try:
            own = [saes.get()]
        except SAEError as error:
            if config.sae.path or needs_own(config):
                raise
            saes.own = None
            say = saes.context.console.print
            say(f"warning: {saes.context.command} reads no SAE: {error}", style="yellow", highlight=False)
    return own + [saes.get(name) for name in config.apply.also]


def means(events: list[ReadoutEvent], reader: int) -> dict[str, float]:
    """Mean L0 and token FVU of one reader over the tokens it read; NaN where there are none."""
    read = [event.readings[reader] for event in events if event.readings]
    if not read:
        return {"l0": float("nan"), "fvu": float("nan")}
    return {"l0": float(np.mean([r.l0 for r in read])), "fvu": float(np.mean([r.fvu for r in read]))}


def tokens_of(model: Model, config: ApplyConfig) -> np.ndarray:
    """The prompt's tokens, through the model's chat template where asked for."""
    if not config.chat:
        return prompt_tokens(model, config.prompt)
    text = model.chat([{"role": "user", "content": config.prompt}])
    tokens = model.tokenize(text.encode(), parse_special=True)
    if model.add_bos and model.bos is not None and (not len(tokens) or tokens[0] != model.bos):
        tokens = np.concatenate([[model.bos], tokens]).astype(np.int32)
    return tokens


def show(
    stream: object, path: Path, *, as_json: bool, top: int, bos: int | None, labels: Sequence[Mapping[int, str]]
) -> list[ReadoutEvent]:
    """Print every event as it comes and keep it in `path` (JSONL), with the labels of each SAE's latents where there are any."""
    out = Console(highlight=False, soft_wrap=True)
    events: list[ReadoutEvent] = []
    columns = (f"{'L0':>3} {'FVU':>6} ", "  latents: activation") if labels else ("", "")
    head = f"[bold]{'pos':>4} {'token':<18} {columns[0]}{'logprob':>8}{columns[1]}[/bold]"
    with open(path, "w", encoding="utf-8") as file:
        for event in stream:  # type: ignore[attr-defined]
            events.append(event)
            text = with_labels(event, labels) if any(labels) else event.to_json()
            file.write(text + "\n")
            if as_json:
                out.print(text, markup=False)
            else:
                if len(events) == 1:  # not before: what is refused is refused before the first event
                    out.print(head)
                out.print(line(event, top, labels[0] if labels else None))
                for reading, own in zip(event.readings[1:], labels[1:], strict=False):
                    found = strongest(reading.latents, top, own)
                    at = " -> ".join(filter(None, (reading.hook, reading.hook_out)))
                    out.print(f"{'':>4} {at} {reading.l0} {reading.fvu:.3f}  {found}")
    if not as_json:
        prompt = "".join(e.text for e in events if e.phase == "prompt" and not (e.pos == 0 and e.token == bos))
        made = "".join(e.text for e in events if e.phase == "response")
        out.print(f"\n{escape(prompt)}[bold green]{escape(made)}[/bold green]\n")
    return events


def with_labels(event: ReadoutEvent, labels: Sequence[Mapping[int, str]]) -> str:
    """The event as a line of JSON, with `labels`: {latent: label} of those it lists that have one."""
    values = event.to_dict()
    for reading, own in zip(values["readings"], labels, strict=False):
        reading["labels"] = {str(latent): own[latent] for latent, _ in reading["latents"] if latent in own}
    first = values["readings"][0]["labels"] if values["readings"] else {}
    return json.dumps(values | {"labels": first}, ensure_ascii=False)


def line(event: ReadoutEvent, top: int, labels: Mapping[int, str] | None) -> str:
    """One token as the terminal shows it; `labels`: None where no SAE is read."""
    text = escape(repr(event.text)[1:-1][:18].ljust(18))
    style = "green" if event.phase == "response" else "cyan"
    logprob = "" if event.logprob is None else f"{event.logprob:.3f}"
    start = f"{event.pos:>4} [{style}]{text}[/{style}]"
    if labels is None:
        return f"{start} {logprob:>8}"
    if event.fvu is None or event.l0 is None:
        why = "BOS or special" if event.pos else "first row of a window"
        return f"{start} {'-':>3} {'-':>6} {logprob:>8}  (not read: {why})"
    return f"{start} {event.l0:>3} {event.fvu:>6.3f} {logprob:>8}  {strongest(event.latents, top, labels)}"


def strongest(latents: tuple[tuple[int, float], ...], top: int, labels: Mapping[int, str]) -> str:
    return "  ".join(f"{named(latent, labels)}: {activation:.2f}" for latent, activation in latents[:top])


def named(latent: int, labels: Mapping[int, str]) -> str:
    """`123`, or `123 (its label)`."""
    return f"{latent} ({escape(labels[latent])})" if latent in labels else str(latent)

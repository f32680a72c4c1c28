"""One self-contained HTML page from ReportData: no script, no network (a content security policy says so)."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from importlib import resources

from pipeline.interventions.heads import head_name

from .data import Completion, Context, LatentCard, LensMap, NextTokenMap, ReportData, SteeringCurve, TrainingCurve
from .evaluation_section import density_figure, evaluation_section, tiles, verdict
from .markup import count, escape, number, percent, plain_visible, tokens_line, visible
from .svg import Axes, Series, line_chart, short, spark_bars

# Below this share of a latent's variance known from the current token it is said to read its surroundings.
CONTEXT_R2 = 0.5

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(data: ReportData) -> str:
    """The page. Every string of `data` is escaped on its way in."""
    style = resources.files("pipeline.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = [
        _header(data),
        tiles(data.evaluation),
        f'<div class="two wide"><div>{evaluation_section(data.evaluation)}</div><div>{_training(data.training)}</div></div>',
        _explanations(data),
        _evaluation_picture(data),
        _latents(data),
        _steering(data.steering, data.completions),
        _next_token(data),
        _lens(data.lens),
        _provenance(data),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(data.title)}</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(s for s in sections if s)
        + "\n</main></body></html>\n"
    )


def _header(data: ReportData) -> str:
    links = [("#latents", "Latents", data.latents), ("#steering", "Steering", data.steering or data.completions)]
    links += [("#next", "The next token", data.next_token)]
    links += [("#lens", "Logit lens", data.lens), ("#made", "How it was made", data.provenance or data.identity)]
    nav = "".join(f'<a href="{target}">{label}</a>' for target, label, there in links if there)
    lead = f'<p class="lead">{escape(data.summary)}</p><p class="lead">{escape(verdict(data.evaluation))}</p>'
    return f"<h1>{escape(data.title)}</h1>{lead}<nav>{nav}</nav>"


def _training(curve: TrainingCurve | None) -> str:
    if curve is None or not curve.tokens:
        return ""
    out = ["<h3>Training</h3>"]
    whole = (0.0, max(curve.tokens))  # both charts over the same tokens
    axes = Axes(x_label="tokens trained on", y_label="FVU", x_format=short, x_range=whole)
    fvu = Series(label="FVU", x=curve.tokens[curve.start :], y=curve.fvu[curve.start :])
    title = f"FVU of the training batches (lower is better){curve.left_out}"
    out.append(line_chart([fvu], axes, title=title))
    if curve.dead_share:
        axes = Axes(
            x_label="tokens trained on",
            y_label="dead share",
            x_format=short,
            y_format=lambda v: percent(v, 0),
            x_range=whole,
            y_range=(0.0, max(0.05, 1.1 * max(curve.dead_share))),
        )
        dead = Series(label="dead", x=curve.tokens, y=curve.dead_share, style="s2")
        window = f" for {short(curve.dead_after_tokens)} tokens" if curve.dead_after_tokens else " lately"
        out.append(line_chart([dead], axes, title=f"Latents that have not fired{window}"))
    return "".join(out)


def _explanations(data: ReportData) -> str:
    entries = [
        ("FVU", "down", "fraction of variance unexplained: squared reconstruction error over the variance of the "
         "activations. 0 is perfect, 1 is no better than always answering the mean."),
        ("L0", "", "how many latents describe one token on average."),
        ("Dead share", "down", "latents that fired on none of the held-out rows; they cost space and say nothing."),
        ("CE recovered", "up", "the model runs on the reconstruction instead of its own activations; 100 % means "
         "its prediction of the next token is as good as before, 0 % as bad as with the activations set to zero."),
        ("ΔCE", "down", "the same loss in nats per token, without dividing by anything: how much worse the next "
         "token is predicted. The bracket is a 95 % confidence interval."),
        ("KL", "down", "how far the whole predicted distribution moves, not only the probability of the true token; "
         "it also notices changes that happen to help."),
    ]  # fmt: skip
    words = {"down": "<b>Lower is better.</b> ", "up": "<b>Higher is better.</b> ", "": ""}
    items = "".join(f"<dt>{escape(name)}</dt><dd>{words[way]}{escape(text)}</dd>" for name, way, text in entries)
    figure = density_figure(data.evaluation)
    body = f"<div><h3>What the numbers mean</h3><dl>{items}</dl></div><div>{figure}</div>"
    return f'<div class="two">{body}</div>'


def _evaluation_picture(data: ReportData) -> str:
    if not data.evaluation_picture:
        return ""
    encoded = b64encode(data.evaluation_picture).decode("ascii")
    return f'<figure class="picture"><img src="data:image/png;base64,{encoded}" alt="The evaluation as a picture"></figure>'


def _latents(data: ReportData) -> str:
    if not data.latents:
        return ""
    context = [c for c in data.latents if c.token_r2 < CONTEXT_R2]
    token = [c for c in data.latents if c.token_r2 >= CONTEXT_R2]
    out = [
        '<h2 id="latents">Latents</h2>',
        f"<p>Chosen from {count(data.latent_rows)} rows searched (windows taken evenly from the documents): neither dead nor among the densest, half of them "
        "reading their surroundings. In each line the outlined token is where the latent fires most; colour is its "
        "activation there, hover for the value; · is a space, ↵ a line end. Rates and the strongest are of these rows. The lines of one latent come from "
        "different documents where there are enough.</p>",
        '<p class="note"><b>Promotes / demotes</b>: W_U (g ⊙ W_dec[f]), less its mean over the vocabulary: the change '
        "of the logits if the latent's direction reached the final norm (gain g) and the unembedding W_U directly, up "
        "to the norm's positive scale. Later blocks can change it. <b>Known from its token</b>: the share of "
        "the latent's variance that the average activation on that token predicts, each row predicted from the others "
        "(R², 0 % to 100 %). A <b>green mark</b> is what the syntax tree of the source says of the tokens where the "
        "latent fires at a third of its strongest or more; hover for how common that is.</p>",
    ]
    for name, cards in (("Latents that read their surroundings", context), ("Latents of particular tokens", token)):
        if cards:
            out += [f"<h3>{name}</h3>", *(_latent_card(card) for card in cards)]
    return "".join(out)


def _latent_card(card: LatentCard) -> str:
    every = 1 / card.density if card.density > 0 else 0.0
    rate = f"1 in {count(every) if every >= 10 else number(every, 1)}" if every else "nothing"
    tags = [
        f"fires on <b>{rate}</b>",
        f"known from its token <b>{percent(max(card.token_r2, 0.0), 0)}</b>",
        f'most often on <span class="tok">{visible(card.top_token)}</span> <b>{percent(card.top_token_share, 0)}</b>',
        f"strongest <b>{number(card.max_activation, 1)}</b>, median <b>{number(card.median_activation, 1)}</b>",
    ]
    head = f'<span class="label">{escape(card.label)}</span>' if card.label else ""
    if card.concept:
        base = percent(card.concept_base, 0)
        title = f"share of its strong firings, by the source's syntax tree; of all tokens {base} are"
        share = percent(card.concept_share, 0)
        head += f'<span class="concept" title="{escape(title)}">{share} {escape(card.concept)}</span>'
    head += "".join(f'<span class="tag">{tag}</span>' for tag in tags)
    spark = spark_bars(card.histogram, title=f"activations of latent {card.latent}, log counts")
    contexts = "".join(
        f'<li><span class="v">{c.values[c.peak]:.1f}</span>'
        f"<code>{tokens_line(c.pieces, c.values, card.max_activation, c.peak)}</code>"
        f'<cite title="{plain_visible(c.document)}">{_place(c)}</cite></li>'
        for c in card.contexts
    )
    return (
        f'<article class="latent" id="f{card.latent}"><header><div><strong>#{card.latent}</strong>{head}</div>'
        f"{spark}</header>"
        f"{_words('promotes', card.promoted)}{_words('demotes', card.demoted)}"
        f'<ol class="ctx">{contexts}</ol></article>'
    )


def _words(label: str, pieces: Sequence[tuple[str, float]]) -> str:
    if not pieces:
        return ""
    items = "".join(f'<span class="tok" title="{v:+.3g}">{visible(p)}</span>' for p, v in pieces)
    return f'<p class="words"><span>{label}</span>{items}</p>'


def _place(context: Context) -> str:
    if context.line > 0:
        return f"{visible(context.document)}:{context.line}"
    return visible(context.document) + (f" @{context.byte_offset}" if context.byte_offset >= 0 else "")


def _steering(curve: SteeringCurve | None, completions: Sequence[Completion]) -> str:
    if curve is None and not completions:
        return ""
    out = ['<h2 id="steering">Steering</h2>']
    if curve is not None:
        out += _curves(curve)
    for item in completions:
        out.append(
            f"<h3>The same prompt, coefficient {number(item.coeff, 1)}</h3>"
            f'<div class="two"><div><span class="note">plain</span>{_completion(item.prompt, item.plain)}</div>'
            f'<div><span class="note">steered</span>{_completion(item.prompt, item.steered)}</div></div>'
        )
    return "".join(out)


def _curves(curve: SteeringCurve) -> list[str]:
    promoted = "".join(f'<span class="tok">{visible(p)}</span>' for p in curve.promoted)
    chosen = f", the one of {curve.candidates} tried that moved them most" if curve.candidates > 1 else ""
    controls = f"{curve.controls} random directions of equal norm (mean)"
    guide = ((curve.max_activation, "strongest seen"),) if curve.max_activation > 0 else ()
    names = (f"latent {curve.latent}", controls)

    def chart(y_label: str, own: list[float], control: list[float], title: str) -> str:
        axes = Axes(x_label="coefficient (units of the activation a_f)", y_label=y_label, guides_x=guide)
        series = [
            Series(label=names[0], x=curve.coeffs, y=own, markers=True),
            Series(label=names[1], x=curve.coeffs, y=control, style="s3", markers=True),
        ]
        return line_chart(series, axes, title=title)

    return [
        f'<p>x′ = x + coefficient · W_dec[<a href="#f{curve.latent}">{curve.latent}</a>] at every token but the flagged '
        f"ones, on {count(curve.positions)} held-out tokens{chosen}. A latent that means something moves its promoted "
        "tokens up step by step; a random direction of the same length moves them far less, and alike both ways.</p>",
        f'<p class="words"><span>promoted</span>{promoted}</p><div class="two">',
        chart("mean log-probability, nats", curve.log_prob, curve.control_log_prob, "Promoted tokens: log-probability"),
        chart("KL, nats per token", curve.kl, curve.control_kl, "KL to the plain run: what the change costs"),
        "</div>",
    ]


def _completion(prompt: str, text: str) -> str:
    def lines(s: str) -> str:
        return escape("".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in s))

    return f'<div class="prompt"><span class="given">{lines(prompt)}</span>{lines(text)}</div>'


def _next_token(data: ReportData) -> str:
    found = data.next_token
    if found is None:
        return ""
    answer = f'<span class="tok">{visible(found.answer)}</span>'
    out = [
        '<h2 id="next">The next token</h2>',
        f"<p>After this prompt the likeliest next token is {answer}, with a probability of {percent(found.probability)}. Below, "
        "one latent or one attention head is switched off at a time (a latent: x′ = x − a_f W_dec[f], the SAE error stays; a head: "
        "what it writes is 0): the change of that token's log-probability in nats. Below 0, what was switched off speaks for "
        "the token. The model makes up for what is missing, so effects do not add up.</p>",
        _completion(found.prompt, ""),
        f'<div class="two"><div>{_effects(found, {card.latent for card in data.latents})}</div><div>{_heads(found)}</div></div>',
    ]
    return "".join(out)


def _effects(found: NextTokenMap, with_card: set[int]) -> str:
    if not found.latents:
        return "<p>No latent fires in this prompt.</p>"
    most = max(abs(one.effect) for one in found.latents) or 1.0
    rows = []
    for one in found.latents:
        name = f'<a href="#f{one.latent}">{one.latent}</a>' if one.latent in with_card else str(one.latent)
        label = f" {escape(one.label)}" if one.label else ""
        meter = f'<span class="meter"><i style="width:{100 * abs(one.effect) / most:.0f}%"></i></span>'
        other = visible(one.likeliest) if one.likeliest != found.answer else "–"
        rows.append(
            f'<tr><td>{name}{label}</td><td>{meter}<span class="beside">{one.effect:+.3f}</span></td><td>{one.kl:.3f}</td>'
            f'<td><span class="tok">{visible(one.token)}</span></td><td>{other}</td></tr>'
        )
    shown = f"The {len(rows)} of {count(found.active)} active latents with the largest effects"
    return (
        f'<h3>{shown}</h3><div class="scroll"><table class="eval"><thead><tr><th>latent off</th><th>change, nats</th><th>KL, nats</th>'
        f"<th>strongest on</th><th>then likeliest</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _heads(found: NextTokenMap) -> str:
    if not found.heads:
        return ""
    most = max((abs(v) for row in found.heads for v in row if v is not None), default=0.0) or 1.0
    head = "".join(f'<th scope="col">{number}</th>' for number in range(len(found.heads[0])))
    rows: list[str] = []
    for block, effects in zip(reversed(found.blocks), reversed(found.heads), strict=True):
        cells = "".join(
            "<td></td>"
            if v is None
            else f'<td class="{"up" if v > 0 else "down"}" style="--p:{abs(v) / most:.2f}" title="{head_name(block, h)}">{f"{v:+.2f}".replace("-0.00", "+0.00")}</td>'
            for h, v in enumerate(effects)
        )
        rows.append(f'<tr><th scope="row">block {block}</th>{cells}</tr>')
    return (
        '<h3>Attention heads off</h3><div class="scroll"><table class="lens effects"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _lens(lens: LensMap | None) -> str:
    if lens is None:
        return ""
    head = "".join(f'<th scope="col">{visible(t)}</th>' for t in lens.tokens)
    rows: list[str] = []
    for label, cells in zip(reversed(lens.row_labels), reversed(lens.cells), strict=True):
        tds = "".join(
            f'<td{" class=hi" if p > 0.55 else ""} style="--p:{p:.2f}" title="p = {p:.3f}">{visible(t)}</td>'
            for t, p in cells
        )
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{tds}</tr>')
    return (
        '<h2 id="lens">Logit lens</h2><p>What the model would predict next if it stopped after a block: the residual '
        "through the final norm and the unembedding. Columns are the prompt's tokens, the last block is on top; "
        "darker is more probable.</p>"
        f'<div class="scroll"><table class="lens"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _provenance(data: ReportData) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in [*data.identity, *data.provenance])
    return f'<h2 id="made">How it was made</h2><dl class="id">{rows}</dl>' if rows else ""

"""The evaluation on the page: tiles, the table beside the baselines, the density histogram."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .markup import count, escape, number, percent
from .svg import Axes, bar_chart

BASELINE_NAMES = {
    "pca": "PCA, k components",
    "linear": "a linear map of rank k",
    "affine": "a linear map of any rank",
    "untrained": "SAE before training",
    "random_model": "SAE of a random-weights model",
    "mean": "the mean everywhere",
    "zero": "zeros everywhere",
}
SCALE = ("mean", "zero")  # not rivals: the ends of the scale


def tiles(evaluation: Mapping[str, Any]) -> str:
    """The six numbers of the first screen."""
    e = evaluation
    rows = f"on {count(e['rows'])} held-out rows" if e.get("rows") else "on held-out rows"
    entries = [
        ("CE recovered", percent(e.get("ce_recovered")), _share_interval(e.get("ce_recovered_ci95"))),
        ("ΔCE, nats per token", number(e.get("delta_ce_nats")), _interval(e.get("delta_ce_ci95"))),
        ("KL, nats per token", number(e.get("kl")), _interval(e.get("kl_ci95"))),
        ("FVU", number(e.get("fvu")), f"lower is better, {rows}"),
        ("Latents per token (L0)", number(e.get("l0"), 1), _of_latents(e)),
        ("Dead latents", percent(e.get("dead_share")), rows),
    ]
    cells = "".join(
        f'<div class="tile"><span>{escape(n)}</span><strong>{v}</strong><span>{escape(s)}</span></div>'
        for n, v, s in entries
    )
    return f'<div class="tiles">{cells}</div>'


def verdict(evaluation: Mapping[str, Any]) -> str:
    """One sentence: what running on the reconstruction costs, beside the best baseline."""
    own = evaluation.get("delta_ce_nats")
    if own is None:
        return ""
    text = f"Running on its reconstruction costs the model {number(own)} nats per token"
    rivals = {n: r["delta_ce_nats"] for n, r in evaluation.get("baselines", {}).items() if n not in SCALE}
    rivals = {n: cost for n, cost in rivals.items() if cost is not None}
    if rivals:
        best = min(rivals, key=lambda n: rivals[n])
        text += f"; the best baseline ({BASELINE_NAMES.get(best, best)}) costs {number(rivals[best])}"
    return text + "."


def evaluation_section(evaluation: Mapping[str, Any]) -> str:
    """The table: this SAE, the baselines, and the ends of the scale."""
    rows = [_row("This SAE", {**evaluation.get("same_rows", evaluation), **_spliced(evaluation)}, "own")]
    baselines: dict[str, Mapping[str, Any]] = dict(evaluation.get("baselines", {}))
    for name in [*(n for n in baselines if n not in SCALE), *(n for n in SCALE if n in baselines)]:
        rows.append(_row(BASELINE_NAMES.get(name, name), baselines[name], "scale" if name in SCALE else ""))
    heads = (
        ("FVU", "↓"), ("L0", ""), ("CE recovered", "↑"), ("ΔCE", "nats ↓"), ("KL", "nats ↓"),
    )  # fmt: skip
    head = "".join(f"<th>{n}<small>{way}&nbsp;</small></th>" for n, way in heads)
    return (
        "<h3>Is it any good?</h3>"
        f'<div class="scroll"><table class="eval"><thead><tr><th>the model runs on</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{_notes(evaluation)}"
    )


def _spliced(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {k: evaluation.get(k) for k in ("ce_recovered", "delta_ce_nats", "kl")}


def _row(name: str, values: Mapping[str, Any], style: str) -> str:
    recovered = values.get("ce_recovered")
    share = min(1.0, max(0.0, recovered)) if recovered is not None and math.isfinite(recovered) else 0.0
    meter = f'<span class="meter"><i style="width:{100 * share:.0f}%"></i></span>'
    cells = [
        number(values.get("fvu")),
        number(values.get("l0"), 1),
        f'{meter}<span class="beside">{percent(recovered)}</span>',
        number(values.get("delta_ce_nats")),
        number(values.get("kl")),
    ]
    return f'<tr class="{style}"><td>{escape(name)}</td>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'


def _notes(e: Mapping[str, Any]) -> str:
    parts: list[str] = []
    if e.get("splice_rows"):
        rows = (e.get("same_rows") or {}).get("rows")
        others = f"; FVU and L0 are over the {count(rows)} rows of the same windows" if rows else ""
        parts.append(
            f"CE recovered, ΔCE and KL are over the same {count(e['splice_rows'])} held-out tokens in every line "
            f"({e.get('clusters', '?')} {e.get('cluster_kind', 'cluster')}s){others}."
        )
    if e.get("ce_clean") is not None:
        parts.append(
            f"Cross entropy in nats per token: untouched model {number(e['ce_clean'])}, on the reconstruction "
            f"{number(e.get('ce_sae'))}, on the mean {number(e.get('ce_mean'))}, on zeros {number(e.get('ce_zero'))}. "
            f"CE recovered against the mean instead of zeros: {percent(e.get('ce_recovered_mean'))}."
        )
    if e.get("flagged_share") is not None:
        parts.append(
            f"{percent(e['flagged_share'], 2)} of the rows are flagged (BOS, special, first, outlier): they are left "
            "unchanged in every run and counted nowhere."
        )
    own = (e.get("random_model_own") or {}).get("fvu")
    if own is not None:
        parts.append(f"On the random model it was trained on, that SAE's FVU is {number(own)}.")
    return "".join(f'<p class="note">{escape(p)}</p>' for p in parts)


def density_figure(evaluation: Mapping[str, Any]) -> str:
    """How often latents fire: counts of latents over log10 of the share of rows."""
    histogram = evaluation.get("density_histogram")
    if not histogram:
        return ""
    axes = Axes(x_label="share of rows the latent fires on", y_label="latents", x_format=_power)
    figure = bar_chart(
        histogram["log10_edges"], histogram["counts"], axes, title="How often the latents fire (dead ones left out)"
    )
    return f"<h3>Density of the latents</h3>{figure}"


def _power(exponent: float) -> str:
    share = 100 * 10**exponent
    return f"{share:.3g} %" if share >= 1e-4 else f"1e{exponent:.3g}"


def _interval(interval: Any) -> str:
    if not interval or any(v is None or not math.isfinite(v) for v in interval):
        return "lower is better"
    return f"95 % in [{number(interval[0])}, {number(interval[1])}], lower is better"


def _share_interval(interval: Any) -> str:
    if not interval or any(v is None or not math.isfinite(v) for v in interval):
        return "higher is better"
    return f"95 % in [{percent(interval[0])}, {percent(interval[1])}], higher is better"


def _of_latents(e: Mapping[str, Any]) -> str:
    return f"of {count(e['num_latents'])} latents" if e.get("num_latents") else "on average"

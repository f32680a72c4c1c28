"""The page: escaped, self-contained, complete, and whole without parts of its data."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from pipeline.report.data import (
    Completion,
    Context,
    Effect,
    LatentCard,
    LensMap,
    NextTokenMap,
    ReportData,
    SteeringCurve,
    TrainingCurve,
)
from pipeline.report.html import render
from pipeline.report.markup import number, piece_text, plain_visible, tokens_line, visible
from pipeline.report.svg import Axes, Series, line_chart, nice_ticks

EVIL = "<script>alert(1)</script>"
EVIL_ATTRIBUTE = '" onmouseover="alert(2)'
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Elements with their attributes, the text, and whether every element is closed in order."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def card(latent, r2, text="return"):
    pieces = ["def", " f", "(", EVIL, ")", ":", "\n    ", text, "\u202e", "\x1b[31m"]
    context = Context(pieces=pieces, values=[0, 0, 0, 4.25, 0, 0, 1.5, 0, 0, 0], peak=3, document=EVIL, byte_offset=12)
    return LatentCard(
        latent=latent, density=0.002, max_activation=4.25, median_activation=1.0, token_r2=r2, top_token=EVIL,
        top_token_share=0.4, contexts=[context], promoted=[(EVIL, 1.0), (EVIL_ATTRIBUTE, 0.5)], demoted=[("\n", -1.0)],
        histogram=[5, 2, 0, 1], concept=EVIL, concept_share=0.9, concept_base=0.1, label=f"label {EVIL}",
    )  # fmt: skip


@pytest.fixture
def data():
    row = {"fvu": 0.5, "l0": 32.0, "ce_recovered": 0.25, "delta_ce_nats": 3.0, "kl": 3.5}
    return ReportData(
        title=f"SAE {EVIL}", summary=EVIL, identity=[(EVIL, EVIL_ATTRIBUTE)], provenance=[("seed", EVIL)],
        evaluation=row | {
            "fvu": 0.1234, "ce_recovered": 0.9712, "ce_recovered_ci95": [0.961, 0.982], "delta_ce_nats": 0.0456, "delta_ce_ci95": [0.03, 0.06],
            "kl_ci95": [None, None], "dead_share": 0.02, "rows": 123456, "num_latents": 4096, "flagged_share": 0.01,
            "ce_clean": 1.5, "ce_sae": 1.55, "ce_zero": 8.0, "ce_mean": math.nan, "splice_rows": 9, "clusters": 3,
            "cluster_kind": "document", "baselines": {"pca": row, EVIL: row, "zero": row | {"ce_recovered": None}},
            "density_histogram": {"log10_edges": [-3, -2, -1, 0], "counts": [1, 5, 2], "dead": 3},
            "random_model_own": {"fvu": 0.77},
        },
        training=TrainingCurve(tokens=[1e5, 2e5, 3e5], fvu=[0.5, math.nan, 0.2], dead_share=[0, 0.1, 0.05]),
        latents=[card(7, 0.1), card(9, 0.95)], latent_rows=1000,
        lens=LensMap(tokens=[EVIL, "b"], row_labels=["embedding", "block 0"], cells=[[(EVIL, 0.5), ("x", 0.1)]] * 2),
        next_token=NextTokenMap(
            prompt=EVIL, answer=EVIL_ATTRIBUTE, probability=0.5, active=40, blocks=[0, 3], heads=[[0.0, -0.0012], [0.25, None]],
            latents=[
                Effect(latent=7, label=EVIL, effect=-0.75, kl=0.25, likeliest=EVIL, token=EVIL_ATTRIBUTE),
                Effect(latent=8, label="", effect=0.5, kl=0.125, likeliest=EVIL_ATTRIBUTE, token="a"),
            ],
        ),
        completions=[Completion(prompt=EVIL, plain=f"a\n{EVIL}", steered="\x1b[2J<b>", coeff=3.0)],
        steering=SteeringCurve(
            latent=7, coeffs=[-1, 0, 1], promoted=[EVIL], log_prob=[-9, -8, -7], kl=[0.1, 0, 0.2],
            control_log_prob=[-8, -8, -8], control_kl=[0.1, 0, 0.1], max_activation=1.0, positions=10, candidates=4,
        ),
    )  # fmt: skip


def test_strings_of_the_corpus_and_the_model_show_as_text(data):
    page = Page(render(data))
    assert "script" not in page.tags
    assert not [a for a in page.attributes if a[1].startswith("on")]
    text = "".join(page.text)
    assert text.count("<script>alert(1)</script>") >= 12  # titles, tokens, documents, baselines, completions
    assert '" onmouseover="alert(2)' in text.replace("·", " ")


def test_the_page_needs_no_network_and_forbids_it(data):
    page = Page(render(data))
    assert not {"link", "img", "iframe", "object", "script"} & set(page.tags)
    links = [value for tag, name, value in page.attributes if name in ("href", "src", "srcset", "data")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "http" not in re.sub(r"http-equiv", "", render(data))
    policy = [v for t, n, v in page.attributes if n == "content" and "default-src" in v]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_picture_of_the_evaluation_lies_in_the_page_itself(data):
    png = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    page = render(dataclasses.replace(data, evaluation_picture=png))
    assert f'src="data:image/png;base64,{base64.b64encode(png).decode()}"' in page
    assert "<img" not in render(data)


def test_control_and_direction_characters_are_spelled_out(data):
    page = render(data)
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "\\x1b" in page
    assert "\\u202e" in page


def test_links_within_the_page_have_their_targets(data):
    page = Page(render(data))
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert {v[1:] for _, n, v in page.attributes if n == "href"} <= ids


def test_the_first_screen_has_the_numbers_and_the_baselines(data):
    text = "".join(Page(render(data)).text)
    before_latents = text[: text.index("Chosen from")]
    for expected in (
        "0.123",
        "97.1 %",
        "0.046",
        "95 % in [0.030, 0.060]",
        "95 % in [96.1 %, 98.2 %]",
        "PCA, k components",
        "2.0 %",
        "0.770",
    ):
        assert expected in before_latents
    assert "nan" not in text.lower().replace("nance", "")


def test_latents_are_grouped_by_what_the_current_token_explains(data):
    page = render(data)
    assert page.index("read their surroundings</h3>") < page.index('id="f7"')
    assert page.index("of particular tokens</h3>") < page.index('id="f9"')
    assert page.index('id="f7"') < page.index("of particular tokens</h3>")


def test_what_the_next_token_hangs_on(data):
    page = render(data)
    section = page[page.index('id="next"') : page.index('id="lens"')]
    assert '<a href="#f7">7</a>' in section  # has a card
    assert "<td>8</td>" in section
    for shown in ("-0.750", "+0.500", "0.125", "width:100%", "width:67%", "The 2 of 40 active latents"):
        assert shown in section
    heads = section[section.index("Attention heads off") :]
    assert heads.index("block 3") < heads.index("block 0")
    assert '<td class="up" style="--p:1.00" title="L3H0">+0.25</td><td></td>' in heads
    assert 'title="L0H1">+0.00</td>' in heads
    silent = dataclasses.replace(data.next_token, latents=[], active=0, heads=[], blocks=[])
    assert "No latent fires" in render(dataclasses.replace(data, next_token=silent))


def test_a_report_with_next_to_nothing_in_it_still_renders():
    page = Page(render(ReportData(title="t", summary="s", identity=[], evaluation={})))
    assert "–" in "".join(page.text)


def test_parts_can_be_missing_one_by_one(data):
    for name, empty in (
        ("training", None), ("latents", []), ("lens", None), ("next_token", None), ("completions", []), ("steering", None),
        ("training", TrainingCurve(tokens=[], fvu=[])),
    ):  # fmt: skip
        kept = dataclasses.replace(data, **{name: empty})
        if name == "latents":
            kept = dataclasses.replace(kept, steering=None)
        Page(render(kept))


def test_the_charts_of_the_training_cover_the_same_tokens_and_say_what_is_left_out(data):
    curve = TrainingCurve(
        tokens=[2048.0 * i for i in range(1, 101)], fvu=[1 / i for i in range(1, 101)], dead_share=[0.1] * 100
    )
    page = render(dataclasses.replace(data, training=curve))
    assert "FVU of the training batches (lower is better), the first 5 % left out" in page
    assert "left out" not in re.sub(r"dead ones left out|they are left", "", render(data))
    fvu, dead = (points.split() for points in re.findall(r'<polyline class="s[12]" points="([^"]+)"', page)[:2])
    assert (len(fvu), len(dead)) == (95, 100)
    assert [p.split(",")[0] for p in fvu] == [p.split(",")[0] for p in dead][5:]


def test_tokens_are_coloured_by_value_with_the_value_as_tooltip():
    line = tokens_line(["a", " b", "<"], [0.0, 2.0, 8.0], 8.0, peak=2)
    assert line == (
        'a<b style="--a:0.25" title="2.00"><i>·</i>b</b><b class="p" style="--a:1.00" title="8.00">&lt;</b>'
    )


def test_white_space_is_visible_and_bytes_are_escapes():
    assert visible("a b\n\t") == "a<i>·</i>b<i>↵</i><i>⇥</i>"
    assert piece_text(b"\xe2\x82") == "\\xe2\\x82"
    assert piece_text("ü".encode()) == "ü"
    assert plain_visible('a"\n') == "a&quot;\\n"
    assert number(-0.5) == "−0.500"
    assert number(float("nan")) == "–"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.7, 12.4), (0.1234, 0.1239), (0, 1.5e6), (-9, -8.2)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 11
    assert low - 1e-9 <= min(ticks)
    assert max(ticks) <= high + 1e-9 * (high - low)
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_lines_lie_where_their_values_say():
    chart = line_chart(
        [Series(label="a", x=[0, 1, 2], y=[0.0, 10.0, 5.0])], Axes(x_label="x", y_label="y", y_range=(0, 10)), title="t"
    )
    points = re.search(r'points="([^"]+)"', chart)
    assert points is not None
    xs, ys = zip(*[map(float, p.split(",")) for p in points[1].split()], strict=True)
    assert ys[1] < ys[2] < ys[0]
    assert ys[2] == pytest.approx((ys[0] + ys[1]) / 2, abs=0.1)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.1)
    assert 'class="none"' in line_chart(
        [Series(label="a", x=[0], y=[math.nan])], Axes(x_label="x", y_label="y"), title="t"
    )

"""An architecture whose structure is not understood: tensors by their ggml names, nothing else."""

from __future__ import annotations

import pytest

from pipeline.llama.hooks import HookPoint
from pipeline.llama.model import Model
from pipeline.llama.session import capture
from sae.errors import HookError, ShapeError
from tests.llama.support import BLOCKS, D, exact, hf_values, relative, sequences, tiny
from tests.tiny_llama import write_tiny_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.gguf"
    llama, weights = tiny()
    write_tiny_encoder(path, llama.path, weights)
    with Model(path) as model:
        yield model


def test_raw_names_with_a_wildcard_work_where_no_point_has_a_name(encoder):
    assert encoder.hook_points() == {}
    with exact(encoder, n_seq_max=1) as session:
        points = session.expand(["ggml:ffn_inp-*"])
        assert [str(point) for point in points] == [f"ggml:ffn_inp-{b}" for b in range(BLOCKS)]
        found = [capture(session, [tokens], points)[0] for tokens in sequences()]
    for mine, tokens in zip(found, sequences(), strict=True):
        theirs = hf_values(tiny()[1], tokens)
        # it looks ahead, llama does not: the same for the last token in the first block, and for a single token
        for b in range(BLOCKS) if len(tokens) == 1 else [0]:
            assert mine[f"ggml:ffn_inp-{b}"].shape == (len(tokens), D)
            assert relative(mine[f"ggml:ffn_inp-{b}"][-1], theirs[f"blocks.{b}.hook_resid_mid"][-1]) < 1e-5


def test_a_named_point_is_refused_and_the_way_out_is_named(encoder):
    with exact(encoder) as session:
        for text in ("blocks.*.hook_resid_post", "blocks.0.hook_resid_post"):
            with pytest.raises(HookError, match=r"no hook point.*ggml:NAME") as raised:
                session.graph.find(session.expand([text])[0])
            assert "\n" not in str(raised.value)
        with pytest.raises(HookError, match=r"no tensor 'l_out-0' .*ffn_inp-0\.\.3"):
            session.graph.find(HookPoint.parse("ggml:l_out-0"))


def test_a_text_longer_than_one_pass_is_refused_before_llama_would_abort(encoder):
    with exact(encoder, n_ubatch=16) as session, pytest.raises(ShapeError, match=r"expected 1 to 16 \(n_ubatch\)"):
        capture(session, [sequences()[0]], session.expand(["ggml:ffn_inp-0"]))

"""Ground truth about Python source, byte by byte, and which of it a latent agrees with.

A latent that fires only inside docstrings can be named without reading it: the syntax tree says where the
docstrings are. Documents that are not Python have no such properties.

N rows searched, F latents, C properties.
"""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.corpus.windows import WindowTable

from .firings import Firings

PROPERTIES = (
    "inside a docstring",
    "inside a string that is no docstring",
    "inside a comment",
    "inside a call's arguments",
    "in a def's signature",
    "in a class header",
    "in an import statement",
    "in a decorator",
    "inside a subscript",
    "in a dict display",
    "in a list, tuple or set display",
    "in a raise statement",
    "in a return statement",
    "in an assert statement",
    "in an except header",
    "in a for header",
    "in a with header",
    "in an if or while condition",
    "in a comparison",
    "in a number",
    "on an assignment's left side",
    "in a lambda or comprehension",
    "outside every def and class",
)
_INDEX = {name: i for i, name in enumerate(PROPERTIES)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """`share` of a latent's strong firings have the property; `base` of all rows do."""

    name: str
    share: float
    base: float


class _Marker(ast.NodeVisitor):
    """Fills marks_CB (property, byte) from a syntax tree; columns of ast are UTF-8 bytes."""

    def __init__(self, data: bytes) -> None:
        self.starts = np.cumsum([0, *map(len, data.splitlines(keepends=True))])
        self.marks_CB = np.zeros((len(PROPERTIES), len(data)), bool)
        self.marks_CB[_INDEX["outside every def and class"]] = True

    def start(self, node: ast.expr | ast.stmt | ast.excepthandler) -> int:
        return int(self.starts[node.lineno - 1]) + node.col_offset

    def stop(self, node: ast.expr | ast.stmt | ast.excepthandler) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return int(self.starts[node.end_lineno - 1]) + node.end_col_offset

    def mark(self, name: str, first: int, stop: int, *, value: bool = True) -> None:
        self.marks_CB[_INDEX[name], first:stop] = value

    def whole(self, name: str, node: ast.expr | ast.stmt) -> None:
        self.mark(name, self.start(node), self.stop(node))

    def generic_visit(self, node: ast.AST) -> None:
        self._statement(node)
        self._expression(node)
        super().generic_visit(node)

    def _statement(self, node: ast.AST) -> None:
        for kinds, name in _STATEMENTS:
            if isinstance(node, kinds):
                assert isinstance(node, ast.stmt)
                self.whole(name, node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            header = "in a class header" if isinstance(node, ast.ClassDef) else "in a def's signature"
            self.mark(header, self.start(node), self.start(node.body[0]))
            self.mark("outside every def and class", self.start(node), self.stop(node), value=False)
            for decorator in node.decorator_list:
                self.mark("in a decorator", self.start(decorator) - 1, self.stop(decorator))
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            self.mark("in a for header", self.start(node), self.stop(node.iter))
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            self.mark("in a with header", self.start(node), self.start(node.body[0]))
        elif isinstance(node, (ast.If, ast.While)):
            self.whole("in an if or while condition", node.test)
        elif isinstance(node, ast.ExceptHandler):
            self.mark("in an except header", self.start(node), self.start(node.body[0]))
        elif isinstance(node, ast.Assign):
            self.mark("on an assignment's left side", self.start(node), self.stop(node.targets[-1]))

    def _expression(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            self.mark("inside a call's arguments", self.stop(node.func), self.stop(node))
        elif isinstance(node, ast.Subscript):
            self.whole("inside a subscript", node.slice)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, complex):
            self.whole("in a number", node)
        for kinds, name in _EXPRESSIONS:
            if isinstance(node, kinds):
                assert isinstance(node, ast.expr)
                self.whole(name, node)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))):
            self.whole("inside a string that is no docstring", node)


_STATEMENTS: tuple[tuple[tuple[type[ast.AST], ...], str], ...] = (
    ((ast.Import, ast.ImportFrom), "in an import statement"),
    ((ast.Raise,), "in a raise statement"),
    ((ast.Return,), "in a return statement"),
    ((ast.Assert,), "in an assert statement"),
)
_EXPRESSIONS: tuple[tuple[tuple[type[ast.AST], ...], str], ...] = (
    ((ast.Dict,), "in a dict display"),
    ((ast.List, ast.Tuple, ast.Set), "in a list, tuple or set display"),
    ((ast.Compare,), "in a comparison"),
    ((ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), "in a lambda or comprehension"),
)


def mark_source(data: bytes) -> np.ndarray | None:
    """Properties of every byte of a Python source, bool (C, bytes); None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError):
        return None
    marker = _Marker(data)
    marker.visit(tree)
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            marker.whole("inside a docstring", first)
            marker.mark("inside a string that is no docstring", marker.start(first), marker.stop(first), value=False)
    _mark_comments(data, marker)
    return marker.marks_CB


def _mark_comments(data: bytes, marker: _Marker) -> None:
    lines = data.splitlines(keepends=True)
    try:
        for token in tokenize.tokenize(io.BytesIO(data).readline):
            if token.type == tokenize.COMMENT:
                (row, column), line = token.start, lines[token.start[0] - 1]
                first = int(marker.starts[row - 1]) + len(line.decode("utf-8", "replace")[:column].encode())
                marker.mark("inside a comment", first, first + len(token.string.encode()))
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):
        return  # the syntax tree's marks stay


def row_properties(
    table: WindowTable, row_N: np.ndarray, piece_bytes_N: np.ndarray, sources: Mapping[str, bytes]
) -> tuple[np.ndarray, np.ndarray]:
    """(properties_CN bool, known_N bool) of the table's rows: those of the last byte of each row's token.

    `sources` gives the bytes of documents by name; documents missing there, or that do not parse, are not known.
    """
    properties_CN = np.zeros((len(PROPERTIES), len(row_N)), bool)
    known_N = np.zeros(len(row_N), bool)
    at_N = table.byte_offset_N[row_N] + np.maximum(piece_bytes_N, 1) - 1
    doc_N = table.doc_N[row_N]
    for doc in np.unique(doc_N).tolist():
        info = table.documents[doc]
        data = sources.get(info.name)
        marks_CB = mark_source(data) if data is not None and info.exact_offsets and len(data) == info.bytes else None
        if marks_CB is None:
            continue
        here = np.flatnonzero(doc_N == doc)
        known_N[here] = True
        properties_CN[:, here] = marks_CB[:, np.minimum(at_N[here], marks_CB.shape[1] - 1)]
    return properties_CN, known_N


def agreements(
    firings: Firings,
    properties_CN: np.ndarray,
    known_N: np.ndarray,
    *,
    min_share: float = 0.8,
    min_gain: float = 0.7,
    max_base: float = 0.5,
    strong: float = 0.35,
    min_firings: int = 20,
) -> dict[int, Agreement]:
    """For each latent the property its strong firings tell most about, where they do.

    share = P(property | fires with at least `strong` times its strongest activation), base = P(property), over the
    rows known. Kept where there are `min_firings` of them, share >= min_share, base <= max_base and
    (share - base) / (1 - base) >= min_gain; of several, the one of the largest KL of Bernoulli(share) to
    Bernoulli(base), which prefers the rarer property.
    """
    if not known_N.any():
        return {}
    base_C = properties_CN[:, known_N].mean(axis=1)
    max_F = np.zeros(firings.num_latents, np.float32)
    np.maximum.at(max_F, firings.latent_E, firings.value_E)
    used_E = known_N[firings.row_E] & (firings.value_E >= strong * max_F[firings.latent_E])
    latent_E, row_E = firings.latent_E[used_E], firings.row_E[used_E]
    count_F = np.bincount(latent_E, minlength=firings.num_latents)
    share_CF = np.stack(
        [np.bincount(latent_E, weights=mask_N[row_E], minlength=firings.num_latents) for mask_N in properties_CN]
    ) / np.maximum(count_F, 1)
    base_C1 = np.clip(base_C, 1e-9, 1 - 1e-9)[:, None]
    good_CF = (share_CF >= min_share) & ((share_CF - base_C1) / (1 - base_C1) >= min_gain) & (base_C1 <= max_base)
    good_CF &= count_F >= min_firings
    inner_CF = np.clip(share_CF, 1e-9, 1 - 1e-9)
    gain_CF = inner_CF * np.log(inner_CF / base_C1) + (1 - inner_CF) * np.log((1 - inner_CF) / (1 - base_C1))
    best_F = np.where(good_CF, gain_CF, -1.0).argmax(axis=0)
    return {
        int(f): Agreement(
            name=PROPERTIES[best_F[f]], share=float(share_CF[best_F[f], f]), base=float(base_C[best_F[f]])
        )
        for f in np.flatnonzero(good_CF.any(axis=0))
    }

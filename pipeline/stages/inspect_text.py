"""The tables `ggscope inspect` prints for people."""

from __future__ import annotations

import re
from typing import Any

from rich.table import Table
from rich.text import Text

from ..llama.hooks import block_ranges, describe_tensors


def card_table(card: dict[str, Any], graph: dict[str, Any]) -> Table:
    """Two columns: what, and its value."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    sizes, weights, words, chat = (card[key] for key in ("sizes", "weights", "vocabulary", "chat_template"))
    kinds = ", ".join(f"{count} {name}" for name, count in weights["tensors"].items())
    special = ", ".join(f"{key.upper()} {t['text']!r} ({t['id']})" for key in ("bos", "eos") if (t := words[key]))
    rows = {
        "file": f"{card['file']['path']} ({_bytes(card['file']['bytes'])})",
        "sha256": card["file"]["sha256"],
        "model": f"{card['name']}, architecture {card['architecture']}",
        "blocks": f"{sizes['blocks']} of width {sizes['width']}, feed-forward {_number(sizes['feed_forward'])}",
        "attention": f"{_number(sizes['heads'])} heads of width {_number(sizes['head_width'])}, "
        f"{_number(sizes['kv_heads'])} for keys and values",
        "experts": sizes["experts"]
        and f"{sizes['experts_used']} of {sizes['experts']}, feed-forward {_number(sizes['expert_feed_forward'])}",
        "context": f"{sizes['context_tokens']:,} tokens"
        + (f", sliding window {_number(sizes['sliding_window'])}" if sizes["sliding_window"] else ""),
        "rope": sizes["rope_freq_base"]
        and f"base {sizes['rope_freq_base']:,.0f}, {_number(sizes['rope_dimensions'])} dimensions, "
        f"scaling {sizes['rope_scaling'] or 'none'}",
        "weights": f"{weights['parameters']:,} parameters, type {weights['file_type']}: {kinds} tensors",
        "vocabulary": f"{words['tokens']:,} tokens, {words['type']}/{words['pre_tokenizer']}, "
        f"sha256 {words['sha256'][:12]}",
        "special": f"{special or 'none'}; BOS is {'added' if words['add_bos'] else 'not added'}",
        "chat": _chat(chat),
        "graph": f"flash attention {'on' if graph['flash_attention'] else 'off'}, values in {', '.join(graph['buffers'])}",
    }
    for name, value in rows.items():
        if value:
            _add(table, name, value)
    return table


def point_table(points: list[dict[str, Any]]) -> Table:
    """One line per site and kind of tensor; the blocks that are alike share it."""
    several = len({point["buffer"] for point in points}) > 1
    table = _table("hook point", "ggml tensor", "operation", "ne", *["buffer"] * several, "")
    for alike in grouped(points):
        first, blocks = alike[0], [point["block"] for point in alike if point["block"] is not None]
        name = first["point"]
        if blocks:
            name = name.replace(f"blocks.{blocks[0]}.", f"blocks.{block_ranges(blocks)}.")
        tensor = describe_tensors(p["raw"].removeprefix("ggml:") for p in alike) or "(without a name)"
        where = [first["buffer"]] * several
        _add(table, name, tensor, first["op"], _ne(first["ne"]), *where, _note(first))
    return table


def tensor_table(tensors: list[dict[str, Any]]) -> Table:
    """Every node of the graph in the order it is computed."""
    several = len({tensor["buffer"] for tensor in tensors}) > 1
    table = _table("", "ggml tensor", "operation", "type", "ne", *["buffer"] * several, "hook points")
    for t in tensors:
        name, points = t["raw"].removeprefix("ggml:"), "\n".join(t["hook_points"])
        _add(table, str(t["index"]), name, t["op"], t["type"], _ne(t["ne"]), *[t["buffer"]] * several, points)
    return table


def grouped(points: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Points of one site whose tensors differ by the block's number only; in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for point in points:
        stem = re.sub(r"node_\d+", "node", point["raw"])
        stem = re.sub(r"-(\d+)", lambda m, b=point["block"]: f"-{int(m[1]) - (b or 0)}", stem)
        alike = (point["site"], stem, *(point[key] for key in ("op", "type", "buffer", "width", "flash_attn_off")))
        groups.setdefault(alike, []).append(point)
    return list(groups.values())


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _add(table: Table, *cells: str) -> None:
    """A row of plain text: brackets in a name or a template are no markup."""
    table.add_row(*map(Text, cells))


def _note(point: dict[str, Any]) -> str:
    notes = ["model.flash_attn=off"] * point["flash_attn_off"]
    if point["type"] != "f32":
        notes.append(point["type"])
    return ", ".join(notes)


def _ne(ne: list[int]) -> str:
    """Elements per dimension, the fastest first, without the ones at the end."""
    while len(ne) > 1 and ne[-1] == 1:
        ne = ne[:-1]
    return " x ".join(map(str, ne))


def _number(value: Any) -> str:
    """A number, or the range of one per block."""
    if isinstance(value, list):
        return f"{min(value)} to {max(value)}" if len(set(value)) > 1 else _number(value[0])
    return "?" if value is None else f"{value:,}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _chat(template: dict[str, Any] | None) -> str:
    if template is None:
        return "no template"
    known = "can be used" if template["usable"] else "cannot be used"
    first = template["text"].splitlines()[0] if template["text"].strip() else ""
    return f"template of {len(template['text']):,} characters ({known}): {first[:50]!r}"

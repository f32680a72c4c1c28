"""What each setting means: the comments beside the fields of `config.py`, where its readers look too."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from dataclasses import fields

from . import config
from .config import Config


def meanings() -> dict[str, str]:
    """`group.item` -> the comment of that field, of those that have one."""
    source = inspect.getsource(config)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    by_class = {
        node.name: {
            field.target.id: text
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            for line in range(field.lineno, (field.end_lineno or field.lineno) + 1)
            if (text := comments.get(line))
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
    return {
        f"{group.name}.{item}": text
        for group in fields(Config)
        for item, text in by_class.get(str(group.type), {}).items()
    }

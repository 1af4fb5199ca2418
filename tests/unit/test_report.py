"""Reports listen: shares of time, a trace to look at, one line of progress that stays plain off a terminal."""

from __future__ import annotations

import gzip
import io
import json

import pytest
import rich.progress  # noqa: F401  (outside of any test's time)

from fanfold.events import (
    Batch,
    InputEnded,
    Note,
    ProcessStarted,
    UnitDied,
    UnitReady,
    WindowFound,
    WindowPrepared,
    Work,
)
from fanfold.report import progress, timeline
from fanfold.report.progress import Figures, Progress
from fanfold.report.timeline import Timeline


class FakeClock:
    """time.monotonic, moved by hand."""

    def __init__(self, monkeypatch, *modules):
        self.now_s = 1000.0
        for module in modules:
            monkeypatch.setattr(module.time, "monotonic", lambda: self.now_s)

    def sleep(self, elapsed_s):
        self.now_s += elapsed_s


@pytest.fixture
def clock(monkeypatch):
    return FakeClock(monkeypatch, progress, timeline)


def work(unit, kind, at_s, elapsed_s, detail=""):
    return Work(at_s=at_s, unit=unit, kind=kind, elapsed_s=elapsed_s, detail=detail)


def told(*events):
    made = Timeline()
    for event in events:
        made(event)
    return made


# -- timeline ---------------------------------------------------------------------------------------------


def test_idle_share_by_hand():
    """From 10 to 20, two units: 20 s. Busy: a 10-14 and 15-20, b 12-19 and a write 19-20, 17 s in all."""
    made = told(
        work("a", "compute", 10, 4),
        work("b", "compute", 12, 7),
        work("b", "write", 19, 1),
        work("a", "compute", 15, 5),
    )
    assert made.idle_share() == pytest.approx(1 - 17 / 20)


def test_loading_before_the_first_computation_is_not_idle_time_nor_work():
    """a computes 10-20; b loads until 15 and computes 15-20: 5 of its 10 s count as busy loading."""
    made = told(
        work("a", "load", 0, 10), work("a", "compute", 10, 10), work("b", "load", 8, 7), work("b", "compute", 15, 5)
    )
    assert made.idle_share() == pytest.approx(0.0)


def test_work_behind_the_last_computation_does_not_count():
    made = told(work("a", "compute", 0, 10), work("b", "compute", 0, 5), work("b", "assemble", 20, 30))
    assert made.idle_share() == pytest.approx(0.25)


def test_units_without_a_gap_are_not_idle():
    assert told(*(work(unit, "compute", 5, 3) for unit in "abc")).idle_share() == 0.0


def test_a_unit_that_waited_all_the_time_was_idle():
    assert told(work("a", "compute", 0, 10), work("b", "prepare", -5, 2)).idle_share() == pytest.approx(0.5)


@pytest.mark.parametrize("events", [[], [work("a", "load", 0, 5)]])
def test_without_a_computation_there_is_no_idle_share(events):
    assert told(*events).idle_share() is None


def test_a_computation_of_no_time_leaves_no_idle_share_to_speak_of():
    assert told(work("a", "compute", 5, 0)).idle_share() == 0.0


def test_seconds_of_each_unit_and_kind_add_up():
    made = told(
        work("a", "compute", 0, 1), work("a", "compute", 5, 2), work("a", "write", 2, 0.5), work("b", "load", 0, 4)
    )
    assert made.seconds() == {"a": {"compute": 3.0, "write": 0.5}, "b": {"load": 4.0}}


def test_loading_takes_as_long_as_the_slowest_unit():
    assert told(work("a", "load", 0, 3), work("b", "load", 0, 5), work("c", "compute", 0, 9)).load_s() == 5.0
    assert told().load_s() == 0.0


def test_units_used_are_those_that_computed():
    assert told(work("a", "load", 0, 1), work("b", "compute", 0, 1)).units_used == {"b"}


def test_processes_are_known_while_they_live():
    made = told(ProcessStarted(at_s=0, name="zygote", pid=7), UnitReady(at_s=0, unit="a", pid=8))
    assert made.pids == {"zygote": 7, "a": 8}
    made(UnitDied(at_s=1, unit="a", cause="signal 9"))
    assert made.pids == {"zygote": 7}
    assert made.num_deaths == 1


def test_memory_is_the_peak_of_all_processes_measured_once_a_second(clock, monkeypatch):
    measured = []
    sizes = iter([5, 50, 20])
    monkeypatch.setattr(timeline.os, "getpid", lambda: 1)
    monkeypatch.setattr(timeline, "pss_bytes", lambda pid: (measured.append(pid), next(sizes, 1))[1])
    made = told(UnitReady(at_s=0, unit="a", pid=2))
    for _ in range(10):  # half a second apart: every second one is measured
        made(Batch(at_s=clock.now_s, unit="a", rows=1, tokens=1))
        clock.sleep(0.5)
    assert len(measured) == 2 * 5
    assert made.peak_pss_bytes == 55


# -- trace ------------------------------------------------------------------------------------------------


def test_a_trace_opens_as_gzipped_json_with_one_track_a_unit():
    made = told(
        work("cpu:1", "compute", 100.0, 2.0, "window 0 pieces 0-3"),
        work("cpu:0", "load", 99.0, 1.5),
        work("cpu:0", "compute", 101.0, 0.25),
    )
    made.start_s = 99.0
    trace = json.loads(gzip.decompress(made.trace()))
    assert trace["displayTimeUnit"] == "ms"
    events = trace["traceEvents"]
    tracks = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert sorted(tracks) == ["cpu:0", "cpu:1"]
    assert len(set(tracks.values())) == 2
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == ["fanfold"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(span["tid"], span["name"], span["ts"], span["dur"]) for span in spans] == [
        (tracks["cpu:1"], "compute", 1_000_000, 2_000_000),
        (tracks["cpu:0"], "load", 0, 1_500_000),
        (tracks["cpu:0"], "compute", 2_000_000, 250_000),
    ]
    assert spans[0]["args"] == {"detail": "window 0 pieces 0-3"}
    assert {event["pid"] for event in events} == {1}


def test_the_same_events_give_the_same_trace_bytes():
    made = told(work("a", "compute", 1, 2))
    assert made.trace() == made.trace()


def test_a_trace_of_nothing_opens():
    assert len(json.loads(gzip.decompress(told().trace()))["traceEvents"]) == 1


def test_hostile_text_in_a_trace_is_json():
    detail = '</script>"\\\n\x1b[31m\u2028😀'
    events = json.loads(gzip.decompress(told(work("a", "compute", 0, 1, detail)).trace()))["traceEvents"]
    assert events[-1]["args"]["detail"] == detail


def test_a_trace_is_bounded_while_the_figures_stay_exact(monkeypatch):
    monkeypatch.setattr(timeline, "MAX_TRACE_SPANS", 3)
    made = told(*(work("a", "compute", i, 1) for i in range(10)))
    events = json.loads(gzip.decompress(made.trace()))["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 3
    assert made.seconds() == {"a": {"compute": 10.0}}


# -- figures ----------------------------------------------------------------------------------------------


def figures(*events, rows_done=0):
    made = Figures(rows_done)
    for event in events:
        made.take(event)
    return made


def batch(at_s, rows=10, tokens=100):
    return Batch(at_s=at_s, unit="a", rows=rows, tokens=tokens)


FOUND = [WindowFound(at_s=1, rows=100, scanned_share=0.25), WindowPrepared(at_s=1, records=100, rows=100, tokens=2000)]


@pytest.fixture
def early(clock):
    """Events carry times far behind the start of the figures."""
    clock.now_s = 0.5


@pytest.mark.usefixtures("early")
def test_rows_are_projected_from_the_share_scanned_until_the_input_ends():
    made = figures()
    assert made.rows_expected is None
    made.take(FOUND[0])
    assert made.rows_expected == 400
    made.take(InputEnded(at_s=2, rows=390))
    assert made.rows_expected == 390


@pytest.mark.usefixtures("early")
def test_a_stream_has_no_expected_rows_and_no_estimate():
    made = figures(WindowFound(at_s=1, rows=100, scanned_share=None), FOUND[1], *(batch(t) for t in range(1, 9)))
    assert made.rows_expected is None
    assert made.left_s is None


@pytest.mark.usefixtures("early")
def test_there_is_no_estimate_before_warm_up():
    made = figures(*FOUND, batch(10.0), batch(12.9))
    assert made.left_s is None
    made.take(batch(13.0))
    assert made.left_s is not None


@pytest.mark.usefixtures("early")
def test_there_is_no_estimate_before_a_window_is_prepared_or_a_batch_is_done():
    assert figures(FOUND[0], batch(10), batch(20)).left_s is None
    assert figures(*FOUND, InputEnded(at_s=50, rows=400)).left_s is None


@pytest.mark.usefixtures("early")
def test_the_estimate_counts_tokens_not_rows():
    """400 rows at 20 tokens are 8,000; 4,000 are done in 10 s, though only 40 rows are."""
    made = figures(*FOUND, batch(10, rows=20, tokens=2000), batch(20, rows=20, tokens=2000))
    assert made.tokens_per_s == 400
    assert made.left_s == pytest.approx(10.0)


@pytest.mark.usefixtures("early")
def test_resumed_rows_make_the_estimate_shorter_but_not_the_rate_higher():
    made = figures(*FOUND, batch(10, tokens=1000), batch(20, tokens=1000), rows_done=200)
    assert made.rows_per_s == 2.0
    assert made.left_s == pytest.approx((8000 - 4000 - 2000) / 200)


@pytest.mark.usefixtures("early")
def test_the_estimate_is_never_negative():
    assert figures(*FOUND, batch(10, tokens=9000), batch(20, tokens=9000)).left_s == 0.0


@pytest.mark.usefixtures("early")
def test_a_clock_that_goes_back_does_not_make_rates_negative():
    made = figures(batch(20), batch(25), batch(5))
    assert made.elapsed_s == 5.0
    assert made.rows_per_s > 0


# -- progress off a terminal ------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def drive(display, clock, *, seconds, every_s=0.5):
    display.start(0)
    for event in (UnitReady(at_s=clock.now_s, unit="a", pid=1), *FOUND):
        display(event)
    for _ in range(int(seconds / every_s)):
        clock.sleep(every_s)
        display(batch(clock.now_s, rows=1, tokens=10))
    display.stop()


def test_off_a_terminal_there_is_at_most_one_plain_line_in_30_s(clock):
    stream = io.StringIO()
    drive(Progress(stream=stream), clock, seconds=125)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == "60 of 400 rows, 2 rows/s, 20 tokens/s, 6 min 04 s left"
    assert not any(c in stream.getvalue() for c in "\r\x1b\b")


def test_a_short_job_off_a_terminal_says_nothing_of_its_progress(clock):
    stream = io.StringIO()
    drive(Progress(stream=stream), clock, seconds=29)
    assert stream.getvalue() == ""


def test_the_first_lines_say_that_units_start_then_that_the_model_loads(clock):
    stream = io.StringIO()
    display = Progress(stream=stream)
    display.start(0)
    clock.sleep(31)
    display(FOUND[0])
    clock.sleep(31)
    display(UnitReady(at_s=clock.now_s, unit="a", pid=1))
    assert stream.getvalue().splitlines() == ["0 of 400 rows, starting", "0 of 400 rows, loading the model"]


def test_a_line_without_known_rows_shows_a_question_mark(clock):
    display = Progress(stream=io.StringIO())
    display(batch(clock.now_s))
    assert display.line() == "10 of ? rows, 0 rows/s, 0 tokens/s"


def test_notes_are_said_at_once(clock):
    stream = io.StringIO()
    display = Progress(stream=stream)
    display(Note(at_s=1, text="cpu:1 was killed (signal 9); replaced"))
    assert stream.getvalue() == "cpu:1 was killed (signal 9); replaced\n"


HOSTILE = "died: \x1b[2J\x1b]0;owned\x07 \r overwritten \u202etxt.exe [bold]x[/bold]"


@pytest.mark.parametrize("where", ["off a terminal", "on a terminal", "above a bar"])
def test_hostile_text_in_a_note_is_inert(clock, terminal, where):
    """What a worker's last words or a file's name hold must not move the cursor or set the title."""
    stream = io.StringIO() if where == "off a terminal" else terminal
    display = Progress(stream=stream, color=False)
    if where == "above a bar":
        display.start(0)
    display(Note(at_s=1, text=HOSTILE))
    display.stop()
    shown = stream.getvalue()
    assert "died:" in shown
    assert "[bold]x[/bold]" in shown
    assert [c for c in ("\x1b[2J", "\x1b]0", "\x07", " \r ", "\u202e") if c in shown] == []


def test_quiet_says_nothing(clock):
    stream = Terminal()
    display = Progress(quiet=True, stream=stream)
    drive(display, clock, seconds=125)
    display(Note(at_s=1, text="a note"))
    display.say("a word")
    assert stream.getvalue() == ""


# -- progress on a terminal -------------------------------------------------------------------------------


def test_a_terminal_shows_a_bar_with_rows_rate_and_rest(clock, terminal):
    drive(Progress(stream=terminal), clock, seconds=20)
    shown = terminal.getvalue()
    assert "40/400" in shown
    assert "2 rows/s" in shown
    assert "left" in shown
    assert "\x1b[" in shown


def test_without_color_a_bar_has_no_color_codes(clock, terminal):
    drive(Progress(stream=terminal, color=False), clock, seconds=20)
    assert "40/400" in terminal.getvalue()
    assert "\x1b[3" not in terminal.getvalue()


def test_loading_is_shown_as_its_own_phase(clock, terminal):
    display = Progress(stream=terminal)
    display.start(0)
    display(UnitReady(at_s=clock.now_s, unit="a", pid=1))
    display.stop()
    assert "loading" in terminal.getvalue()
    assert "running" not in terminal.getvalue()


def test_what_is_said_stands_above_the_bar_and_stays(clock, terminal):
    display = Progress(stream=terminal)
    display.start(5)
    display.say("[red]not markup[/red]")
    display.stop()
    assert "[red]not markup[/red]" in terminal.getvalue()


def test_stop_twice_is_harmless_and_the_cursor_is_shown_again(clock, terminal):
    display = Progress(stream=terminal)
    display.start(0)
    display.stop()
    shown = terminal.getvalue()
    display.stop()
    assert terminal.getvalue() == shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")

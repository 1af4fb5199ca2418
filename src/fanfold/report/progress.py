"""One progress line: a bar on a terminal, a plain line every 30 s elsewhere, nothing with --quiet."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from fanfold.events import Batch, InputEnded, Note, UnitReady, WindowFound, WindowPrepared
from fanfold.quantity import format_count, format_duration, printable

if TYPE_CHECKING:
    from fanfold.events import Event

_PLAIN_EVERY_S = 30.0
_DRAW_EVERY_S = 0.1
_WARM_UP_S = 3.0  # no estimate before this much computing


class Figures:
    """Counts behind the display: rows and tokens done, rows expected, rate and time left."""

    def __init__(self, rows_done: int = 0) -> None:
        self.rows_done = rows_done
        self.rows_found = 0
        self.rows_resumed = rows_done
        self.records_prepared = 0
        self.rows_prepared = 0
        self.cost_prepared = 0
        self.tokens = 0
        self.scanned_share: float | None = None
        self.input_ended = False
        self.first_batch_s: float | None = None
        self.now_s = time.monotonic()
        self.units_ready = 0

    def take(self, event: Event) -> None:
        self.now_s = max(self.now_s, event.at_s)
        match event:
            case Batch():
                self.first_batch_s = self.first_batch_s or event.at_s
                self.rows_done += event.rows
                self.tokens += event.tokens
            case WindowFound():
                self.rows_found += event.rows
                self.scanned_share = event.scanned_share
            case WindowPrepared():
                self.records_prepared += event.records
                self.rows_prepared += event.rows
                self.cost_prepared += event.tokens
            case InputEnded():
                self.rows_found, self.input_ended = event.rows, True
            case UnitReady():
                self.units_ready += 1

    @property
    def rows_expected(self) -> int | None:
        """Exact once the input was scanned; before, projected from the share of bytes scanned."""
        found: float = self.rows_found
        if not self.input_ended:
            if not self.scanned_share:
                return None
            found = max(found, found / self.scanned_share)
        if self.records_prepared:  # texts cut into parts are several rows each
            found *= self.rows_prepared / self.records_prepared
        return round(found)

    @property
    def elapsed_s(self) -> float:
        return self.now_s - self.first_batch_s if self.first_batch_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def rows_per_s(self) -> float:
        done = self.rows_done - self.rows_resumed
        return done / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """From tokens, not rows: within a window the long rows come first."""
        expected = self.rows_expected
        if expected is None or not self.rows_prepared or self.elapsed_s < _WARM_UP_S or not self.tokens:
            return None
        cost = self.cost_prepared / self.rows_prepared * expected
        cost_resumed = self.cost_prepared / self.rows_prepared * self.rows_resumed
        return max(0.0, cost - cost_resumed - self.tokens) / self.tokens_per_s


class Progress:
    """Shows Figures on stderr."""

    def __init__(self, *, quiet: bool = False, color: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._color = color
        self._bar: Any = None
        self._task: Any = None
        self._figures = Figures()
        self._drawn_s = self._plain_s = time.monotonic()
        self._on_terminal = not quiet and self._stream.isatty()

    def start(self, rows_done: int) -> None:
        """Begin with the rows that an earlier run has computed."""
        self._figures.rows_done = self._figures.rows_resumed = rows_done
        if self._on_terminal:
            self._bar, self._task = _make_bar(self._stream, self._color)
            self._bar.start()

    def __call__(self, event: Event) -> None:
        self._figures.take(event)
        if self._quiet:
            return
        if isinstance(event, Note):
            self.say(event.text)
        now_s = time.monotonic()
        if self._bar is not None and now_s - self._drawn_s >= _DRAW_EVERY_S:
            self._drawn_s = now_s
            self._draw()
        elif not self._on_terminal and now_s - self._plain_s >= _PLAIN_EVERY_S:
            self._plain_s = now_s
            self.say(self.line())

    def say(self, text: str) -> None:
        """One line above the bar, whatever it came from inert."""
        text = printable(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(text, file=self._stream, flush=True)

    def line(self) -> str:
        """What is known now, in one plain line."""
        figures = self._figures
        expected = figures.rows_expected
        parts = [f"{format_count(figures.rows_done)} of {format_count(expected) if expected else '?'} rows"]
        if figures.first_batch_s is None:
            parts.append("loading the model" if figures.units_ready else "starting")
        else:
            parts.append(f"{figures.rows_per_s:,.0f} rows/s")
            parts.append(f"{figures.tokens_per_s:,.0f} tokens/s")
            if figures.left_s is not None:
                parts.append(f"{format_duration(figures.left_s)} left")
        return ", ".join(parts)

    def _draw(self) -> None:
        figures = self._figures
        loading = figures.first_batch_s is None
        left_s = figures.left_s
        self._bar.update(
            self._task,
            description="loading" if loading else "running",
            total=None if loading else figures.rows_expected,
            completed=figures.rows_done,
            rate="" if loading else f"{figures.rows_per_s:,.0f} rows/s  {figures.tokens_per_s:,.0f} tokens/s",
            left=f"{format_duration(left_s)} left" if left_s is not None else "",
        )

    def stop(self) -> None:
        """Take the bar away; what was said stays."""
        if self._bar is not None:
            self._draw()
            bar, self._bar = self._bar, None
            held_back = getattr(bar.console, "_buffer_index", 0) > 0  # a signal came while rich was writing
            bar.stop()
            if held_back:  # rich keeps the end of the line and the cursor until it goes on, which it may never
                try:
                    os.write(self._stream.fileno(), b"\n\x1b[?25h")
                except (OSError, ValueError):
                    pass


def _make_bar(stream: TextIO, color: bool) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows  {task.fields[rate]}  {task.fields[left]}"),
        console=Console(file=stream, no_color=not color),
        auto_refresh=True,
        refresh_per_second=4,
        transient=False,
    )
    return bar, bar.add_task("loading", total=None, rate="", left="")

"""What a person sees while it is measured, on stderr: a live bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

SECONDS_BETWEEN_LINES = 10.0


class Lines:
    """`[3/12] nearest_code N=4800 ...`, when the last line is ten seconds old."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._last = -SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        return None

    def step(self, done: int, title: str) -> None:
        """`done` shapes are measured, `title` is next."""
        now = time.monotonic()
        if title and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            print(f"[{done + 1}/{self._total}] {title}", file=sys.stderr, flush=True)


class Bar(Lines):
    """A live bar with what is being measured."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(total)
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
        title = TextColumn("{task.description}", markup=False)
        # A thread that redraws would work, and be counted, while others are measured.
        self._bar = Progress(*columns, title, console=Console(stderr=True), transient=True, auto_refresh=False)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def step(self, done: int, title: str) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=done, description=title, refresh=True)


def for_terminal(total: int) -> Lines:
    """A bar on a terminal, lines otherwise."""
    return Bar(total) if sys.stderr.isatty() else Lines(total)

"""Ctrl-C and SIGTERM as a wish that the loop grants at the next step boundary."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopWish:
    """As a context manager: the first SIGINT or SIGTERM only sets `.wished`; a second one acts as usual."""

    def __init__(self) -> None:
        self.wished = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # handlers cannot be set from another
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._wish)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._restore()

    def _wish(self, _number: int, _frame: FrameType | None) -> None:
        self.wished = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

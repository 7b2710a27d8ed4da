"""What a person sees while a model trains: a live bar on a terminal, else a line now and then. All on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Hears of the loop's events; does nothing with them by default."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None: ...

    def begin(self, title: str, step: int, steps: int) -> None:
        """Training goes from `step` to `steps`."""

    def metrics(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""

    def say(self, text: str) -> None:
        """A sentence."""


class Silent:
    """No output."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        return None

    def begin(self, title: str, step: int, steps: int) -> None:
        """Nothing."""

    def metrics(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


class Lines(Silent):
    """A line for each validation, and for training when the last line is ten seconds old."""

    def __init__(self) -> None:
        self._steps = 0
        self._last = time.monotonic()

    def begin(self, title: str, step: int, steps: int) -> None:
        """Print what is trained."""
        self._steps = steps
        self.say(f"{title}: step {step} of {steps}")

    def metrics(self, record: dict[str, Any]) -> None:
        """Print it, if it is time."""
        now = time.monotonic()
        if record["split"] == "validation" or now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self.say(
                f"epoch {record['epoch']} step {record['step']}/{self._steps} {record['split']}: {summary(record)}"
            )

    def say(self, text: str) -> None:
        """Print it."""
        print(text, file=sys.stderr, flush=True)


class Bar(Silent):
    """A live bar with the ELBO, the KL and images per second."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[cyan]{task.fields[train]}"),
            TextColumn("[green]{task.fields[validation]}"),
            console=self._console,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, title: str, step: int, steps: int) -> None:
        """Show the bar."""
        self._task = self._bar.add_task(title, total=steps, completed=step, train="", validation="")

    def metrics(self, record: dict[str, Any]) -> None:
        """Move the bar and show the figures."""
        if record["split"] == "train":
            self._bar.update(self._task, completed=record["step"], train=summary(record))
        else:
            self._bar.update(self._task, validation=f"held out {record['elbo']:.2f}")

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._console.print(text, markup=False, highlight=False)


def summary(record: dict[str, Any]) -> str:
    """`ELBO -97.4 KL 25.1 21000 images/s`."""
    text = f"ELBO {record['elbo']:.2f}  KL {record['kl']:.2f}"
    if "perplexity" in record:
        text += f"  perplexity {record['perplexity']:.0f}"
    if "images_per_second" in record:
        text += f"  {record['images_per_second']:.0f} images/s"
    return text


def for_terminal(speaks: bool = True) -> Progress:
    """The progress for this process: silent for ranks that do not speak, a bar on a terminal, lines otherwise."""
    if not speaks:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()

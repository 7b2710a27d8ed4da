"""One process a run: a second would write over the first's checkpoints and metrics."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ferrovae.training.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # not on Windows: there nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run while it is trained. The system lets go of it with the process, however that ends.

    Raises:
        ConfigurationError: another process trains it.
    """
    with (run_dir / ".lock").open("a+", encoding="utf-8") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigurationError(
                f"{run_dir} is being trained by process {file.read().strip()}: wait for it, or stop it first"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield

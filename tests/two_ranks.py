"""Two processes, as the tests of what ranks share need them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_two_ranks(run: Callable[..., None], *arguments: Any) -> None:
    """`run(rank, *arguments)` for the ranks 0 and 1, each in a process of its own.

    The processes are forked off one that has imported torch already: to import it is most of what a fresh one does.
    """
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "ferrovae.nn"])
    mp.start_processes(run, args=arguments, nprocs=2, start_method="forkserver")

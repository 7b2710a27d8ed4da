"""What happens to threads: abandoned passes, exceptions, forks, signals, interpreter exit."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

import ferrovae as fv
from ferrovae.data import Loader, Scale

linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def dataset(count=400, width=1000):
    return fv.data.open(torch.zeros(count, width, dtype=torch.uint8))


def has_workers(expected: int) -> bool:
    """Whether this process comes to have so many loader threads; a thread names itself, and leaves /proc, late."""
    for _ in range(500):
        found = 0
        for entry in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                found += (entry / "comm").read_text().startswith("ferrovae-")
        if found == expected:
            return True
        time.sleep(0.01)
    return False


@linux
def test_threads_end_with_their_pass():
    loader = Loader(dataset(), 4, threads=3, transform=Scale())
    for _ in range(5):
        passed = iter(loader)
        next(passed)
        assert has_workers(3)
        del passed
        gc.collect()
        assert has_workers(0)
        for batch in loader:
            del batch
            break
        assert has_workers(0)

    def fails():
        for _ in loader:
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        fails()
    gc.collect()
    list(loader)
    assert has_workers(0)


@linux
def test_an_error_ends_the_threads_and_the_pass():
    data = torch.rand(50, 3)
    data[20] = float("nan")
    passed = iter(Loader(fv.data.open(data), 5, shuffle=False))
    with pytest.raises(fv.data.DataError, match="example 20"):
        list(passed)
    assert has_workers(0)
    with pytest.raises(RuntimeError, match=r"has ended.*example 20"):
        next(passed)


def test_other_python_threads_run_while_a_batch_is_awaited():
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    loader = Loader(dataset(64, 1 << 20), 16, transform=fv.data.Dequantize(), threads=1, prefetch=0)
    begun = time.perf_counter()
    for batch in loader:
        del batch
    ended = time.perf_counter()
    stop.set()
    ticker.join()
    # Were the GIL held while batches of 64 MB are written, the ticker would stand still.
    assert sum(begun < moment < ended for moment in ticks) >= 8


def run(program: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, **options
    )


@linux
def test_a_forked_child_goes_on_with_the_same_stream_and_exit_is_clean_in_the_middle_of_a_pass():
    done = run("""
        import os, torch, ferrovae as fv
        data = fv.data.open(torch.arange(200).to(torch.uint8)[:, None])
        loader = fv.data.Loader(data, 10, seed=1, threads=2)
        expected = [batch.index.tolist() for batch in loader]
        loader = fv.data.Loader(data, 10, seed=1, threads=2)
        passed = iter(loader)
        assert [next(passed).index.tolist() for _ in range(5)] == expected[:5]
        child = os.fork()
        rest = [batch.index.tolist() for batch in passed]
        assert rest == expected[5:], rest
        second = [batch.index.tolist() for batch in loader]  # a new pass, in parent and child
        assert sorted(sum(second, [])) == list(range(200))
        if child == 0:
            del passed, loader
            os._exit(0)
        pid, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        passed = iter(fv.data.Loader(fv.data.open(torch.zeros(4000, 5000, dtype=torch.uint8)), 100, threads=3))
        next(passed)
        print("both")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "both\n", "")


@linux
def test_ctrl_c_is_answered_at_once_and_the_pass_goes_on():
    """The worker is busy with 600 MB of noise when the signal comes."""
    done = run("""
        import os, signal, threading, time, torch, ferrovae as fv
        data = fv.data.open(torch.zeros(1, dtype=torch.uint8).expand(300, 1 << 20).contiguous())
        loader = fv.data.Loader(data, 150, transform=fv.data.Dequantize(), threads=1, prefetch=0)
        passed = iter(loader)
        sent = []
        def send():
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)
        timer = threading.Timer(0.05, send)
        timer.start()
        try:
            next(passed)
            print("too fast")
        except KeyboardInterrupt:
            print("late" if time.perf_counter() - sent[0] > 0.5 else "interrupted")
        timer.join()
        assert next(passed).index.shape == (150,)
        assert next(passed).index.shape == (150,)
        assert next(passed, None) is None
        print("went on")
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in ("interrupted\nwent on\n", "too fast\nwent on\n")


def test_default_threads(monkeypatch):
    from ferrovae.data.loader import default_threads

    for cores, threads in ((1, 1), (2, 1), (3, 2), (4, 3), (64, 3)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert default_threads() == threads

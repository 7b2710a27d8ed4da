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

import numpy as np
import pytest
import torch

import ferrovae as fv
from ferrovae.data import Loader, Scale
from ferrovae.data.loader import useful_threads

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
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
        data = fv.data.open(torch.zeros(1, dtype=torch.uint8).expand(300, 1 << 20).contiguous())
        loader = fv.data.Loader(data, 150, transform=fv.data.Dequantize(), threads=1, prefetch=0)
        passed = iter(loader)
        sent = []
        def send():
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)
        left = 2
        try:
            threading.Timer(0.05, send).start()
            for batch in passed:
                left -= 1
            time.sleep(60)  # where both were there before the signal
        except KeyboardInterrupt:
            print("late" if time.perf_counter() - sent[0] > 0.5 else "interrupted")
        for batch in passed:
            assert batch.index.shape == (150,)
            left -= 1
        print(left, "left")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n0 left\n", "")


class InterruptedAt:
    """A profiler that interrupts at the n-th place in ferrovae.data where Python looks for signals: around calls."""

    def __init__(self, place: int) -> None:
        self.left = place

    def __call__(self, frame, event, called) -> None:
        # Leaving a Python function is not such a place.
        if event != "return" and "ferrovae/data/" in frame.f_code.co_filename:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt  # which also takes this profiler away


@pytest.mark.parametrize("kept", [False, True], ids=["freed", "kept"])
@pytest.mark.parametrize(
    ("goes_on", "fixed_epoch"), [("same pass", None), ("same pass", 3), ("new pass", None), ("resumed", None)]
)
def test_an_interrupt_anywhere_loses_no_batch_and_repeats_none(goes_on, fixed_epoch, kept):
    data = fv.data.open(torch.arange(100.0)[:, None].expand(100, 4).contiguous())

    def loader_at(state=None):
        loader = Loader(data, 10, seed=1, threads=2, prefetch=1, fixed_epoch=fixed_epoch)
        loader.load_state_dict(state or {**loader.state_dict(), "position": 70})
        return loader

    def read(passed):
        for batch in passed:
            batches.append(batch if kept else None)
            assert torch.equal(batch.x, batch.index[:, None].expand(10, 4))
            handed.extend(batch.index.tolist())

    batches, handed = [], []
    read(loader_at())
    expected = handed
    assert len(expected) == 30

    place, interrupted = 0, True
    while interrupted:
        place += 1
        loader, passed, interrupted = loader_at(), None, False
        batches, handed = [], []
        try:
            sys.setprofile(InterruptedAt(place))
            passed = iter(loader)
            read(passed)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.setprofile(None)
        state = loader.state_dict()
        assert 100 * state["epoch"] + state["position"] == 70 + len(handed), place
        if goes_on == "resumed":
            loader = loader_at(state)
        if len(handed) < 30:
            read(passed if goes_on == "same pass" and passed is not None else loader)
        assert handed == expected, place
        assert (loader.epoch, loader.position) in ((1, 0), (0, 100))
    assert place > 100


def test_no_more_threads_than_processors_unless_a_file_is_read(monkeypatch, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((8, 3), np.uint8))
    in_memory, mapped = dataset(8, 3), fv.data.open(tmp_path / "x.npy")
    monkeypatch.setattr("ferrovae.data.loader.useful_threads", useful_threads)
    for cores, most in ((1, 1), (2, 1), (3, 2), (4, 3), (64, 63)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        for data, asked, expected in (
            (in_memory, None, min(most, 3)),
            (in_memory, 8, min(most, 8)),
            (mapped, None, min(most, 3)),
            (mapped, 8, 8),
        ):
            assert Loader(data, 4, threads=asked).threads == expected

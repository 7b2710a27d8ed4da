"""The threads that operations share: in forked children, and with many callers at once."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import os, sys, threading, warnings
    import torch
    from ferrovae import ops

    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of forks beside threads
    x, codebook = torch.randn(20_000, 16), torch.randn(512, 16)
    logits, bits = torch.randn(400, 784), torch.rand(400, 784).round()

    def results():
        return [ops.nearest_code(x, codebook).tolist(), ops.bernoulli_log_prob(bits, logits).tolist()]

    torch.set_num_threads(1)
    expected = results()
    torch.set_num_threads(3)

    def right():  # without torch's own threads, which a forked child waits for in vain
        return results() == expected

    assert right()
    children = 0
    while children < 3 and os.fork() == 0:  # a child, its child, and that one's
        children += 1
        if not right():
            os._exit(1)
    if children < 3:
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    if children:
        os._exit(0)
    answers = []
    callers = [threading.Thread(target=lambda: answers.append(right())) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert answers == [True] * 8, answers
    print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_operations_go_on_in_forked_children_and_in_many_threads() -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")

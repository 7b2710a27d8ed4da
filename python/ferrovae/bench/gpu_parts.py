"""What `gpu_check` measures, a part in a process of its own: a hung or poisoned GPU context ends with its part.

A part yields findings: lines for the summary, and `results` for JSON. It is told when its time is over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ferrovae.bench import catalogue, results, show
from ferrovae.bench.case import OURS
from ferrovae.bench.machine import describe
from ferrovae.bench.measure import on_gpu
from ferrovae.bench.results import Row, is_ours
from ferrovae.bench.roofline import Peaks, measured
from ferrovae.bench.runner import Results, Settings, run


@dataclass
class Finding:
    """Something measured, or left out, with the results it came from."""

    line: str
    left_out: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    peaks: dict[str, Any] = field(default_factory=dict)


Part = Callable[[float, Peaks | None], Iterator[Finding]]

# Share of the roofline, and how many times the time of peers whose name contains a word: what is promised of a GPU.
PROMISES: dict[str, tuple[Callable[[Row], float | None], dict[str, float]]] = {
    "nearest_code": (lambda row: 0.6 if row["shape"]["D"] >= 64 else None, {"cdist": 5.0}),
    "reparameterize_kl": (lambda row: 0.9 if row["dtype"] == "float32" else None, {"torch.compile": 1.2}),
}
_SLOWER = 1.0  # nothing may be slower than eager torch


def ceilings(until: float, peaks: Peaks | None) -> Iterator[Finding]:
    """What this GPU can do at most, of which the rest are shares."""
    found = measured(torch.device("cuda"))
    about = describe("cuda")
    yield Finding(f"{about['gpu']}, torch {about['torch']}, triton {about['versions'].get('triton', 'absent')}")
    yield Finding(f"copy, read and write: {(found.bandwidth or 0) / 1e12:.2f} TB/s", peaks=found.to_dict())
    for unit, flops in found.flops.items():
        yield Finding(f"{unit} matrix product of random numbers: {flops / 1e12:.1f} TFLOP/s")
    small = torch.ones(2**22, device="cuda")  # 16 MiB: stays in the cache
    yield Finding(f"copy within the cache (16 MiB): {2 * 4 * 2**22 / _seconds(lambda: small.clone()) / 1e12:.2f} TB/s")


def score_error(until: float, peaks: Peaks | None) -> Iterator[Finding]:
    """The largest error of an inner product from three bfloat16 products, over |x||e|, beside the bound on it."""
    from ferrovae.ops._triton import kernels

    for dims in (8, 16, 32, 64, 128, 256, 512, 768):
        if time.monotonic() > until:
            yield Finding(f"D={dims} and above", left_out=True)
            return
        largest = 0.0
        for seed in range(4):
            generator = torch.Generator("cuda").manual_seed(seed)
            x, codes = (torch.randn(4096, dims, device="cuda", generator=generator) for _ in range(2))
            exact = x.double() @ codes.double().T
            size = x.double().norm(dim=1)[:, None] * codes.double().norm(dim=1)
            error = (kernels("bf16x3_score").scores(x, codes).double() - exact).abs() / size
            largest = max(largest, float(error.max()))
        bound = 2**-15 + (3 * dims / 8 + 8) * 2**-22
        verdict = "inside" if largest <= bound else "OUTSIDE"
        yield Finding(f"D={dims}: largest error {largest:.3e} of |x||e|, {verdict} the bound {bound:.3e}")


def operation(name: str, device: str = "cuda") -> Part:
    """The benchmark of one operation over its shapes, judged by what is promised of a GPU."""

    def part(until: float, peaks: Peaks | None) -> Iterator[Finding]:
        plan = catalogue.planned([name], [])
        # A third of what is left at most, so that the first shape does not take all the time.
        settings = Settings(torch.device(device), rounds=30, seconds=max(1.0, (until - time.monotonic()) / 3))
        seen = said = 0
        done: list[int] = []
        for found in run(plan, settings, peaks=peaks, step=lambda number, title: done.append(number)):
            for group in results.cases(found.rows[seen:]):
                yield Finding(judged(group), results=found.to_dict())
            seen = len(found.rows)
            yield from _said(found, said)
            said = len(found.left_out) + len(found.failed)
            if time.monotonic() > until and done[-1] < len(plan):
                sizes = ["".join(f" {k}={v}" for k, v in shape.items()) for _, shape in plan[done[-1] + 1 :]]
                yield Finding(f"time is over:{';'.join(sizes) or ' other cases of the last shape'}", left_out=True)
                return

    return part


def _said(found: Results, already: int) -> Iterator[Finding]:
    texts = [*found.left_out, *(f"FAILED: {text}" for text in found.failed)]
    for text in texts[already:]:
        yield Finding(text, left_out=not text.startswith("FAILED"))


def judged(group: list[Row]) -> str:
    """One case in a line: time, share of the roof, times each peer, right or not, and what falls short."""
    ours, peers = group[0], group[1:]
    if not is_ours(ours):
        return f"{show.shape(ours)}: no result of ours"
    words = [show.seconds(ours["p50"])]
    if ours["of_roof"] is not None:
        words.append(f"{100 * ours['of_roof']:.0f} % of the roof ({show.seconds(ours['roof'])})")
    words += [f"{row['times_ours']:.2f} x {row['provider']}{'' if row['correct'] else ' (wrong)'}" for row in peers]
    words.append("right" if ours["correct"] else "WRONG")
    short = [f"SHORT: {text}" for text in shortfalls(ours, peers)]
    return f"{ours['operation']} {show.shape(ours)}: {', '.join([*words, *short])}"


def shortfalls(ours: Row, peers: list[Row]) -> list[str]:
    """What is promised of a GPU and not kept by this case."""
    share_of, factors = PROMISES.get(ours["operation"], (lambda row: None, {}))
    found = []
    share = share_of(ours)
    if share is not None and ours["of_roof"] is not None and ours["of_roof"] < share:
        found.append(f"{100 * share:.0f} % of the roof is promised")
    for row in peers:
        promised = [factor for word, factor in factors.items() if word in row["provider"]]
        due = max(promised, default=_SLOWER if row["provider"] != "torch.compile" else 0.0)
        if row["times_ours"] < due:
            found.append(f"{due:g} x {row['provider']} is promised")
    return found


def graphs(until: float, peaks: Peaks | None) -> Iterator[Finding]:
    """Capture: replays draw new noise, a given seed repeats it, and a search gives what it gives outside."""
    from ferrovae import ops

    mean = torch.zeros(64, 32, device="cuda")
    seed = torch.tensor([7], device="cuda")
    replay, z = _captured(lambda: ops.reparameterize_kl(mean, mean)[0])
    replay()
    first = z.clone()
    replay()
    yield Finding(f"replays of reparameterize_kl draw {'new' if not torch.equal(first, z) else 'THE SAME'} noise")
    replay, z = _captured(lambda: ops.reparameterize_kl(mean, mean, seed=seed)[0])
    replay()
    same = torch.equal(z, ops.reparameterize_kl(mean, mean, seed=seed)[0])
    yield Finding(f"with a seed a replay is {'equal' if same else 'NOT EQUAL'} to an eager call")
    x, codes = torch.randn(4800, 64, device="cuda"), torch.randn(1024, 64, device="cuda")
    replay, indices = _captured(lambda: ops.nearest_code(x, codes))
    x.normal_()
    replay()
    same = torch.equal(indices, ops.nearest_code(x, codes))
    yield Finding(f"a replay of nearest_code on new rows is {'equal' if same else 'NOT EQUAL'} to an eager call")


def launches(until: float, peaks: Peaks | None) -> Iterator[Finding]:
    """What a call costs the host, eager, and what a replay takes, at each operation's smallest shape."""
    sample = on_gpu()
    for name in catalogue.operations():
        if time.monotonic() > until:
            yield Finding(f"{name} and what follows", left_out=True)
            return
        shape = min(catalogue.module_of(name).SHAPES, key=lambda shape: math.prod(shape.values()))
        case = next(catalogue.module_of(name).cases(shape, torch.device("cuda")))
        try:
            call = case.providers[OURS]
            call()
            eager = min(sample(call, 10)[1] for _ in range(5))
            replay, _ = _captured(call)
            graphed = min(sample(replay, 10)[0] for _ in range(5))
            yield Finding(f"{case.title}: {eager * 1e6:.1f} us of the host, replayed {graphed * 1e6:.1f} us in all")
        except Exception as error:
            yield Finding(f"{case.title}: {type(error).__name__}: {error}", left_out=True)
            torch.cuda.synchronize()


def _captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A call as a CUDA graph: its replay, and what it returned, which a replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def _seconds(call: Callable[[], object], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return sorted(times)[repeats // 2]

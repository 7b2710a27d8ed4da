"""Images a second through the loader, beside what people use: `python -m ferrovae.bench.loader --data PATH`.

One interleaved run; every provider goes through all the images three times a round, in batches of 128 float32 images
in a new random order, and hands each batch to a consumer that only counts. Ours brings labels, indices and validity as
well; the others bring images alone. Of our threads one is the consumer's, where there are no more processors.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from ferrovae.bench.machine import machine
from ferrovae.bench.measure import Timing, interleaved
from ferrovae.data import Binarize, Dataset, Loader, Scale, open

BATCH = 128
EPOCHS = 3
TARGETS = {
    "scale: ours / DataLoader(TensorDataset)": 12.0,
    "scale: ours / numpy take + multiply": 1.3,
    "binarize: ours / DataLoader + torch.bernoulli": 8.0,
}


def measure(dataset: Dataset, *, threads: int = 2, rounds: int = 9) -> dict[str, Any]:
    """Times, images a second and ratios of medians, as JSON values."""
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        providers = _providers(dataset, threads)
        timings = interleaved(providers, rounds=rounds, warmup=1)
    finally:
        torch.set_num_threads(previous)
    images = EPOCHS * len(dataset)
    rates = {name: images / timing.p50 for name, timing in timings.items()}
    return {
        "images": len(dataset),
        "shape": list(dataset.shape),
        "batch": BATCH,
        "threads": threads,
        "rounds": rounds,
        "rows": [_row(name, timing, images) for name, timing in timings.items()],
        "ratios": {
            "scale: ours / DataLoader(TensorDataset)": rates["scale: ours"] / rates["scale: DataLoader(TensorDataset)"],
            "scale: ours / numpy take + multiply": rates["scale: ours"] / rates["scale: numpy take + multiply"],
            "scale: ours, reuse / numpy take + multiply": rates["scale: ours, reuse=True"]
            / rates["scale: numpy take + multiply"],
            "binarize: ours / DataLoader + torch.bernoulli": rates["binarize: ours"]
            / rates["binarize: DataLoader + torch.bernoulli"],
        },
        "targets": TARGETS,
    }


def _providers(dataset: Dataset, threads: int) -> dict[str, Callable[[], object]]:
    floats = TensorDataset(dataset.data.float() / 255)
    providers: dict[str, Callable[[], object]] = {
        "scale: ours": partial(_count, Loader(dataset, BATCH, transform=Scale(), threads=threads)),
        "scale: ours, reuse=True": partial(
            _count, Loader(dataset, BATCH, transform=Scale(), threads=threads, reuse=True)
        ),
        "scale: DataLoader(TensorDataset)": partial(_count, DataLoader(floats, batch_size=BATCH, shuffle=True)),
        "binarize: ours": partial(_count, Loader(dataset, BATCH, transform=Binarize(), threads=threads)),
        "binarize: DataLoader + torch.bernoulli": partial(
            _count, DataLoader(floats, batch_size=BATCH, shuffle=True), torch.bernoulli
        ),
    }
    flat = dataset.data.reshape(len(dataset), -1).numpy()
    generator = np.random.default_rng(0)

    def numpy_batches() -> Iterable[np.ndarray[Any, Any]]:
        order = generator.permutation(len(flat))
        raw = np.empty((BATCH, flat.shape[1]), np.uint8)
        out = np.empty((BATCH, flat.shape[1]), np.float32)
        factor = np.float32(1 / 255)
        for start in range(0, len(order), BATCH):
            indices = order[start : start + BATCH]
            rows = len(indices)
            np.take(flat, indices, axis=0, out=raw[:rows], mode="clip")
            np.multiply(raw[:rows], factor, out=out[:rows])
            yield out[:rows]

    providers["scale: numpy take + multiply"] = lambda: sum(len(batch) for batch in numpy_batches())
    return {name: partial(_epochs, once) for name, once in providers.items()}


def _epochs(once: Callable[[], object]) -> None:
    for _ in range(EPOCHS):
        once()


def _count(batches: Iterable[Any], consume: Callable[[torch.Tensor], torch.Tensor] | None = None) -> int:
    images = 0
    for batch in batches:
        x = batch[0] if consume is None else consume(batch[0])
        images += len(x)
    return images


def _row(name: str, timing: Timing, images: int) -> dict[str, Any]:
    mode, provider = name.split(": ")
    return {
        "operation": "loader",
        "provider": provider,
        "mode": mode,
        "metric": "throughput",
        "unit": "images/s",
        "p20": images / timing.p80,
        "p50": images / timing.p50,
        "p80": images / timing.p20,
        "cpu_seconds_per_million": timing.cpu / images * 1e6,
    }


def correct(dataset: Dataset) -> bool:
    """Whether a pass gives exactly x / 255, every example once."""
    seen = torch.zeros(len(dataset), dtype=torch.int64)
    for batch in Loader(dataset, BATCH, transform=Scale()):
        seen[batch.index] += 1
        if not torch.equal(batch.x, dataset[batch.index].float() / 255):
            return False
    return bool((seen == 1).all())


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the ratios, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m ferrovae.bench.loader", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the MNIST files; default: random bytes of the same size")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    if options.data is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (60_000, 28, 28), dtype=torch.uint8, generator=generator)
        dataset = open(images, labels=torch.arange(60_000) % 10)
        source = "synthetic: random bytes, 60000 x 28 x 28 uint8"
    else:
        dataset, source = open(options.data), "MNIST, train"
    # Other work on the machine hides what a second thread gives: a reader must be able to see it.
    before = os.getloadavg()[0]
    result = {
        "data": source,
        "correct": correct(dataset),
        **measure(dataset, rounds=options.rounds),
        "machine": machine(),
        "load_average": [before, os.getloadavg()[0]],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    for row in result["rows"]:
        print(
            f"{row['mode']:>9} {row['provider']:32} {row['p50'] / 1e6:8.3f} M images/s, "
            f"{row['cpu_seconds_per_million']:7.3f} CPU s per million"
        )
    for name, ratio in result["ratios"].items():
        print(f"{ratio:7.2f} x  {name}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What `ferrovae.accelerate` gains: `python -m ferrovae.bench.accelerate [--out JSON]`.

The quantizers of EnCodec, DAC, Mimi (transformers) and VQModel (diffusers) at the sizes of the published models, with
random weights: the quantizer's encoding alone, that of one second only, then the whole model's. Before and after run
interleaved in one process; the ratios are of CPU time. Codes are compared too: how many of all differ.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ferrovae.bench.machine import machine
from ferrovae.bench.measure import Timing, interleaved
from ferrovae.compat import accelerate

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Subject:
    """A model, what goes into its quantizer and into the whole, and how both give their codes."""

    name: str
    sizes: dict[str, int]  # N tokens, K codes, D dimensions, Q stages
    model: nn.Module
    latents: Tensor
    quantize: Callable[[Any, Tensor], Tensor]
    data: Tensor
    encode: Callable[[Any, Tensor], Tensor]
    frames_a_second: int | None = None


def encodec(seconds: int = 10) -> Subject:
    """EnCodec 24 kHz at its highest bandwidth; data of 10 s."""
    from transformers import EncodecConfig, EncodecModel

    model: Any = EncodecModel(EncodecConfig())
    for stage, layer in enumerate(model.quantizer.layers):
        layer.codebook.embed.normal_(std=0.9**stage)
    frames = 75 * seconds
    return Subject(
        "EnCodec 24 kHz, 24 kbit/s",
        {"N": frames, "K": 1024, "D": 128, "Q": 32},
        model,
        torch.randn(1, 128, frames),
        lambda m, x: m.quantizer.encode(x, 24.0),
        torch.randn(1, 1, 240_000),
        lambda m, x: m.encode(x, bandwidth=24.0).audio_codes,
        75,
    )


def mimi(seconds: int = 60) -> Subject:
    """Mimi with all its codebooks; data of 10 s."""
    from transformers import MimiConfig, MimiModel

    model: Any = MimiModel(MimiConfig())
    quantizer = model.quantizer
    stacks = (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer)
    for stack in stacks:
        for stage, layer in enumerate(stack.layers):
            layer.codebook.embed_sum.normal_(std=0.9**stage)
    frames = 25 * seconds // 2
    return Subject(
        "Mimi, 32 codebooks",
        {"N": frames, "K": 2048, "D": 256, "Q": 32},
        model,
        torch.randn(1, 512, frames),
        lambda m, x: m.quantizer.encode(x),
        torch.randn(1, 1, 240_000),
        lambda m, x: m.encode(x).audio_codes,
        13,
    )


def dac(seconds: int = 60) -> Subject:
    """DAC 16 kHz; data of 1 s. The quantizer's time holds its convolutions."""
    from transformers import DacConfig, DacModel

    model: Any = DacModel(DacConfig(n_codebooks=12, downsampling_ratios=[2, 4, 5, 8], hop_length=320))
    for quantizer in model.quantizer.quantizers:
        nn.init.normal_(quantizer.codebook.weight)
    frames = 50 * seconds
    return Subject(
        "DAC 16 kHz",
        {"N": frames, "K": 1024, "D": 8, "Q": 12},
        model,
        torch.randn(1, 1024, frames),
        lambda m, x: m.quantizer(x)[1],
        torch.randn(1, 1, 16_000),
        lambda m, x: m.encode(x).audio_codes,
        50,
    )


def vq_model(images: int = 4) -> Subject:
    """VQ-f4 of latent diffusion; data of one 256 x 256 image."""
    from diffusers import VQModel

    model: Any = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
        num_vq_embeddings=8192,
        vq_embed_dim=3,
    )
    nn.init.normal_(model.quantize.embedding.weight)
    return Subject(
        "VQModel f4",
        {"N": images * 4096, "K": 8192, "D": 3, "Q": 1},
        model,
        torch.randn(images, 3, 64, 64),
        lambda m, x: m.quantize(x)[2][2],
        torch.randn(1, 3, 256, 256),
        # Encoding gives the vectors; what is looked up for them is part of tokenizing an image.
        lambda m, x: m.quantize(m.encode(x).latents)[2][2],
    )


SUBJECTS = {"encodec": encodec, "dac": dac, "mimi": mimi, "vq_model": vq_model}


@torch.inference_mode()
def measure(subject: Subject, *, rounds: int = 7, whole: bool = True) -> list[dict[str, Any]]:
    """Rows for the quantizer, for a second of it, and unless `whole` is False for the whole: times, ratio, codes."""
    theirs = subject.model.eval()
    ours = accelerate(copy.deepcopy(theirs))
    parts = [("quantizer", subject.latents, subject.quantize, rounds)]
    if subject.frames_a_second is not None:
        parts.append(("quantizer, 1 s", subject.latents[..., : subject.frames_a_second], subject.quantize, 3 * rounds))
    if whole:
        parts.append(("whole encoding", subject.data, subject.encode, min(rounds, 5)))
    rows = []
    for part, x, call, times in parts:
        before, after = call(theirs, x), call(ours, x)
        providers: dict[str, Callable[[], object]] = {BEFORE: partial(call, theirs, x), AFTER: partial(call, ours, x)}
        timings = interleaved(providers, rounds=times, warmup=1)
        rows.append(
            {
                "model": subject.name,
                "part": part,
                **subject.sizes,
                "input": list(x.shape),
                "codes": before.numel(),
                "codes_differ": int((before != after).sum()),
                **{name: _times(timing) for name, timing in timings.items()},
                "ratio": timings[BEFORE].cpu / timings[AFTER].cpu,
            }
        )
    return rows


def _times(timing: Timing) -> dict[str, float]:
    return {"cpu_seconds": timing.cpu, "p20": timing.p20, "p50": timing.p50, "p80": timing.p80}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the ratios, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m ferrovae.bench.accelerate", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantizers-only", action="store_true", help="leave out the whole models")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # Other work on the machine hides what a second thread gives: a reader must be able to see it.
    before = os.getloadavg()[0]
    rows = []
    for name in options.models:
        torch.manual_seed(0)
        for row in measure(SUBJECTS[name](), rounds=options.rounds, whole=not options.quantizers_only):
            rows.append(row)
            print(
                f"{row['model']:26} {row['part']:15} {row['before']['cpu_seconds'] * 1e3:9.1f} -> "
                f"{row['after']['cpu_seconds'] * 1e3:8.1f} CPU-ms  {row['ratio']:6.2f} x  "
                f"{row['codes_differ']} of {row['codes']} codes differ",
                flush=True,
            )
    if options.out is not None:
        libraries = [name for name in ("transformers", "diffusers") if name in sys.modules]
        result = {
            "rows": rows,
            "rounds": options.rounds,
            "machine": machine() | {name: version(name) for name in libraries},
            "load_average": [before, os.getloadavg()[0]],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

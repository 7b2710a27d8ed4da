"""The report's pictures: reconstructions, samples, latent traversals, code maps, the worst and the best images."""

from __future__ import annotations

import torch

from ferrovae.report import elements, pictures
from ferrovae.report.evaluation import Evaluation

COLUMNS = 12
TRAVERSED = 8
REACH = 3.0
STAGES = 4


def _strip(images: torch.Tensor, alt: str, width: int = 880) -> str:
    return elements.picture(pictures.grid(images, columns=len(images)), width, alt)


@torch.inference_mode()
def reconstructions(evaluation: Evaluation) -> str:
    """The first test images above what the model makes of them; a VQ-VAE's code maps below.

    Of a residual quantizer the first stages.
    """
    subject = evaluation.subject
    count = min(COLUMNS, len(subject.dataset))
    x = subject.images(list(range(count)))
    pairs = [
        ("real", _strip(subject.displayable(x), "real images")),
        ("reconstruction", _strip(subject.displayable(subject.model.reconstruct(x)), "reconstructions")),
    ]
    if evaluation.usage is not None:
        codes = subject.model.encode(x).cpu()
        staged = codes.ndim > 1 + len(subject.model.grid)
        for number, stage in enumerate(codes.movedim(-1, 0)[:STAGES] if staged else codes[None]):
            colours = pictures.code_map(stage, len(evaluation.usage.counts))
            pairs.append((f"codes, stage {number + 1}" if staged else "codes", _strip(colours, "code maps")))
    return elements.rows(pairs)


@torch.inference_mode()
def samples(evaluation: Evaluation, count: int = 3 * COLUMNS) -> str:
    """Images drawn from the model: z from the prior, then the mean of p(x|z). The same ones at every call."""
    subject = evaluation.subject
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z = subject.model.prior.sample((count,)).to(subject.device)
    images = subject.displayable(subject.model.likelihood(z).mean)
    return elements.picture(pictures.grid(images, COLUMNS), 880, "samples from the prior")


@torch.inference_mode()
def traversal(evaluation: Evaluation) -> str:
    """The decoder's mean as one of the most active latent dimensions moves from -3 to 3 around the first image's z."""
    assert evaluation.units is not None
    subject = evaluation.subject
    mean = subject.model.posterior(subject.images([0])).mean[0]
    order = evaluation.units.variance.flatten().argsort(descending=True)[:TRAVERSED].tolist()
    steps = torch.linspace(-REACH, REACH, COLUMNS + 1, dtype=mean.dtype, device=mean.device)
    pairs = []
    for dimension in order:
        z = mean.flatten().repeat(len(steps), 1)
        z[:, dimension] = steps
        images = subject.model.decode(z.view(len(steps), *mean.shape))
        pairs.append((f"z[{dimension}]", _strip(subject.displayable(images), f"traversal of z[{dimension}]")))
    return elements.rows(pairs)


@torch.inference_mode()
def extremes(evaluation: Evaluation, *, worst: bool, count: int = COLUMNS) -> str:
    """The images the model finds least (or most) probable, above their reconstructions, with log p(x) in nats."""
    subject = evaluation.subject
    order = evaluation.evidence.log_px.argsort(descending=not worst)[:count].tolist()
    x = subject.images(order)
    both = zip(subject.displayable(x), subject.displayable(subject.model.reconstruct(x)), order, strict=True)
    items = []
    for image, reconstruction, index in both:
        pair = pictures.grid(torch.stack([image, reconstruction]), columns=1)
        value = float(evaluation.evidence.log_px[index])
        items.append((elements.picture(pair, 62, f"test image {index}"), f"#{index}: {value:.1f}"))
    return elements.captioned(items)

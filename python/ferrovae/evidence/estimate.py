"""log p(x) by importance sampling, in chunks that never hold more than a stated memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

import torch

from ferrovae.evidence import _rust, examples
from ferrovae.evidence.draws import Draws, log_prob
from ferrovae.evidence.memory import largest_chunk
from ferrovae.evidence.protocol import LatentVariableModel, check_model
from ferrovae.evidence.result import Evidence
from ferrovae.evidence.statistics import from_rows

# Decoder rows (images x samples) in one pass, when memory allows more. On a CPU the activations of one pass should
# stay in the cache; a GPU wants to be filled.
_ROWS = {"cpu": 1024}
_ROWS_ELSEWHERE = 1 << 16

_TERMS = ("log p(x|z)", "log p(z)", "log q(z|x)")


def estimate(
    model: LatentVariableModel,
    x: torch.Tensor | Iterable[Any],
    samples: int = 5000,
    *,
    seed: int = 0,
    memory_budget: int = 256 * 2**20,
    progress: Callable[[int, int | None], None] | None = None,
) -> Evidence:
    """Estimate log p(x) of every image as `log mean_k w_k`, `w_k = p(x|z_k) p(z_k) / q(z_k|x)`, `z_k ~ q(z|x)`.

    In expectation a lower bound for any number of samples (IWAE, Burda et al. 2016); whether it is close, and its
    standard error believable, is judged per image by the Pareto k-hat of its weights (Vehtari et al. 2024).
    A posterior that is a point mass (a VQ-VAE's) has one draw: the result is the bound `log p(x|z) + log p(z)`.

    Args:
        model: a `LatentVariableModel`; a `torch.nn.Module` is put into evaluation mode for the while.
        x: images (N, ...), or a `ferrovae.data.Loader` (iterated once; images are numbered by their dataset index).
        samples: K, draws per image.
        seed: the draws are a function of (seed, image number, sample number) where the posterior has `draw`: the
            same bits for any batch, chunk, thread count or budget. Otherwise torch's generator is seeded with it.
        memory_budget: bytes of tensors alive at one time; decides the chunks, for any K.
        progress: called with (weights computed, weights in all or None where not known), one weight a draw.

    Returns:
        `Evidence`: float64 [N] on the CPU, in nats per image, summed over dimensions.

    Raises:
        TypeError: `model` or `x` is of another kind.
        ValueError: `samples` is below 1, one image with one sample does not fit into the budget, a distribution has
            the wrong batch shape, or a log weight is NaN or +inf (the image is named).
    """
    check_model("estimate", model, "posterior", "likelihood", "prior")
    for name, value in (("samples", samples), ("memory_budget", memory_budget)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"estimate: {name} is {value!r}, expected an integer")
        if value < 1:
            raise ValueError(f"estimate: {name} is {value}, expected at least 1")
    total = examples.count(x)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"estimate: seed is {seed!r}, expected an integer")
    run = _Run(model, samples, seed, progress, None if total is None else total * samples)
    device = examples.device_of(model, x if isinstance(x, torch.Tensor) else torch.empty(0))
    with examples.evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in examples.images("estimate", x):
            run.dims = prod(batch.x.shape[1:])
            if len(batch.x) == 0:
                continue
            if run.chunk is None:
                run.plan(batch, memory_budget)
                torch.manual_seed(seed)
            for part in run.blocks(batch):
                run.block(part)
    return run.result()


@dataclass
class _Run:
    """The state of one call: what to do, how large the chunks are, and what was found so far."""

    model: LatentVariableModel
    samples: int
    seed: int
    progress: Callable[[int, int | None], None] | None
    total: int | None
    done: int = 0
    dims: int = 0
    chunk: tuple[int, int] | None = None
    """Images and samples of one decoder pass."""
    rows: list[_rust.Row] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    point_mass: list[bool] = field(default_factory=list)
    index: list[torch.Tensor] = field(default_factory=list)

    def plan(self, batch: examples.Images, memory_budget: int) -> None:
        """Choose the chunk: enough rows to be fast, few enough for the budget; samples of an image come first."""
        first = examples.Images(batch.x[:1], batch.index[:1])
        draws = self._draws(first)
        draws(0, 1)
        samples = 1 if draws.point_mass else self.samples
        device = examples.device_of(self.model, batch.x)

        def split(rows: int) -> tuple[int, int]:
            columns = min(samples, rows)
            return min(rows // columns, len(batch.x)), columns

        def step(rows: int) -> None:
            count, columns = split(rows)
            part = examples.Images(batch.x[:count], batch.index[:count])
            self._terms(part.x.to(device), self._draws(part), 0, columns)

        limit = min(_ROWS.get(device.type, _ROWS_ELSEWHERE), len(batch.x) * samples)
        self.chunk = split(largest_chunk(step, limit, memory_budget, "estimate: memory_budget"))

    def blocks(self, batch: examples.Images) -> Iterator[examples.Images]:
        """The images that share a pass."""
        assert self.chunk is not None
        for start in range(0, len(batch.x), self.chunk[0]):
            stop = start + self.chunk[0]
            yield examples.Images(batch.x[start:stop], batch.index[start:stop])

    def block(self, part: examples.Images) -> None:
        """All samples of some images."""
        assert self.chunk is not None
        x = part.x.to(examples.device_of(self.model, part.x))
        draws = self._draws(part)
        needed, first = self.samples, 0
        weights = _rust.Weights(len(x), needed)
        sums = torch.zeros(3, len(x), dtype=torch.float64)
        precision = torch.float64
        while first < needed:
            terms, precision = self._terms(x, draws, first, min(self.chunk[1], needed - first))
            if first == 0 and draws.point_mass:
                needed, weights, terms = 1, _rust.Weights(len(x), 1), terms[:, :1]
            log_weights = terms[0] + (terms[1] - terms[2])
            bad = weights.add(log_weights.T)
            if bad is not None:
                self._refuse(part, terms[:, bad[1], bad[0]], *bad, first)
            sums += terms.sum(1)
            first += terms.shape[1]
            self._advance(len(x) * terms.shape[1])
        self._advance(len(x) * (self.samples - needed))
        means = sums / needed
        self.rows += weights.rows(precision)
        self.reconstruction += means[0].tolist()
        self.kl += (means[2] - means[1]).tolist()
        self.point_mass += [draws.point_mass] * len(x)
        self.index.append(part.index)

    def result(self) -> Evidence:
        """What was found."""
        found = from_rows(self.rows)
        point_mass = torch.tensor(self.point_mass, dtype=torch.bool)
        withheld = torch.full_like(found.ess, float("nan"))
        return Evidence(
            log_px=found.log_mean,
            elbo=found.mean,
            reconstruction=torch.tensor(self.reconstruction, dtype=torch.float64),
            kl=torch.tensor(self.kl, dtype=torch.float64),
            standard_error=torch.where(point_mass, withheld, found.standard_error),
            elbo_standard_error=torch.where(point_mass, withheld, found.mean_standard_error),
            ess=found.ess,
            khat=torch.where(point_mass, withheld, found.khat),
            reliable=found.reliable & ~point_mass,
            exact=found.exact & ~point_mass,
            point_mass=point_mass,
            index=torch.cat(self.index) if self.index else torch.empty(0, dtype=torch.int64),
            samples=self.samples,
            dims=self.dims,
        )

    def _draws(self, part: examples.Images) -> Draws:
        x = part.x.to(examples.device_of(self.model, part.x))
        return Draws(self.model.posterior(x), self.seed, part.index.to(x.device))

    def _terms(self, x: torch.Tensor, draws: Draws, first: int, count: int) -> tuple[torch.Tensor, torch.dtype]:
        """log p(x|z), log p(z) and log q(z|x) of the next samples, float64 [3, count, B] on the CPU, and the least
        precise dtype among them."""
        z, log_q = draws(first, count)
        shape = (len(log_q), len(x))
        terms = (
            log_prob("likelihood(z)", self.model.likelihood(z), x, shape),
            log_prob("prior", self.model.prior, z, shape),
            log_q,
        )
        precision = max((term.dtype for term in terms), key=lambda dtype: torch.finfo(dtype).eps)
        return torch.stack([term.cpu().to(torch.float64) for term in terms]), precision

    def _advance(self, weights: int) -> None:
        self.done += weights
        if self.progress is not None and weights:
            self.progress(self.done, self.total)

    def _refuse(self, part: examples.Images, terms: torch.Tensor, row: int, column: int, first: int) -> NoReturn:
        image, sample = int(part.index[row]), first + column
        values = ", ".join(f"{name} = {float(term):g}" for name, term in zip(_TERMS, terms, strict=True))
        raise ValueError(f"estimate: no finite weight for image {image}, sample {sample}: {values}")

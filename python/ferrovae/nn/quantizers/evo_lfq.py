"""An autoencoder with lookup-free codes, and a genetic search among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ferrovae.nn.quantizers.checks import require
from ferrovae.nn.quantizers.lfq import LFQ
from ferrovae.nn.quantizers.sign_codes import bits_of_indices, indices_of_bits

# Called with what the genes decode to, and the genes; one number for each, larger is better.
Fitness = Callable[[Tensor, Tensor], Tensor | Sequence[float]]


class EvoLFQReturn(NamedTuple):
    """What `EvoLFQ` returns."""

    reconstructed: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class EvoLFQResult(NamedTuple):
    """A generation: the next population, and the best gene of those evaluated so far (None before the first)."""

    pop_bits: Tensor
    best_gene: Tensor | None
    best_fitness: float
    best_decoded: Tensor | None


class EvoLFQ(nn.Module):
    """An encoder, lookup-free codes (`LFQ`) and a decoder; a genetic algorithm breeds the bits of codes.

    A generation of P genes keeps its E fittest and breeds P - E: each child has two parents, both the fittest of t
    drawn uniformly; it takes each bit from either with probability 1/2, and flips it with probability r. All draws
    come from torch's generator. Genes are bits, or signs with `is_sign=True`, laid out as the input of the quantizer:
    (P, C d), (P, N, C d), or (P, C d, ...) where it takes channels first.

    Arguments, results and `state_dict` are those of `vector_quantize_pytorch.EvoLFQ` 1.32.

    Args:
        encoder: a module from data to the quantizer's input, (B, dim), (B, N, dim) or (B, dim, ...).
        decoder: a module back.
        lfq: the quantizer; None makes `LFQ(dim=dim, codebook_size=codebook_size, num_codebooks=num_codebooks,
            **lfq_kwargs)`.
        pop_size: P.
        mutation_rate: r.
        tournament_size: t.
        elitism_count: E, less than P.
        generations: of `evolve`.

    Raises:
        ValueError: a count or rate is out of range, or what `LFQ` complains about.
    """

    zero: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        lfq: LFQ | None = None,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        num_codebooks: int = 1,
        pop_size: int = 64,
        mutation_rate: float = 0.02,
        tournament_size: int = 2,
        elitism_count: int = 1,
        generations: int = 50,
        **lfq_kwargs: Any,
    ) -> None:
        super().__init__()
        require(
            self,
            0 <= elitism_count < pop_size,
            f"elitism_count is {elitism_count}, expected 0 to {pop_size - 1}, less than pop_size",
        )
        require(self, 0 <= mutation_rate <= 1, f"mutation_rate is {mutation_rate}, expected a number from 0 to 1")
        require(self, tournament_size >= 1, f"tournament_size is {tournament_size}, expected at least 1")
        self.encoder = encoder
        self.decoder = decoder
        if lfq is None:
            require(
                self,
                dim is not None or codebook_size is not None,
                "none of lfq, dim and codebook_size is given, expected an LFQ or its size",
            )
            lfq = LFQ(dim=dim, codebook_size=codebook_size, num_codebooks=num_codebooks, **lfq_kwargs)
        self.lfq = lfq
        self.pop_size = pop_size
        self.mutation_rate = mutation_rate
        self.tournament_size = tournament_size
        self.elitism_count = elitism_count
        self.generations = generations
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where populations are made."""
        return self.zero.device

    def forward(self, x: Tensor, **kwargs: Any) -> EvoLFQReturn:
        """Encode, quantize and decode; `kwargs` (`inv_temperature`, `mask`) go to the quantizer."""
        quantized, indices, loss = self.lfq(self.encoder(x), **kwargs)
        return EvoLFQReturn(self.decoder(quantized), indices, loss)

    @torch.no_grad()
    def encode(self, x: Tensor, return_signs: bool = False) -> Tensor:
        """The genes of data: bits 0 and 1, or signs -1 and 1; float32."""
        with _evaluating(self):
            latents = self.encoder(x)
            indices = self.lfq(latents).indices
        if not self.lfq.keep_num_codebooks_dim:
            indices = indices[..., None]
        bits = bits_of_indices(indices, self.lfq.mask).flatten(-2)
        if self.lfq.is_channel_first(latents.ndim):
            bits = bits.movedim(-1, 1)
        return torch.where(bits, 1.0, -1.0) if return_signs else bits.float()

    @torch.no_grad()
    def decode_bits(self, bits: Tensor) -> Tensor:
        """The data of genes, bits or signs; in eval mode, so that it is the decoder's output for their codes."""
        lfq = self.lfq
        channel_first = lfq.is_channel_first(bits.ndim)
        axis, genes = 1 if channel_first else -1, lfq.num_codebooks * lfq.codebook_dim
        fits = bits.ndim >= 2 and bits.shape[axis] == genes
        where = f"(P, {genes}, ...)" if channel_first else f"(P, ..., {genes})"
        require(self, fits, f"bits are {tuple(bits.shape)}, expected {where}")
        positive = bits.movedim(axis, -1).unflatten(-1, (lfq.num_codebooks, lfq.codebook_dim)) > 0
        indices = indices_of_bits(positive, lfq.mask)
        with _evaluating(self):
            codes = lfq.output_of_indices(indices, channel_first)
            return self.decoder(codes)

    def init_random_population(
        self,
        pop_size: int | None = None,
        shape: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        is_sign: bool = False,
    ) -> Tensor:
        """Uniformly random genes, (P, *shape) float32."""
        if shape is None:
            raise ValueError("EvoLFQ: shape is None, expected the shape of one gene")
        pop_size = self.pop_size if pop_size is None else pop_size
        bits = torch.randint(0, 2, (pop_size, *shape), device=self.device if device is None else device).float()
        return torch.where(bits > 0, 1.0, -1.0) if is_sign else bits

    def init_population_from_data(
        self, x: Tensor, pop_size: int | None = None, mutation_rate: float | None = None, is_sign: bool = False
    ) -> Tensor:
        """The genes of the first P data, repeated in turn where there are fewer, and mutated."""
        pop_size = self.pop_size if pop_size is None else pop_size
        mutation_rate = self.mutation_rate if mutation_rate is None else mutation_rate
        bits = self.encode(x, return_signs=is_sign)
        require(self, bits.shape[0] > 0, f"x is {tuple(x.shape)}, expected at least one example")
        bits = bits[torch.arange(pop_size, device=bits.device) % bits.shape[0]]
        return self.mutate(bits, mutation_rate=mutation_rate, is_sign=is_sign) if mutation_rate > 0 else bits

    def uniform_crossover(self, parent1: Tensor, parent2: Tensor) -> Tensor:
        """Each entry from either parent with probability 1/2."""
        return torch.where(_uniform(parent1) < 0.5, parent1, parent2)

    def mutate(self, population: Tensor, mutation_rate: float | None = None, is_sign: bool = False) -> Tensor:
        """Each entry flipped with probability r."""
        mutation_rate = self.mutation_rate if mutation_rate is None else mutation_rate
        flipped = -population if is_sign else 1.0 - population
        return torch.where(_uniform(population) < mutation_rate, flipped, population)

    def tournament_selection(self, population: Tensor, fitnesses: Tensor, tournament_size: int | None = None) -> Tensor:
        """P winners: each the fittest of t genes drawn uniformly with replacement, the first drawn among equals."""
        size = population.shape[0]
        return population[self._winners(fitnesses, (size,), size, tournament_size)]

    @torch.no_grad()
    def step(
        self,
        pop_bits: Tensor,
        fitness_fn: Fitness,
        tournament_size: int | None = None,
        mutation_rate: float | None = None,
        elitism_count: int | None = None,
        is_sign: bool = False,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One generation: the next population, its elite first, and the fitnesses (P,) of the one given.

        `batch_size` genes are decoded at a time (default: all).
        """
        size = pop_bits.shape[0]
        elitism_count = self.elitism_count if elitism_count is None else elitism_count
        require(self, 0 <= elitism_count <= size, f"elitism_count is {elitism_count}, expected 0 to {size}")
        chunks = pop_bits.split(size if batch_size is None else batch_size)
        decoded = torch.cat([self.decode_bits(chunk) for chunk in chunks])
        found = fitness_fn(decoded, pop_bits)
        fitnesses = found if isinstance(found, Tensor) else torch.tensor(found, device=self.device, dtype=torch.float32)
        require(self, fitnesses.shape == (size,), f"fitness_fn gave {tuple(fitnesses.shape)}, expected ({size},)")
        elite = pop_bits[fitnesses.argsort(descending=True)[:elitism_count]]
        parents = pop_bits[self._winners(fitnesses, (size - elitism_count, 2), size, tournament_size)]
        children = self.uniform_crossover(*parents.unbind(1))
        children = self.mutate(children, mutation_rate=mutation_rate, is_sign=is_sign)
        return torch.cat([elite, children]), fitnesses

    @torch.no_grad()
    def evolve(
        self,
        fitness_fn: Fitness,
        pop_bits: Tensor | None = None,
        pop_size: int | None = None,
        shape: Sequence[int] | None = None,
        generations: int | None = None,
        is_sign: bool = False,
        return_best_decoded: bool = False,
        **step_kwargs: Any,
    ) -> Iterator[EvoLFQResult]:
        """Generation after generation, from `pop_bits` or else random genes of `shape`; `step_kwargs` go to `step`."""
        if pop_bits is None:
            require(self, shape is not None, "neither pop_bits nor shape is given, expected one of them")
            pop_bits = self.init_random_population(pop_size, shape, is_sign=is_sign)
        best_gene, best_fitness = None, float("-inf")
        for _ in range(self.generations if generations is None else generations):
            evaluated = pop_bits
            pop_bits, fitnesses = self.step(evaluated, fitness_fn, is_sign=is_sign, **step_kwargs)
            fittest = fitnesses.argmax()
            fitness = fitnesses[fittest].item()
            if fitness > best_fitness:
                best_gene, best_fitness = evaluated[fittest].clone(), fitness
            best_decoded = None
            if return_best_decoded and best_gene is not None:
                best_decoded = self.decode_bits(best_gene[None])[0]
            yield EvoLFQResult(pop_bits, best_gene, best_fitness, best_decoded)

    def _winners(self, fitnesses: Tensor, shape: tuple[int, ...], size: int, tournament_size: int | None) -> Tensor:
        """Places in the population, int64 of `shape`."""
        tournament_size = self.tournament_size if tournament_size is None else tournament_size
        contenders = torch.randint(0, size, (*shape, tournament_size), device=self.device)
        first = fitnesses[contenders].argmax(dim=-1, keepdim=True)
        return contenders.gather(-1, first).squeeze(-1)


def _uniform(like: Tensor) -> Tensor:
    """A draw for each entry, the same however the entries lie in memory."""
    return torch.rand(like.shape, device=like.device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards for each module the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

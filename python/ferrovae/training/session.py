"""One run in one process: its data, model, optimiser and place in training, and their way to disk and back."""

from __future__ import annotations

import dataclasses
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ferrovae import __version__, data
from ferrovae.training import checkpoint, run
from ferrovae.training.averaging import averaged
from ferrovae.training.build import build_model, open_data, start_at_the_mean, transform_for
from ferrovae.training.configuration import Configuration, TrainVAE
from ferrovae.training.distributed import Ranks
from ferrovae.training.errors import CheckpointError, ConfigurationError, NonFiniteError
from ferrovae.training.keys import step_seed
from ferrovae.training.schedule import kl_weight, learning_rate, warmup_steps
from ferrovae.training.state import optimizer_tensors, restore_optimizer


class _Objective(nn.Module):
    """`model.objective` as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.objective(*args, **kwargs)  # type: ignore[operator]


@dataclasses.dataclass
class Standing:
    """Where training is: everything of a checkpoint that is not a tensor and not the loader's."""

    step: int = 0
    best_step: int | None = None
    best_elbo: float = -math.inf
    validations_since_best: int = 0
    finished: bool = False


class Session:
    """What the loop works on. Nothing is written before `save`."""

    def __init__(self, config: Configuration, run_dir: Path, ranks: Ranks) -> None:
        self.config, self.run_dir, self.ranks = config, run_dir, ranks
        if config.batch_size % ranks.world_size:
            raise ConfigurationError(
                f"batch_size is {config.batch_size}, expected a multiple of the {ranks.world_size} ranks"
            )
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)
        self.dataset = open_data(config, "train")
        self.steps_per_epoch = len(self.dataset) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigurationError(
                f"batch_size is {config.batch_size}, more than the {len(self.dataset)} training images"
            )
        self.steps = min(config.epochs * self.steps_per_epoch, config.max_steps or 2**62)
        epochs = config.kl_warmup_epochs if isinstance(config, TrainVAE) else 0.0
        self.warmup = warmup_steps(epochs, self.steps_per_epoch, self.steps)
        self.loader = self._loader(self.dataset, config.batch_size, seed=config.seed, drop_last=True)
        self.validation: data.Loader | None = None
        if config.validation_fraction > 0:
            held_out = open_data(config, "validation")
            share = -(-512 // ranks.world_size)
            options = {"seed": 0, "shuffle": False, "fixed_epoch": 0}  # the same draws at every validation
            self.validation = self._loader(held_out, share * ranks.world_size, **options)

        self.model = build_model(config, tuple(self.dataset.shape))
        start_at_the_mean(self.model, self.dataset)
        self.model.to(ranks.device)
        self.ema = None if config.ema_decay is None else averaged(self.model, config.ema_decay)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, fused=True)
        self._forward: nn.Module = _Objective(self.model)
        if ranks.world_size > 1:
            self._forward = DistributedDataParallel(self._forward, broadcast_buffers=False)
        self.standing = Standing()

    def advance(self, batch: data.Batch) -> Any:
        """One step on `batch`; returns its `Objective`. Draws are keyed by (seed, step, dataset index)."""
        config, step = self.config, self.standing.step
        rate = learning_rate(
            step,
            self.steps,
            first=config.learning_rate,
            final=config.learning_rate if config.final_learning_rate is None else config.final_learning_rate,
            shape=config.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed = step_seed(config.seed, step)
        # Whatever draws from torch's own generator (a codebook's start, say) is a function of the step too: the
        # generator's state needs no place in a checkpoint, and is equal on all ranks and any number of them.
        torch.default_generator.manual_seed(seed)
        if self.ranks.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        options = {"beta": kl_weight(step, self.warmup), "seed": seed, "example_ids": batch.index}
        if isinstance(config, TrainVAE):
            options["free_bits"] = config.free_bits
        with self._autocast():
            objective = self._forward(batch.x, **options)
        # The range of the data has been checked once; the loader checks for NaN, and `Watch` sees one in the loss.
        self.model.likelihood_family.validate_args = False
        self.optimizer.zero_grad(set_to_none=True)
        objective.loss.backward()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.standing.step = step + 1
        return objective

    @property
    def evaluated(self) -> nn.Module:
        """The model that validation sees: the averaged weights, where there are any."""
        return self.model if self.ema is None else self.ema.module

    @property
    def epoch(self) -> int:
        """The epoch of the last step, from 1."""
        return max(0, self.standing.step - 1) // self.steps_per_epoch + 1

    def save(self) -> None:
        """Write a checkpoint (the first rank) and remove those that are no longer kept.

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing is written.
            CheckpointError: the disk would not take it; earlier checkpoints are untouched.
        """
        self._require_finite()
        if self.ranks.first:
            tensors = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.optimizer, self.model)}
            if self.ema is not None:
                tensors["ema"] = self.ema.module.state_dict()
            standing = dataclasses.asdict(self.standing)
            if not math.isfinite(self.standing.best_elbo):
                standing["best_elbo"] = None
            state = {
                **standing,
                "epoch": self.epoch,
                "loader": self.loader.state_dict(),
                "data": self._data(),
                "world_size": self.ranks.world_size,
                "versions": {"ferrovae": __version__, "torch": str(torch.__version__)},
            }
            checkpoint.write(self.run_dir, self.standing.step, checkpoint.Checkpoint(tensors, state))
            checkpoint.prune(self.run_dir, self.config.keep_checkpoints, also=self.standing.best_step)
        self.ranks.wait()

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go back to where `save` was called.

        Raises:
            CheckpointError: it belongs to another model or other data.
        """
        state, where = saved.state, checkpoint.directory(self.run_dir, saved.state["step"])
        mine = self._data()
        if state["data"] != mine:
            differing = next(key for key in mine if state["data"].get(key) != mine[key])
            raise CheckpointError(
                f"{where}: was trained on other data (its {differing} is {state['data'].get(differing)!r}, "
                f"that of {self.config.data!r} is {mine[differing]!r})"
            )
        run.restore_model(self.model, saved.tensors["model"], where)
        if self.ema is not None:
            run.restore_model(self.ema.module, saved.tensors["ema"], where)
            self.ema.n_averaged.fill_(state["step"])
        restore_optimizer(self.optimizer, self.model, saved.tensors["optimizer"], where)
        self.loader.load_state_dict(state["loader"])
        names = [field.name for field in dataclasses.fields(Standing)]
        self.standing = Standing(**{name: state[name] for name in names})
        if self.standing.best_elbo is None:
            self.standing.best_elbo = -math.inf

    def _data(self) -> dict[str, Any]:
        return {
            "fingerprint": self.dataset.fingerprint,
            "length": len(self.dataset),
            "shape": list(self.dataset.shape),
        }

    def _loader(self, dataset: data.Dataset, batch_size: int, **options: Any) -> data.Loader:
        return data.Loader(
            dataset,
            batch_size,
            transform=transform_for(self.config),
            device=None if self.ranks.device.type == "cpu" else self.ranks.device,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            **options,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def _require_finite(self) -> None:
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        bad = [name for name, tensor in named if not tensor.isfinite().all()]
        if bad:
            raise NonFiniteError(f"step {self.standing.step}: {bad[0]} is not finite, though the loss still was")

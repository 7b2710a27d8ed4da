"""The training loop: steps, log, validation, checkpoints, early stopping, and a clean end whatever happens."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ferrovae.training import checkpoint, run
from ferrovae.training.configuration import Configuration
from ferrovae.training.distributed import ranks
from ferrovae.training.errors import Interrupted, NonFiniteError
from ferrovae.training.interrupt import StopWish
from ferrovae.training.lock import locked
from ferrovae.training.progress import Progress, Silent
from ferrovae.training.serialization import load_configuration
from ferrovae.training.session import Session
from ferrovae.training.validation import validate
from ferrovae.training.watch import Watch


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `validation` is the last line of its validation curve, if it has one."""

    run_dir: Path
    step: int
    epoch: int
    best_step: int | None
    validation: dict[str, Any] | None


def train(config: Configuration, progress: Progress | None = None) -> Outcome:
    """Train from the start, into a new run directory.

    Raises:
        ConfigurationError: a setting cannot be meant, or the directory holds a run already.
        DataError: the data are not what they should be.
        NonFiniteError: the loss became NaN or infinite; the message names step, examples and last good checkpoint.
        CheckpointError: a checkpoint could not be written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    config.validate()
    source = Path(config.data)
    config = replace(config, data=str(source.resolve()) if source.exists() else config.data)
    run_dir = Path(config.run_dir or f"runs/{config.kind}-{source.name.split('.')[0]}")
    with ranks(config.device) as mine:
        session = Session(config, run_dir, mine)
        if mine.first:
            run.create(run_dir, replace(config, run_dir=None))
        with locked(run_dir) if mine.first else nullcontext():
            return _fit(session, progress or Silent())


def resume(run_dir: Path, *, data: str | None = None, progress: Progress | None = None) -> Outcome:
    """Go on with a run from its newest whole checkpoint, to the numbers an uninterrupted run would have had.

    Args:
        data: where the data are now, when they have moved since.
        progress: hears of it.

    Raises: what `train` raises, ConfigurationError when another process trains the run, and CheckpointError when no
        checkpoint is whole or the data are others.
    """
    progress = progress or Silent()
    config = load_configuration(run_dir)
    if data is not None:
        config = replace(config, data=data)
    with ranks(config.device) as mine, locked(run_dir) if mine.first else nullcontext():
        session = Session(config, run_dir, mine)
        saved = checkpoint.read_newest(run_dir, progress.say)
        if saved is not None:
            session.restore(saved)
        mine.wait()
        if mine.first:
            run.rewind_metrics(run_dir, session.standing.step)
        return _fit(session, progress)


def _fit(session: Session, progress: Progress) -> Outcome:
    config, standing = session.config, session.standing
    loop = _Loop(session, progress)
    with StopWish() as wish, progress:
        progress.begin(f"{config.kind} in {session.run_dir}", standing.step, session.steps)
        try:
            while session.standing.step < session.steps and not session.standing.finished:
                for batch in session.loader:
                    loop.step(batch)
                    if session.standing.step >= session.steps or loop.stops(wish, inside_epoch=True):
                        break
                if not loop.stopping:
                    loop.end_epoch()
                if loop.stopping or loop.stops(wish):
                    loop.save()
                    raise Interrupted(
                        f"stopped after step {session.standing.step} of {session.steps}, which is saved; "
                        f"go on with: ferrovae train --resume {session.run_dir}"
                    )
        except NonFiniteError as error:
            kept = checkpoint.steps(session.run_dir)
            good = (
                f"is {checkpoint.directory(session.run_dir, kept[-1])}" if kept else "does not exist: none was written"
            )
            raise NonFiniteError(f"{error}; the last good checkpoint {good}") from None
        validations = [record for record in run.read_metrics(session.run_dir) if record["split"] == "validation"]
        last = validations[-1] if validations else None
        return Outcome(session.run_dir, session.standing.step, session.epoch, session.standing.best_step, last)


class _Loop:
    """What happens between the steps."""

    def __init__(self, session: Session, progress: Progress) -> None:
        self.session, self.progress = session, progress
        self.watch = Watch(session.ranks)
        self.stopping = False
        self._saved = session.standing.step if session.standing.step else -1
        self._clock, self._clock_step = time.perf_counter(), session.standing.step

    def step(self, batch: Any) -> None:
        """One step, and a log line and a checkpoint when they are due."""
        session = self.session
        objective = session.advance(batch)
        step = session.standing.step
        self.watch.record(step, batch.index, objective)
        if step % session.config.log_every == 0:
            self.log()
        every = session.config.checkpoint_every
        if every is not None and step % every == 0 and step % session.steps_per_epoch:
            self.save()

    def end_epoch(self) -> None:
        """At the end of an epoch, or of training: validation, early stopping, checkpoint."""
        session, standing, config = self.session, self.session.standing, self.session.config
        self.log()
        last = standing.step >= session.steps
        improved = False
        if session.validation is not None and (last or session.epoch % config.validate_every == 0):
            improved = self._validate()
        out_of_patience = config.patience is not None and standing.validations_since_best >= config.patience
        if out_of_patience:
            self.progress.say(
                f"no better validation ELBO in {config.patience} validations: stopped after epoch {session.epoch}; "
                f"the best checkpoint is that of step {standing.best_step}"
            )
        standing.finished = last or out_of_patience
        every = config.checkpoint_every
        due = every is None or standing.step % every == 0
        if due or standing.finished or (improved and config.patience is not None):
            self.save()
        self._restart_clock()

    def log(self) -> None:
        """Check the steps since the last time, and write their means."""
        session = self.session
        means = self.watch.check()
        if not means:
            return
        done = session.standing.step - self._clock_step
        rate = done * session.config.batch_size / max(time.perf_counter() - self._clock, 1e-9)
        self._write("train", {**means, "images_per_second": rate})
        self._restart_clock()

    def save(self) -> None:
        """A checkpoint of this step, unless there is one; never of a NaN."""
        step = self.session.standing.step
        if self._saved == step and not self.session.standing.finished:
            return
        self.log()
        self.session.save()
        self._saved = step
        self._restart_clock()

    def stops(self, wish: StopWish, *, inside_epoch: bool = False) -> bool:
        """Whether any rank was asked to stop. Several ranks agree where they meet: at a log line, or after an epoch."""
        session = self.session
        step = session.standing.step
        if session.standing.finished or (inside_epoch and step % session.steps_per_epoch == 0):
            return False  # the end of an epoch is finished first
        if session.ranks.world_size == 1:
            self.stopping = wish.wished
        elif not inside_epoch or step % session.config.log_every == 0:
            self.stopping = any(session.ranks.gather(wish.wished))
        return self.stopping

    def _validate(self) -> bool:
        session, standing = self.session, self.session.standing
        assert session.validation is not None
        means = validate(session.evaluated, session.validation, session.ranks)
        self._write("validation", means)
        improved = means["elbo"] > standing.best_elbo
        if improved:
            standing.best_elbo, standing.best_step, standing.validations_since_best = means["elbo"], standing.step, 0
        else:
            standing.validations_since_best += 1
        return improved

    def _write(self, split: str, means: dict[str, float]) -> None:
        session = self.session
        record = {"step": session.standing.step, "epoch": session.epoch, "split": split, **means}
        if session.ranks.first:
            with (session.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.progress.metrics(record)

    def _restart_clock(self) -> None:
        self._clock, self._clock_step = time.perf_counter(), self.session.standing.step

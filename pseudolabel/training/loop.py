"""The training loop: batch after batch to the learner; now and then validate, keep the best, save the state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pseudolabel.checkpoint import load_state, load_tensors, save_state
from pseudolabel.dataset import Batch, CarriedErrors, TrainingBatches
from pseudolabel.errors import Diverged, PseudolabelError
from pseudolabel.forkserver import fork_server
from pseudolabel.processes import LOOK_EVERY, explained_loader_deaths, helper_start, wait_for
from pseudolabel.rundir import RunDirectory
from pseudolabel.training.distributed import State, Team
from pseudolabel.training.image_cache import CacheMode
from pseudolabel.training.learner import Learner
from pseudolabel.training.optim import learning_rate
from pseudolabel.training.setup import Training
from pseudolabel.training.step_times import StepTimes
from pseudolabel.training.tracking import Tracking

LOG_EVERY = 20
_STATE = ("model", "best", "optimizer", "average")
_LOADER_PATIENCE = 300.0  # seconds for one batch; a loader whose shared memory is full hangs


@dataclass(frozen=True)
class TrainProgress:
    """Told every few steps."""

    step: int
    steps: int
    loss: float
    samples_per_second: float
    val_accuracy: float | None


class TrainingLoop:
    """One training run: the learner and all other state that a checkpoint must hold.

    Each process of a team has a loop of its own, in step with the others; only process 0's touches the run directory.
    """

    def __init__(
        self,
        training: Training,
        run: RunDirectory,
        device: torch.device,
        workers: int,
        team: Team | None = None,
        *,
        cache: CacheMode = "off",
        profile: bool = False,
        on_note: Callable[[str], None] | None = None,
        tracking: Tracking | None = None,
        log_every: int = LOG_EVERY,
    ) -> None:
        settings = training.settings
        self._settings, self._steps, self._validation = settings, training.steps, training.validation
        self._run, self._device, self._workers, self._tracking = run, device, workers, tracking
        self._team = team or Team()
        self._first = self._team.world.first
        self.learner = Learner(settings, training.card, training.data, device, self._team, training.start)
        self.times = StepTimes(device, on=profile)
        self._batches = TrainingBatches(
            training.data,
            training.card.preprocessing,
            settings.augment,
            batch_size=settings.batch_size,
            labeled_fraction=settings.labeled_fraction,
            seed=settings.seed,
            steps=training.steps,
            world=self._team.world,
        )
        self._cache: CacheMode = cache
        self._log_every = log_every
        self._on_note = on_note if on_note is not None and self._first else (lambda note: None)
        self._best: dict[str, Tensor] = {}
        self._facts: dict[str, Any] = {"step": 0, "best_step": 0, "best_accuracy": None, "seconds": 0.0}

    def run_to_the_end(self, on_progress: Callable[[TrainProgress], None] | None) -> tuple[int, float | None, float]:
        """Train all steps that are left. Returns the best step, its accuracy, and the seconds spent before a resume."""
        self._resume()
        if self._tracking is not None:
            self._tracking.begin(int(self._facts["step"]))
        earlier, started = float(self._facts["seconds"]), time.monotonic()
        eval_every = self._settings.eval_every or max(self._steps // 10, 1)
        mark, marked_step = time.monotonic(), int(self._facts["step"])
        for step, batch in enumerate(self.batches_from(marked_step), start=marked_step):
            rate = learning_rate(self._settings, step, self._steps)
            self.learner.seed(step)
            with self.times.during("copy"):
                batch = batch.to(self._device)
            losses = self.learner.step(batch, rate, step, self.times)
            self.times.steps += 1
            done = step + 1
            accuracy: float | None = None
            if validates := done % eval_every == 0 or done == self._steps:
                with self.times.during("validate"):
                    accuracy = self._validate(done)
            if validates or done % self._log_every == 0:
                speed = (done - marked_step) * self._settings.batch_size / max(time.monotonic() - mark, 1e-9)
                mark, marked_step = time.monotonic(), done
                loss = self._log(done, losses, batch, rate, speed, accuracy)
                if on_progress is not None:
                    on_progress(TrainProgress(done, self._steps, loss, speed, accuracy))
            if done % eval_every == 0 and done < self._steps:
                self._facts |= {"step": done, "seconds": earlier + time.monotonic() - started}
                if self._first:
                    with self.times.during("save"):
                        self._save()
        return int(self._facts["best_step"]), self._facts["best_accuracy"], earlier

    def _log(self, step: int, losses: Tensor, batch: Batch, rate: float, speed: float, accuracy: float | None) -> float:
        """A line of metrics.jsonl, for the trackers, too; returns the loss. Raises `Diverged` if it isn't finite."""
        loss, of_labels, of_soft = self._team.sum(losses)
        if not math.isfinite(loss):
            raise Diverged(
                f"{self._run.place}: the loss is {loss} at step {step}; use a smaller --lr, or --precision fp32"
            )
        record: dict[str, Any] = {"step": step, "loss": loss}
        if batch.targets is not None:
            record |= {"label_loss": of_labels} if batch.num_labeled else {}
            record["soft_loss"] = of_soft
        record |= {"lr": rate, "samples_per_second": round(speed, 1), "val_accuracy": accuracy}
        if self._first:
            self._run.log(record)
        if self._tracking is not None:
            self._tracking.log(record)
        return loss

    def best_body(self) -> nn.Module:
        """The network with the weights to keep."""
        body = self.learner.averaged_body
        if self._best:
            load_tensors(body, self._best)
        if not all(bool(torch.isfinite(one).all()) for one in body.state_dict().values() if one.is_floating_point()):
            raise Diverged(
                f"{self._run.place}: the weights are no longer finite; use a smaller --lr, or --precision fp32"
            )
        return body

    def _validate(self, step: int) -> float | None:
        body = self.learner.averaged_body
        # On CPUs each process's batch norms have seen other rows: from here on process 0's count, after a resume, too.
        self._team.take_from_first(
            [*self.learner.body.buffers(), *(body.buffers() if body is not self.learner.body else ())]
        )
        accuracy = (
            self._validation.accuracy(nn.Sequential(self.learner.normalize, body))
            if self._validation is not None
            else None
        )
        best = self._facts["best_accuracy"]
        if accuracy is None or best is None or accuracy > best:
            self._facts |= {"best_step": step, "best_accuracy": accuracy}
            if self._first:
                self._best = {name: tensor.detach().clone() for name, tensor in body.state_dict().items()}
        return accuracy

    def batches_from(self, start: int) -> Iterator[Batch]:
        """The batches of steps `start` on, made ahead by loader processes if there are any."""
        if start < self._steps:
            with self.times.during("load"):
                self._batches.keep_images(self._cache, workers=self._workers, on_note=self._on_note)
        if self._workers == 0:
            for step in range(start, self._steps):
                with self.times.during("load"):
                    batch = self._batches[step]
                yield batch
            return
        loader = DataLoader(
            CarriedErrors(self._batches),
            batch_size=None,
            sampler=range(start, self._steps),
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            multiprocessing_context=fork_server(),
            timeout=LOOK_EVERY,
            worker_init_fn=helper_start(),
        )
        with explained_loader_deaths():
            arriving = iter(loader)
            for _ in range(start, self._steps):
                with self.times.during("load"):
                    batch = wait_for(arriving, _LOADER_PATIENCE)
                if isinstance(batch, PseudolabelError):
                    raise batch
                yield batch

    def _save(self) -> None:
        groups, scaler = self.learner.state()
        groups["best"] = self._best
        self._run.save(lambda path, facts: save_state(path, {**facts, **self._facts, "scaler": scaler}, groups))

    def _resume(self) -> None:
        state = self._team.state_from_first(self._read_state() if self._first else None)
        if state is None:
            return
        facts, groups = state
        self._facts = {name: facts[name] for name in self._facts}
        self._on_note(f"going on from the checkpoint of step {self._facts['step']} of {self._steps}")
        if self._first:
            self._best = {name: tensor.to(self._device) for name, tensor in groups["best"].items()}
        self.learner.load_state(groups, facts["scaler"])

    def _read_state(self) -> State | None:
        """The last checkpoint, if there is one; the log is cut back to it."""
        if not self._run.state_path.exists():
            return None
        facts, groups = load_state(self._run.state_path, _STATE)
        self._run.check(facts)
        self._run.cut_log(int(facts["step"]))
        return facts, groups

"""The training loop and all state that a checkpoint must hold.

batch → student → (1−α)·CE + α·T²·KL → step; now and then: validate, keep the best, save the state
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pseudolabel.checkpoint import ModelCard, flatten_optimizer, load_state, restore_optimizer, save_state
from pseudolabel.dataset import Batch, CarriedErrors, TrainingBatches
from pseudolabel.distributed import State, Team
from pseudolabel.errors import Diverged, OutOfMemory, PseudolabelError, SpecError, WorkerDied
from pseudolabel.forkserver import fork_server
from pseudolabel.inputs import TrainingData
from pseudolabel.layout import training_layout
from pseudolabel.losses import Mixture
from pseudolabel.optim import learning_rate, make_average, make_optimizer
from pseudolabel.order import derive_seeds
from pseudolabel.precision import autocast
from pseudolabel.processes import helper_start
from pseudolabel.rundir import RunDirectory
from pseudolabel.settings import TrainSettings
from pseudolabel.tracking import Tracking
from pseudolabel.validate import Validation
from pseudolabel.views.image import Normalize

_LOG_EVERY = 20
_STATE = ("model", "best", "optimizer", "average")
_LOADER_TIMEOUT = 300.0  # seconds for one batch; a loader whose shared memory is full hangs


@dataclass(frozen=True)
class TrainProgress:
    """Told every few steps."""

    step: int
    steps: int
    loss: float
    samples_per_second: float
    val_accuracy: float | None


class TrainingLoop:
    """One training run: the model and all state that a checkpoint must hold.

    Each process of a team has a loop of its own, in step with the others; only process 0's touches the run directory.
    """

    def __init__(
        self,
        settings: TrainSettings,
        card: ModelCard,
        data: TrainingData,
        validation: Validation | None,
        run: RunDirectory,
        steps: int,
        device: torch.device,
        workers: int,
        team: Team | None = None,
        tracking: Tracking | None = None,
    ) -> None:
        if settings.precision == "fp16" and device.type != "cuda":
            raise SpecError("--precision fp16 needs a GPU (its gradients underflow without scaling); use fp32 or bf16")
        self._settings, self._validation, self._run, self._steps, self._device, self._workers = (
            settings,
            validation,
            run,
            steps,
            device,
            workers,
        )
        self._tracking = tracking
        self._team = team or Team()
        self._first = self._team.world.first
        self._num_classes = len(card.classes)
        torch.manual_seed(settings.seed)
        self.body = self._team.with_shared_norms(card.build(), device).to(device)
        self._layout = training_layout(self.body)
        self.body.to(memory_format=self._layout)
        self._team.take_from_first(self.body.state_dict().values())
        self._normalize = Normalize(card.preprocessing).to(device)
        self._average = make_average(self.body, settings.ema) if settings.ema else None
        self._optimizer = make_optimizer(self.body, settings)
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._mixture = Mixture(settings.alpha, settings.temperature, settings.loss)
        self._calibration = data.calibration
        self._batches = TrainingBatches(
            data,
            card.preprocessing,
            settings.augment,
            batch_size=settings.batch_size,
            labeled_fraction=settings.labeled_fraction,
            seed=settings.seed,
            steps=steps,
            world=self._team.world,
        )
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
            self._seed(step)
            loss = self.step(batch.to(self._device), rate)
            done = step + 1
            accuracy: float | None = None
            if done % eval_every == 0 or done == self._steps:
                accuracy = self._validate(done)
            if done % _LOG_EVERY == 0 or done % eval_every == 0 or done == self._steps:
                value = self._team.sum(loss)
                if value != value or value in (float("inf"), float("-inf")):
                    raise Diverged(
                        f"{self._run.place}: the loss is {value} at step {done}; "
                        "use a smaller --lr, or --precision fp32"
                    )
                speed = (done - marked_step) * self._settings.batch_size / max(time.monotonic() - mark, 1e-9)
                mark, marked_step = time.monotonic(), done
                record = {"step": done, "loss": value, "lr": rate, "samples_per_second": round(speed, 1)}
                if self._first:
                    self._run.log({**record, "val_accuracy": accuracy})
                if self._tracking is not None:
                    self._tracking.log({**record, "val_accuracy": accuracy})
                if on_progress is not None:
                    on_progress(TrainProgress(done, self._steps, value, speed, accuracy))
            if done % eval_every == 0 and done < self._steps:
                self._facts |= {"step": done, "seconds": earlier + time.monotonic() - started}
                if self._first:
                    self._save()
        return int(self._facts["best_step"]), self._facts["best_accuracy"], earlier

    def best_body(self) -> nn.Module:
        """The network with the weights to keep."""
        body = self._average.module if self._average is not None else self.body
        if self._best:
            body.load_state_dict(self._best)
        if not all(bool(torch.isfinite(one).all()) for one in body.state_dict().values() if one.is_floating_point()):
            raise Diverged(
                f"{self._run.place}: the weights are no longer finite; use a smaller --lr, or --precision fp32"
            )
        return body

    def step(self, batch: Batch, rate: float) -> Tensor:
        """One optimizer step at learning rate `rate`; returns the loss, detached, on the device: a team's losses add
        up to the batch's.
        """
        try:
            with self._team.watching():
                return self._step(batch, rate)
        except torch.OutOfMemoryError as error:
            rows = len(batch.labels_B)
            raise OutOfMemory(f"{self._device}: {rows} rows a step don't fit; use a smaller --batch-size") from error

    def _seed(self, step: int) -> None:
        """Dropout and its like draw from here on what follows from step and process alone: nothing to save."""
        seed = derive_seeds(1, self._settings.seed, 4, step, self._team.world.rank)[0]
        if self._device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def _step(self, batch: Batch, rate: float) -> Tensor:
        self.body.train()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        pixels_BCHW = self._normalize(batch.pixels_BCHW).contiguous(memory_format=self._layout)
        with autocast(self._settings.precision, self._device):
            logits_BC = self.body(pixels_BCHW)
        if not isinstance(logits_BC, Tensor) or logits_BC.shape != (len(batch.labels_B), self._num_classes):
            found = tuple(logits_BC.shape) if isinstance(logits_BC, Tensor) else type(logits_BC).__name__
            raise SpecError(
                f"{self._settings.student}: must give logits of shape (batch, {self._num_classes}), gave {found}"
            )
        loss = self._mixture(
            logits_BC,
            batch.labels_B,
            batch.targets.read_as(self._settings.tail, self._calibration) if batch.targets is not None else None,
            batch.soft_weight_B,
            num_labeled=batch.num_labeled,
            num_soft=batch.num_soft,
        )
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self._scaler.scale(loss))
        self._team.sum_gradients(self.body)
        if self._settings.clip_norm:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.body.parameters(), self._settings.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self.body)
        return loss.detach()

    def _validate(self, step: int) -> float | None:
        body = self._average.module if self._average is not None else self.body
        # On CPUs each process's batch norms have seen other rows: from here on process 0's count, after a resume, too.
        self._team.take_from_first([*self.body.buffers(), *(body.buffers() if body is not self.body else ())])
        accuracy = (
            self._validation.accuracy(nn.Sequential(self._normalize, body)) if self._validation is not None else None
        )
        best = self._facts["best_accuracy"]
        if accuracy is None or best is None or accuracy > best:
            self._facts |= {"best_step": step, "best_accuracy": accuracy}
            if self._first:
                self._best = {name: tensor.detach().clone() for name, tensor in body.state_dict().items()}
        return accuracy

    def batches_from(self, start: int) -> Iterator[Batch]:
        """The batches of steps `start` on, made ahead by loader processes if there are any."""
        if self._workers == 0:
            for step in range(start, self._steps):
                yield self._batches[step]
            return
        loader = DataLoader(
            CarriedErrors(self._batches),
            batch_size=None,
            sampler=range(start, self._steps),
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            multiprocessing_context=fork_server(),
            timeout=_LOADER_TIMEOUT,
            worker_init_fn=helper_start(),
        )
        try:
            for batch in loader:
                if isinstance(batch, PseudolabelError):
                    raise batch
                yield batch
        except (RuntimeError, OSError) as error:
            if isinstance(error, RuntimeError) and "DataLoader" not in str(error):
                raise
            raise WorkerDied(
                "a loader process ended (killed, out of memory, or /dev/shm full?)\n"
                "run the same command again, perhaps with --workers 0: it goes on from the last checkpoint"
            ) from error

    def _save(self) -> None:
        groups = {"model": self.body.state_dict(), "best": self._best, "optimizer": flatten_optimizer(self._optimizer)}
        if self._average is not None:
            groups["average"] = self._average.state_dict()
        self._run.save(
            lambda path, facts: save_state(path, {**facts, **self._facts, "scaler": self._scaler.state_dict()}, groups)
        )

    def _resume(self) -> None:
        state = self._team.state_from_first(self._read_state() if self._first else None)
        if state is None:
            return
        facts, groups = state
        self._facts = {name: facts[name] for name in self._facts}
        self.body.load_state_dict(groups["model"])
        if self._first:
            self._best = {name: tensor.to(self._device) for name, tensor in groups["best"].items()}
        if self._average is not None:
            self._average.load_state_dict(groups["average"])
        restore_optimizer(self._optimizer, groups["optimizer"])
        self._scaler.load_state_dict(facts["scaler"])

    def _read_state(self) -> State | None:
        """The last checkpoint, if there is one; the log is cut back to it."""
        if not self._run.state_path.exists():
            return None
        facts, groups = load_state(self._run.state_path, _STATE)
        self._run.check(facts)
        self._run.cut_log(int(facts["step"]))
        return facts, groups

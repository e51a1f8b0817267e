"""A student that learns from batches: its network, optimizer, averaged weights, and the step.

batch → (mix) → student → (1−α)·CE + α·soft loss → gradients → update
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pseudolabel.checkpoint import ModelCard, flatten_optimizer, load_tensors, restore_optimizer
from pseudolabel.dataset import Batch
from pseudolabel.errors import OutOfMemory, SpecError
from pseudolabel.layout import training_layout
from pseudolabel.losses import Losses, Mixture
from pseudolabel.precision import autocast
from pseudolabel.settings import TrainSettings
from pseudolabel.students.start import Start
from pseudolabel.training.distributed import Team
from pseudolabel.training.inputs import TrainingData
from pseudolabel.training.label_balance import label_loss
from pseudolabel.training.mixing import Mix, draw_mix, partners
from pseudolabel.training.optim import make_average, make_optimizer
from pseudolabel.training.order import derive_seeds
from pseudolabel.training.starting import start_from
from pseudolabel.training.step_times import StepTimes
from pseudolabel.views.image import Normalize

_NO_MIX = 1.0


class Learner:
    """What a training run changes with each step. Each process of a team has one, in step with the others."""

    def __init__(
        self,
        settings: TrainSettings,
        card: ModelCard,
        data: TrainingData,
        device: torch.device,
        team: Team,
        start: Start | None = None,
    ) -> None:
        self._settings, self._device, self._team = settings, device, team
        self._num_classes, self._calibration = len(card.classes), data.calibration
        torch.manual_seed(settings.seed)
        body = card.build()
        self.notes = (start_from(start, body, card),) if start is not None else ()
        self.body = team.with_shared_norms(body, device).to(device)
        self._layout = training_layout(self.body)
        self.body.to(memory_format=self._layout)
        team.take_from_first(self.body.state_dict().values())
        self._forward: Any = self._compiled() if settings.compile else self.body
        self.normalize = Normalize(card.preprocessing).to(device)
        self.average = make_average(self.body, settings.ema) if settings.ema else None
        self._optimizer = make_optimizer(self.body, settings)
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        of_labels = label_loss(settings, data.label_counts())
        self._mixture = Mixture(settings.alpha, settings.temperature, settings.loss, settings.standardize, of_labels)

    def _compiled(self) -> Any:
        """The compiler would make convolutions channels-last by itself, also where `training_layout` says not to."""
        if self._layout != torch.contiguous_format:
            return torch.compile(self.body, dynamic=False)
        return torch.compile(self.body, dynamic=False, options={"layout_optimization": False})

    @property
    def averaged_body(self) -> nn.Module:
        """The network with the weights that are validated and kept: averaged, if they are."""
        return self.average.module if self.average is not None else self.body

    def step(self, batch: Batch, rate: float, number: int, times: StepTimes) -> Tensor:
        """Step `number` at learning rate `rate`; returns the losses (`Losses`, as a tensor of three), detached, on the
        device: a team's add up to the batch's.
        """
        try:
            with self._team.watching():
                return self._step(batch, rate, number, times)
        except torch.OutOfMemoryError as error:
            rows = -(-len(batch.labels_B) // self._settings.accumulate)
            raise OutOfMemory(
                f"{self._device}: {rows} rows at once don't fit; use --accumulate {2 * self._settings.accumulate}, or "
                "a smaller --batch-size"
            ) from error

    def seed(self, step: int) -> None:
        """Dropout and its like draw from here on what follows from step and process alone: nothing to save."""
        seed = derive_seeds(1, self._settings.seed, 4, step, self._team.world.rank)[0]
        if self._device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def _step(self, batch: Batch, rate: float, number: int, times: StepTimes) -> Tensor:
        self.body.train()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        losses = []
        for part, rows in enumerate(
            batch.parts(self._settings.accumulate) if self._settings.accumulate > 1 else [batch]
        ):
            mix = draw_mix(self._settings, number, self._team.world.rank, part)
            found = self._loss(rows, mix, times)
            with times.during("backward"):
                torch.autograd.backward(self._scaler.scale(found.total))
            losses.append(torch.stack(found).detach())
        with times.during("update"):
            self._update()
        return torch.stack(losses).sum(dim=0)

    def _loss(self, batch: Batch, mix: Mix | None, times: StepTimes) -> Losses:
        """A part's losses, ready for backward."""
        share, partner_B = _NO_MIX, None
        with times.during("copy"):
            pixels_BCHW = self.normalize(batch.pixels_BCHW)
            if mix is not None:
                soft = 0 if batch.targets is None else len(batch.targets)
                partner_B = partners(len(batch.labels_B), soft).to(self._device)
                pixels_BCHW, share = mix.images(pixels_BCHW, partner_B), mix.share_of(*pixels_BCHW.shape[-2:])
            pixels_BCHW = pixels_BCHW.contiguous(memory_format=self._layout)
        with times.during("forward"), autocast(self._settings.precision, self._device):
            logits_BC = self._forward(pixels_BCHW)
        if not isinstance(logits_BC, Tensor) or logits_BC.shape != (len(batch.labels_B), self._num_classes):
            found = tuple(logits_BC.shape) if isinstance(logits_BC, Tensor) else type(logits_BC).__name__
            raise SpecError(
                f"{self._settings.student}: must give logits of shape (batch, {self._num_classes}), gave {found}"
            )
        with times.during("loss"):
            loss = self._against(logits_BC, batch)
            if partner_B is not None:
                others = self._against(logits_BC, batch.partners(partner_B))
                loss = Losses(*(share * own + (1 - share) * other for own, other in zip(loss, others, strict=True)))
        return loss

    def _against(self, logits_BC: Tensor, batch: Batch) -> Losses:
        return self._mixture(
            logits_BC,
            batch.labels_B,
            batch.targets.read_as(self._settings.tail, self._calibration) if batch.targets is not None else None,
            batch.soft_weight_B,
            num_labeled=batch.num_labeled,
            num_soft=batch.num_soft,
        )

    def _update(self) -> None:
        self._team.sum_gradients(self.body)
        if self._settings.clip_norm:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.body.parameters(), self._settings.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.body)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """All that a checkpoint must hold of it: named tensors, and the scaler's facts."""
        groups = {"model": self.body.state_dict(), "optimizer": flatten_optimizer(self._optimizer)}
        if self.average is not None:
            groups["average"] = self.average.state_dict()
        return groups, self._scaler.state_dict()

    def load_state(self, groups: dict[str, dict[str, Tensor]], scaler: dict[str, Any]) -> None:
        """Inverse of `state`."""
        load_tensors(self.body, groups["model"])
        if self.average is not None:
            load_tensors(self.average, groups["average"])
        restore_optimizer(self._optimizer, groups["optimizer"])
        self._scaler.load_state_dict(scaler)

"""READ FIRST: the sockets, as Protocols. Whatever fits one plugs in; nothing inherits.

    Teacher   a description of a teacher: small, frozen, picklable; `load(device)` opens weights in the worker
    Encoding  how a row of logits is kept in Parquet, and read back as a target for a student
    Loss      how far a student's logits are from soft targets, row by row
    Engine    where work runs: it maps a function over items, in this process or in many
    Tracker   who else is told of a training's metrics; no result depends on it

The verbs (`annotate`, `train`, `evaluate`) see only these; `teachers/`, `labels/`, `losses/`, `engines/` and
`trackers/` implement them.

Shape suffixes: B batch, C classes, K kept classes, M compared classes (C, or K + 1 with the tail as a bucket),
H and W pixels, N rows of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


class LoadedTeacher(Protocol):
    """A teacher on its device, ready to run."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in logit order; the positions as text where the source has no names."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides its logits (architecture, hash of the weights, preprocessing): JSON values, no paths.

        `preprocessing` is `Preprocessing.to_json()`: augmented views are made by it and replayed by it. A teacher of
        several inputs has `members` instead, a list of such identities in their order.
        """
        ...

    def prepare(self, image_CHW: Tensor) -> tuple[Tensor, ...]:
        """One decoded image (uint8, 1 or 3 channels) → uint8 inputs of fixed shape. Runs on decoding threads."""
        ...

    def logits(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Run batches of prepared inputs; returns float32 logits of shape (B, C) on the device."""
        ...


@runtime_checkable
class LoadedMembers(LoadedTeacher, Protocol):
    """A loaded teacher made of several, which can give their logits apart."""

    @property
    def num_members(self) -> int: ...

    def member_logits(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Each member's log-probabilities, float32 of shape (B, C)."""
        ...

    def combine(self, members: tuple[Tensor, ...]) -> Tensor:
        """What `logits` gives for these members' log-probabilities, (B, C)."""
        ...


class Teacher(Protocol):
    """A teacher's description. Pickles; holds no weights."""

    @property
    def uri(self) -> str:
        """The spec as given, such as `torchvision:resnet50?weights=IMAGENET1K_V2`."""
        ...

    def load(self, device: torch.device) -> LoadedTeacher:
        """Build the model and load its weights. Raises `SpecError`."""
        ...


class Encoding(Protocol):
    """How logits are stored."""

    @property
    def name(self) -> str:
        """The spec that makes it, such as `topk:10`."""
        ...

    @property
    def sparse(self) -> bool:
        """Whether it leaves classes out."""
        ...

    @property
    def draws(self) -> bool:
        """Whether what it keeps is drawn at random: then classes that weren't drawn have no probability."""
        ...

    @property
    def temperatures(self) -> tuple[float, ...]:
        """At which it is measured what storing lost."""
        ...

    def check(self, num_classes: int) -> None:
        """Raise `SpecError` if it makes no sense for so many classes."""
        ...

    def check_temperature(self, temperature: float) -> None:
        """Raise `SpecError` if it can't say what the teacher's probabilities are at this temperature."""
        ...

    def fields(self, num_classes: int) -> list[pa.Field]:
        """The Parquet columns it writes."""
        ...

    def encode(self, logits_BC: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """Finite float32 logits, and each row's seed (int64) for those that draw → a tensor per column, on the same
        device.
        """
        ...

    def tensors(self, table: pa.Table, num_classes: int) -> dict[str, Tensor]:
        """Its columns of a part as tensors, as `encode` made them."""
        ...

    def full_log_probs(self, columns: Mapping[str, Tensor], temperature: float, num_classes: int) -> Tensor:
        """What the stored columns say of all classes at a temperature: log-probabilities (B, C)."""
        ...

    def log_probs(
        self, columns: Mapping[str, Tensor], student_log_probs_BC: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """The teacher's log-probabilities at a temperature and those of a student, given at its own, over the same M
        outcomes, both (B, M), float32 or wider.
        """
        ...


class SoftTargets(Protocol):
    """Stored soft labels of a batch, as a loss sees them."""

    def pred(self, num_classes: int) -> Tensor:
        """The teacher's class (B,), int64."""
        ...

    def confidence(self, num_classes: int) -> Tensor:
        """The probability of that class at temperature 1, (B,)."""
        ...

    def log_probs(
        self, student_logits_BC: Tensor, temperature: float, *, student_temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Teacher's and student's log-probabilities over the same M outcomes, both (B, M), at this temperature or the
        student's at one of its own.
        """
        ...

    def all_log_probs(self, temperature: float, num_classes: int) -> Tensor:
        """The teacher's log-probabilities of all classes (B, C); those that a sparse label leaves out share what is
        left.
        """
        ...


@dataclass(frozen=True)
class LossNeeds:
    """What a loss asks of soft labels. `classes`: the least number of classes. `outcomes`: whether it compares whatever
    the encoding gives, one probability a class, or all logits. `draws`: whether a random sample of classes will do.
    `target`: whether it takes a class apart, the label's or the teacher's. `temperature`: whether it has a part in it.
    `standardizes`: whether logits may be z-scores.
    """

    classes: int = 2
    outcomes: Literal["any", "classes", "logits"] = "any"
    draws: bool = False
    target: bool = False
    temperature: bool = True
    standardizes: bool = False


class Loss(Protocol):
    """A distillation loss, row by row. Its fields are its parameters."""

    needs: ClassVar[LossNeeds]

    def __call__(
        self, student_logits_BC: Tensor, targets: SoftTargets, temperature: float, labels_B: Tensor | None = None
    ) -> Tensor:
        """Returns (B,), scaled so that its gradient doesn't shrink with the temperature. `labels_B` are the rows'
        own labels, for losses that need them.
        """
        ...


class Engine(Protocol):
    """Where work runs. Contract: the results, as a set, are those of `work(iter(items), device)` in one process."""

    def devices(self) -> list[str]:
        """Where `work` will run, such as cpu or cuda:0: what is left to the device is decided by their kind."""
        ...

    def map(
        self, work: Callable[[Iterator[Item], str], Iterator[Result]], items: Sequence[Item]
    ) -> Generator[Result, None, None]:
        """Hand `items` out to copies of the picklable `work`, each with a device, and yield results as they come.

        A result that completes an item names it as its `ends`: an engine that survives the death of a worker hands out
        again what was not completed. When the generator is closed, all work has ended.
        """
        ...


@dataclass(frozen=True)
class TrackedRun:
    """A training, as a tracker sees it when it begins.

    `step` is that of the checkpoint it goes on from, 0 at the start: what was told of later steps is told again.
    `earlier` is what the tracker's `begin` returned when this training was begun before. `events` is the one directory
    of the run that a tracker may write in; its files are put beside the run's others, at a URL, too.
    """

    name: str
    group: str | None
    settings: Mapping[str, str | int | float | bool | None]
    events: Path
    step: int
    earlier: str | None


class Tracker(Protocol):
    """Is told of a training's metrics beside metrics.jsonl. One object may be told of several trainings, in turn."""

    @property
    def name(self) -> str:
        """As given, such as `wandb?project=digits`, without secrets: what `begin` returns is kept under it."""
        ...

    def begin(self, run: TrackedRun) -> str | None:
        """Returns what finds this run again after a resume. Whatever it raises ends the command before training."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics after `step` steps. If it raises, there is a warning, and this tracker is told no more."""
        ...

    def end(self, result: Mapping[str, Any] | None, failure: str | None) -> None:
        """The result, as in run.json; or None, and why training ended without one. It may go on later."""
        ...

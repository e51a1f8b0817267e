"""The teacher's forward pass over batches and the encoding of its logits, on the device that holds the weights.

`start` sets a batch going, `finish` waits for its columns on the host. On a GPU the two overlap with their neighbours:
pixels are copied from page-locked memory on a stream of their own, encoding (top-k, lse, moments, fidelity) runs behind
the forward pass, the small columns go back on a third stream, and nothing waits for the device but `finish`, one batch
late. On a CPU `start` does all of it.

A batch that doesn't fit the device's memory is run in halves, and so are the later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.errors import OutOfMemory, SpecError
from pseudolabel.interfaces import Encoding, LoadedMembers, LoadedTeacher
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.facts import divergence, summarize
from pseudolabel.precision import autocast
from pseudolabel.settings import AnnotateSettings

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class UnderWay:
    """A batch on the device. Its columns may be looked at when `copied` has happened; `kept` must live until then."""

    columns: Columns
    copied: Any = None
    kept: object = None


class Forward:
    """A teacher at work on one device, with settings that leave nothing to the device."""

    def __init__(self, teacher: LoadedTeacher, settings: AnnotateSettings, device: str) -> None:
        self._teacher, self._settings, self._device = teacher, settings, torch.device(device)
        self._encoding = parse_encoding(settings.encoding)
        self._at_most: int | None = None  # rows at once, after memory ran out
        self._shape_rows: int | None = None  # of a compiled pass: those of the first batch
        outputs = _with_members(teacher) if settings.keep_members else _alone(teacher)
        self._outputs = torch.compile(outputs, dynamic=False) if settings.compile else outputs
        streams = 2 if self._device.type == "cuda" else 0
        self._streams = [torch.cuda.Stream(self._device) for _ in range(streams)]  # type: ignore[no-untyped-call]

    @property
    def was_split(self) -> bool:
        """Whether a batch had to be run in pieces, for want of memory."""
        return self._at_most is not None

    def start(self, inputs: tuple[Tensor, ...], seeds: Sequence[int] | None = None) -> UnderWay:
        """Set a batch of prepared inputs (uint8, on the host) going; `seeds` of its rows decide what an encoding draws
        (zeros where nobody keeps the labels). Raises `OutOfMemory` if not even one row fits.
        """
        with torch.inference_mode():
            seed_B = torch.tensor(seeds, dtype=torch.int64) if seeds is not None else torch.zeros(len(inputs[0])).long()
            if not self._streams:
                return UnderWay(self._columns(inputs, seed_B))
            into, out = self._streams
            with torch.cuda.stream(into):
                there = tuple(one.to(self._device, non_blocking=True) for one in inputs)
            main = torch.cuda.current_stream(self._device)
            main.wait_stream(into)
            for one in there:
                one.record_stream(main)
            columns = self._columns(there, seed_B.to(self._device))
            out.wait_stream(main)
            with torch.cuda.stream(out):
                host = {name: _to_pinned(column) for name, column in columns.items()}
                for column in columns.values():
                    column.record_stream(out)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record(out)
            return UnderWay(host, copied, inputs)

    def finish(self, batch: UnderWay) -> Columns:
        """The batch's columns (`encoded`), on the host, one row a row of the batch."""
        if batch.copied is not None:
            batch.copied.synchronize()
        return batch.columns

    def logits(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Float32 logits (B, C) on the device, then the members' if they are kept. With `tta`, those of view 0 are the
        mean of the log-probabilities of the image and its mirror image.
        """
        outputs = self._in_pieces(inputs)
        if self._settings.tta == "none":
            return outputs
        views = self._settings.views
        flipped = self._in_pieces(tuple(one[::views].flip(-1) for one in inputs))
        where = torch.arange(0, len(outputs[0]), views, device=outputs[0].device)
        return tuple(
            clean.index_copy(0, where, (torch.log_softmax(clean[::views], -1) + torch.log_softmax(mirrored, -1)) / 2)
            for clean, mirrored in zip(outputs, flipped, strict=True)
        )

    def _columns(self, inputs: tuple[Tensor, ...], seed_B: Tensor) -> Columns:
        logits_BC, *members = self.logits(inputs)
        columns = encoded(self._encoding, logits_BC, seed_B)
        for number, member_BC in enumerate(members):
            columns["finite"] &= torch.isfinite(member_BC).all(dim=-1)
            own = self._encoding.encode(member_BC, seed_B + number + 1)
            columns |= {_member_column(number, name): column for name, column in own.items()}
        return columns

    def _in_pieces(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As many rows at once as fit."""
        rows = len(inputs[0])
        limit = min(self._at_most or rows, rows)
        try:
            pieces = [
                self._pass(tuple(one[start : start + limit] for one in inputs)) for start in range(0, rows, limit)
            ]
            return pieces[0] if len(pieces) == 1 else tuple(map(torch.cat, zip(*pieces, strict=True)))
        except torch.OutOfMemoryError as error:
            if limit == 1:
                raise OutOfMemory(
                    f"{self._device}: not even one sample fits into its memory; use a device with more, or a smaller "
                    "teacher (finished shards stay)"
                ) from error
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._at_most = (limit + 1) // 2
        return self._in_pieces(inputs)

    def _pass(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = len(inputs[0])
        if self._settings.compile:
            self._shape_rows = min(self._shape_rows or rows, self._at_most or rows)
            missing = self._shape_rows - rows  # a compiled pass has one shape: a smaller, last batch is filled up
            if missing > 0:
                inputs = tuple(F.pad(one, (0, 0) * (one.ndim - 1) + (0, missing)) for one in inputs)
        with autocast(self._settings.precision, self._device):
            outputs = self._outputs(inputs)
        wanted = (len(inputs[0]), len(self._teacher.classes))
        for one in outputs:
            if tuple(one.shape) != wanted:
                raise SpecError(
                    f"the teacher must give logits of shape {wanted} for {wanted[0]} images, it gave {tuple(one.shape)}"
                )
        return tuple(one[:rows] for one in outputs)


def encoded(encoding: Encoding, logits_BC: Tensor, seed_B: Tensor) -> Columns:
    """A part's columns of a batch, with `finite` (B,) and `divergence` (B, temperatures) beside them. Rows that aren't
    finite hold nonsense and are to be dropped.
    """
    columns = encoding.encode(logits_BC, seed_B)
    return {
        **summarize(logits_BC),
        **columns,
        "divergence": divergence(encoding, columns, logits_BC).T,
        "finite": torch.isfinite(logits_BC).all(dim=-1),
    }


def member_fields(teacher: LoadedTeacher, encoding: Encoding) -> list[pa.Field]:
    """The columns of an ensemble's members, in their order. Raises `SpecError` if it is no ensemble."""
    if not isinstance(teacher, LoadedMembers):
        raise SpecError("--keep-members: there is one teacher only; give several --teacher, or leave it out")
    return [
        field.with_name(_member_column(number, field.name))
        for number in range(teacher.num_members)
        for field in encoding.fields(len(teacher.classes))
    ]


def _member_column(number: int, name: str) -> str:
    return f"member{number}_{name}"


def _alone(teacher: LoadedTeacher) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda inputs: (teacher.logits(inputs),)


def _with_members(teacher: LoadedTeacher) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    assert isinstance(teacher, LoadedMembers)

    def outputs(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        members = teacher.member_logits(inputs)
        return (teacher.combine(members), *members)

    return outputs


def _to_pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

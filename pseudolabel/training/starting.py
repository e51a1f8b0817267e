"""What a student starts from: random weights, those that its spec names, or those of another run (`--init-from`).

All of a student's tensors are taken, or none; but its head, whose shape follows the number of classes, is new where the
classes are others. Which happened is told, never guessed: a start that silently took half of the weights would look
like a bad teacher.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pseudolabel import storage
from pseudolabel.checkpoint import ModelCard, read_card, read_state
from pseudolabel.errors import SpecError
from pseudolabel.shard_lists import real_place
from pseudolabel.storage import Location
from pseudolabel.students import Student
from pseudolabel.students.start import Start


def find_start(
    student: Student, num_classes: int, channels: int, init_from: str | os.PathLike[str] | None = None
) -> Start | None:
    """The weights that `student` starts from: those of `init_from`, a finished run or a .safetensors file, or else
    those that its spec names; None are random ones.

    Raises:
        DamagedModel: `init_from` is incomplete, edited, or not what was saved.
        SpecError: the weights can't be had, or are for other images.
    """
    if init_from is None:
        start = student.start(num_classes, channels)
    else:
        place = storage.location(init_from)
        start = _of_file(place) if place.name.endswith(".safetensors") else _of_run(place)
    if start is not None and start.norm is not None and len(start.norm[0]) != channels:
        raise SpecError(
            f"{start.source}: these weights are for images of {len(start.norm[0])} channels, the student takes "
            f"{channels}; use --channels {len(start.norm[0])}"
        )
    if start is not None and (broken := [name for name, one in start.state.items() if not _is_finite(one)]):
        raise SpecError(
            f"{start.source}: these weights hold NaN or infinity, in {_some(sorted(broken), 1)}; no training could "
            "start from them"
        )
    return start


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def check_not_replaced(init_from: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise `SpecError` if the run that is to be replaced is the one to start from: after a kill there would be none
    left.
    """
    source, place = (real_place(os.fspath(storage.location(one))) for one in (init_from, out))
    if overwrite and place in (source, os.path.dirname(source)):
        raise SpecError(
            f"--init-from {init_from}: is in this run's own --out, whose weights --overwrite removes first; choose "
            "another --out, or copy the weights elsewhere"
        )


def _of_file(path: Location) -> Start:
    advice = "name the architecture that they were saved from; a published file goes into the spec, weights_file=FILE"
    return Start(os.fspath(path), read_state(path), advice=advice)


def _of_run(directory: Location) -> Start:
    """Nothing of the run's code is called, whatever its student is: tensors are all that is wanted."""
    if directory.is_file() and not (directory / "model.json").exists():  # over https a directory may look like a file
        raise SpecError(f"{directory}: is neither a run directory nor a .safetensors file; name one of these")
    card, sha256 = read_card(directory)
    state = read_state(directory / "model.safetensors", sha256)
    norm = (card.preprocessing.mean, card.preprocessing.std)
    return Start(
        os.fspath(directory), state, norm, card.classes, f"they are of {card.student}; name that with --student"
    )


def start_from(start: Start, body: nn.Module, card: ModelCard) -> str:
    """Fill the weights into `body`, which `card` built. Returns a note of what was taken and what is new.

    Raises:
        SpecError: something besides the head differs.
    """
    state = body.state_dict()
    head = _head(state, card) if start.classes != card.classes else set()
    same_classes = start.classes in (None, card.classes)
    kept = same_classes and all(_shape(start.state, name) == _shape(state, name) for name in head)
    given = {name: tensor for name, tensor in start.state.items() if kept or name not in head}
    if differing := _differences(given, {name: state[name] for name in state.keys() - (set() if kept else head)}):
        raise SpecError(f"{start.source}: these weights don't fit {card.student}: {differing}\n{start.advice}")
    if not kept and not head:
        raise SpecError(
            f"{start.source}: its classes are others, and {card.student} has no tensor whose shape follows their "
            "number, so its head can't be told from the rest and replaced"
        )
    state.update(given)
    body.load_state_dict(state)
    return _note(start, card, sorted(set() if kept else head))


def _head(state: Mapping[str, Tensor], card: ModelCard) -> set[str]:
    """The tensors whose shape follows the number of classes."""
    with torch.random.fork_rng(devices=[]):
        other = card.bare(len(card.classes) + 1).state_dict()
    return {name for name in state if _shape(other, name) != _shape(state, name)}


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def _differences(there: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """In a few words, or nothing. Counters of batches are not missed: older files lack them, and nothing reads them."""
    shared = sorted(there.keys() & wanted.keys())
    shapes = [
        f"{name} is {_shape(there, name)}, not {_shape(wanted, name)}"
        for name in shared
        if _shape(there, name) != _shape(wanted, name)
    ]
    missing = sorted(name for name in wanted.keys() - there.keys() if not name.endswith(".num_batches_tracked"))
    found = [shapes[0] + _more(len(shapes) - 1)] if shapes else []
    found += [f"they lack {_some(missing, 1)}"] if missing else []
    over = sorted(there.keys() - wanted.keys())
    return "; ".join([*found, *([f"they have {_some(over, 1)} besides"] if over else [])])


def _note(start: Start, card: ModelCard, new: list[str]) -> str:
    if not new:
        how = "its classes are the same" if start.classes is not None else "it has as many classes, of unknown names"
        return f"the student starts from {start.source}, head included: {how}"
    there = f"{len(start.classes)} classes there, " if start.classes is not None else ""
    if start.classes is not None and len(start.classes) == len(card.classes):
        there = "classes of other names there, "
    return (
        f"the student starts from {start.source} with a new head ({there}{len(card.classes)} here): {_some(new, 6)} "
        "begin random"
    )


def _some(names: Iterable[str], count: int) -> str:
    listed = list(names)
    return ", ".join(listed[:count]) + _more(len(listed) - count)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""

"""What the classes are called: in a store, in a user's list, beside the shards; and whether they are the same ones.

Class numbers mean nothing without the list they count. `pack` writes it beside the shards' directory as classes.txt.
"""

from __future__ import annotations

from collections.abc import Sequence

from pseudolabel import storage
from pseudolabel.errors import LabelError, StorageError, StoreMismatch
from pseudolabel.labels.store import Store
from pseudolabel.shard_lists import Shard


def check_names(shards: Sequence[Shard], classes: Sequence[str]) -> None:
    """Raise `LabelError` if the classes.txt beside labeled shards names other classes than a model has. Positions as
    names, on either side, fit anything.
    """
    beside = named_beside(shards)
    if beside is None or _positions(beside) or _positions(classes) or tuple(beside) == tuple(classes):
        return
    differing = next((pair for pair in zip(classes, beside, strict=False) if pair[0] != pair[1]), None)
    what = (
        f"{differing[1]!r} where the model has {differing[0]!r}" if differing else f"{len(beside)}, not {len(classes)}"
    )
    raise LabelError(
        f"{shards[0].where}: the classes.txt beside it names other classes ({what}); their numbers would not mean the "
        "same\npack these images with the model's classes, or evaluate another model"
    )


def label_space(store: Store, classes: Sequence[str] | None, num_classes: int | None) -> Sequence[str]:
    """The class names, the store's and the user's being one. Raises `StoreMismatch`."""
    known = store.identity.classes
    wanted = len(classes) if classes is not None else num_classes
    if wanted not in (None, len(known)):
        raise StoreMismatch(
            f"{store.root}: its teacher has {len(known)} classes, {wanted} are asked for; "
            "use a teacher of the same classes"
        )
    if classes is None or known == tuple(classes) or _positions(classes):
        return known
    if not _positions(known):
        raise StoreMismatch(
            f"{store.root}: {how_classes_differ(classes, known)}\nlabels in the shards are numbers by your list, so "
            "don't reorder it: annotate with a class map, which puts the teacher's classes into your order"
        )
    return classes


def how_classes_differ(names: Sequence[str], of_teacher: Sequence[str]) -> str:
    """In what a list of class names differs from a teacher's; '' if in nothing. Positions as names fit anything."""
    if len(names) != len(of_teacher):
        return f"the teacher has {len(of_teacher)} classes, the list of the corpus names {len(names)}"
    if _positions(names) or _positions(of_teacher):
        return ""
    return next(
        (
            f"class {index} is {theirs!r} to the teacher, {ours!r} in the list of the corpus"
            for index, (theirs, ours) in enumerate(zip(of_teacher, names, strict=True))
            if theirs != ours
        ),
        "",
    )


def named_beside(labeled: Sequence[Shard]) -> Sequence[str] | None:
    """The class names in `pack`'s classes.txt beside labeled shards, if any. Raises `LabelError` if two differ."""
    found: dict[tuple[str, ...], str] = {}
    for path in sorted({_beside(shard) for shard in labeled}, key=str):  # some may be at URLs
        if _is_there(path):
            try:
                names = tuple(line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
            except (OSError, UnicodeDecodeError) as error:
                raise LabelError(f"{path}: can't be read as class names, one a line in UTF-8 ({error})") from error
            if names:
                found[names] = str(path)
    if len(found) > 1:
        (one, first), (other, second) = sorted(found.items(), key=lambda item: item[1])[:2]
        what = f"{len(one)} and {len(other)} names"
        if len(one) == len(other):
            places = zip(one, other, strict=True)
            what = next(
                f"class {n} is {ours!r} and {theirs!r}" for n, (ours, theirs) in enumerate(places) if ours != theirs
            )
        raise LabelError(
            f"labeled shards of different classes: {first} and {second} differ ({what})\npack them together, so that "
            "their numbers mean the same, or name shards of one corpus"
        )
    return next(iter(found), None)


def _is_there(path: storage.Location) -> bool:
    """Whether there are names. Who may read the shards alone is refused what isn't there, too."""
    try:
        return path.is_file()
    except StorageError as error:
        if storage.is_refused(error):
            return False
        raise


def _beside(shard: Shard) -> storage.Location:
    """Where `pack` puts the class names: above the directory of the shards."""
    place = storage.location(shard.path)
    place = place if isinstance(place, storage.RemotePath) else place.absolute()
    return place.parent.parent / "classes.txt"


def _positions(names: Sequence[str]) -> bool:
    """Whether classes are not named, only numbered."""
    return tuple(names) == tuple(str(index) for index in range(len(names)))

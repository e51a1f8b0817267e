"""Between annotating and training of a round: calibrate, then select, as far as a recipe asks for it.

    DIR/round-1/calibration.json     the teacher's confidence against the validation labels
    DIR/round-1/selection/           which soft labels count

Both are pure functions of the store, so they are made again in seconds when a run goes on, unless the student is
trained already. Validation shards, which the teacher wasn't trained on, are the evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pseudolabel.calibration import Calibration, read_calibration
from pseudolabel.calibration.calibrate import calibrate
from pseudolabel.duplicates.ledger import Leaks, read_leaks
from pseudolabel.errors import CalibrationError, SelectionError
from pseudolabel.labels.store import Store
from pseudolabel.recipe import Recipe, as_keys
from pseudolabel.selection import Selection, open_selection
from pseudolabel.selection.exclusion import recorded
from pseudolabel.selection.select import select
from pseudolabel.settings import CalibrateSettings, SelectSettings
from pseudolabel.storage import Location

UNCHECKED = "none"
"""As `data.leaks` of a recipe: the images are knowingly not compared."""


@dataclass(frozen=True)
class Trust:
    """How a round's soft labels are read, and which of them."""

    calibration: Calibration | None = None
    selection: Selection | None = None


def needs_evidence(recipe: Recipe) -> bool:
    """Whether the validation shards must be annotated, too."""
    return recipe.calibrate is not None or recipe.select is not None


def known_leaks(path: str | None, say: Callable[[str], None]) -> Leaks | None:
    """What `leaks` found, as a recipe's `data.leaks` names it; says so if nobody looked. Raises as `read_leaks`."""
    if path is None:
        say(
            "note: the unlabeled images were not compared with val and test; `pseudolabel leaks` finds those that are "
            "in both (data.leaks in a recipe)"
        )
    return None if path in (None, UNCHECKED) else read_leaks(path)


def settle_trust(
    recipe: Recipe,
    store: Store,
    directory: Location,
    evidence: Sequence[str],
    leaks: Leaks | None,
    say: Callable[[str], None],
) -> Trust:
    """Calibrate and select in a round's directory; what is there is taken if the round's student is done. Errors name
    the recipe's keys.

    Raises:
        CalibrationError, SelectionError.
    """
    done = (directory / "student" / "run.json").exists()
    try:
        calibration = _calibrated(recipe, store, directory / "calibration.json", evidence, say, done=done)
    except CalibrationError as error:
        raise CalibrationError(as_keys(str(error), "calibrate", CalibrateSettings)) from error
    try:
        selection = _selected(recipe, store, directory / "selection", calibration, evidence, leaks, say, done=done)
    except SelectionError as error:
        said = as_keys(str(error), "select", SelectSettings).replace("--exclude", "data.leaks")
        raise SelectionError(said) from error
    return Trust(calibration, selection)


def _calibrated(
    recipe: Recipe, store: Store, path: Location, evidence: Sequence[str], say: Callable[[str], None], *, done: bool
) -> Calibration | None:
    if recipe.calibrate is None:
        return None
    if done and path.exists():
        return read_calibration(path)
    found = calibrate(store, path, recipe.calibrate, evidence=evidence, overwrite=True)
    say(
        f"calibrated on {found.rows} validation rows: ECE {found.before['ece']:.4f} before, "
        f"{found.after['ece']:.4f} after (cross-fitted)"
    )
    return found.calibration


def _selected(
    recipe: Recipe,
    store: Store,
    place: Location,
    calibration: Calibration | None,
    evidence: Sequence[str],
    leaks: Leaks | None,
    say: Callable[[str], None],
    *,
    done: bool,
) -> Selection | None:
    if recipe.select is None and leaks is None:
        return None
    if not (done and (place / "selection.json").exists()):
        chosen = select(
            store,
            place,
            recipe.select or SelectSettings(),
            calibration=calibration,
            evidence=evidence if recipe.select is not None else None,
            exclude=leaks,
            overwrite=True,
        )
        say(
            f"selected {chosen.selected} of {chosen.rows} soft labels, {chosen.excluded} excluded; estimated "
            f"precision {chosen.estimated_precision:.4f} (from {chosen.estimated_from})"
        )
    selection = open_selection(place)
    if leaks is not None and selection.facts["excluded"] != recorded(leaks.excluded):
        raise SelectionError(
            f"{place}: leaves out other samples than data.leaks names now, and its student is trained\n"
            "put the old file back, or choose another --out"
        )
    return selection

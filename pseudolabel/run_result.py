"""What a run gives: a row for the teacher, each round and the control, and the table made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Round:
    """One row of the table: a round, or with number 0 the first teacher or the control."""

    round: int
    teacher: str
    student: str
    parameters: int
    val_accuracy: float | None
    test_accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class RunResult:
    """What a recipe gave. `control` is the same student trained on the labels alone; None if the recipe asks for
    none.
    """

    out: str
    rounds: tuple[Round, ...]
    control: Round | None
    teacher: Round | None
    seconds: float


def table(result: RunResult) -> list[dict[str, Any]]:
    """The final table's rows: teacher, rounds, control, with the gain over the control."""
    named = [
        ("teacher", result.teacher),
        *((f"round {row.round}", row) for row in result.rounds),
        ("control", result.control),
    ]
    base = result.control.test_accuracy if result.control is not None else None
    rows = []
    for name, row in named:
        if row is not None:
            gain = (
                None if base is None or row.test_accuracy is None or row is result.control else row.test_accuracy - base
            )
            rows.append({"name": name, **asdict(row), "gain": gain})
    return rows

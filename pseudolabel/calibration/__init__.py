"""How far a teacher's confidence can be trusted, as a small JSON file that `select` and `train` take.

    calibration = read_calibration("calibration.json")
    log_probs_BC = calibration.log_probs(encoding, columns, num_classes, temperature=1.0)

A calibration maps the logits z of a store to z/τ (temperature scaling) or w·z + b (vector scaling; Guo et al. 2017,
arXiv:1706.04599, §4.2), and may shift them by a prior correction. Stored logits are known up to a constant of their
row, so for the vector z is the log-probability. What is stored stays as it is. Reading one needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pseudolabel import storage
from pseudolabel.errors import CalibrationError, StoreMismatch
from pseudolabel.interfaces import Encoding
from pseudolabel.labels.store import Store

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """Of the store with fingerprint `store`. `weight` and `bias` (C values each) take the temperature's place if they
    are there; `shift` (C) is the prior correction, log(target / marginal). `facts` say how it was found and how well it
    does; they change nothing.
    """

    store: str
    temperature: float = 1.0
    weight: tuple[float, ...] | None = None
    bias: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_temperature(self) -> bool:
        """Whether dividing by a temperature is all it does: then a sparse label stays sparse."""
        return self.weight is None and self.shift is None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what it does, as canonical JSON."""
        return hashlib.sha256(json.dumps(self._mapping(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def without_shift(self) -> Calibration:
        return Calibration(self.store, self.temperature, self.weight, self.bias, None, self.facts)

    def log_probs(
        self, encoding: Encoding, columns: Mapping[str, Tensor], num_classes: int, temperature: float = 1.0
    ) -> Tensor:
        """Log-probabilities of all classes (B, C): softmax of the calibrated logits divided by `temperature`.

        Classes that a sparse label leaves out share its tail evenly.
        """
        if self.is_temperature:
            return encoding.full_log_probs(columns, self.temperature * temperature, num_classes)
        if self.weight is None or self.bias is None:
            logits_BC = encoding.full_log_probs(columns, self.temperature, num_classes)
        else:
            logits_BC = encoding.full_log_probs(columns, 1.0, num_classes)
            logits_BC = logits_BC * logits_BC.new_tensor(self.weight) + logits_BC.new_tensor(self.bias)
        if self.shift is not None:
            logits_BC = logits_BC + logits_BC.new_tensor(self.shift)
        return (logits_BC / temperature).log_softmax(dim=-1)

    def check(self, store: Store) -> None:
        """Raise `StoreMismatch` if it is of another store."""
        if self.store != store.fingerprint:
            raise StoreMismatch(
                f"the calibration is of the store with fingerprint {self.store[:12]}, {store.root} has "
                f"{store.fingerprint[:12]}: another teacher, encoding or other views\ncalibrate this store"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "kind": "calibration",
            **self._mapping(),
            "fingerprint": self.fingerprint,
            "facts": dict(self.facts),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """Raises `ValueError`, `KeyError` or `TypeError` for what is none."""
        if data["kind"] != "calibration" or data["format_version"] != FORMAT_VERSION:
            raise ValueError(f"not a calibration of format version {FORMAT_VERSION}")
        lists = {name: _numbers(data[name]) for name in ("weight", "bias", "shift")}
        found = cls(str(data["store"]), float(data["temperature"]), **lists, facts=dict(data["facts"]))
        if not 0 < found.temperature < math.inf or (found.weight is None) != (found.bias is None):
            raise ValueError("a temperature above 0 is wanted, and a bias with a weight")
        if found.fingerprint != data["fingerprint"]:
            raise ValueError("its numbers were edited, its fingerprint no longer fits")
        return found

    def _mapping(self) -> dict[str, Any]:
        return {
            "store": self.store,
            "temperature": self.temperature,
            **{name: _listed(getattr(self, name)) for name in ("weight", "bias", "shift")},
        }


def read_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Read what `calibrate` wrote. Raises `CalibrationError`."""
    place = storage.location(path)
    try:
        return Calibration.from_json(json.loads(place.read_text(encoding="utf-8")))
    except OSError as error:
        raise CalibrationError(f"{place}: can't be read ({error.strerror}); make it with `calibrate`") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CalibrationError(f"{place}: is no calibration ({error}); make it with `calibrate`") from error


def _listed(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else list(values)


def _numbers(values: Any) -> tuple[float, ...] | None:
    found = None if values is None else tuple(float(value) for value in values)
    if found is not None and not all(math.isfinite(value) for value in found):
        raise ValueError("numbers that aren't finite")
    return found

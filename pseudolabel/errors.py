"""What a user can get wrong, one class per kind.

Every message says what is wrong, where, and what to do about it. The command line prints the message and exits 1;
with `--json` it prints `{"error": {"kind": CLASS NAME, "message": …}}`.
"""

from __future__ import annotations


class PseudolabelError(Exception):
    """A known error: its message is meant for the user and needs no traceback."""

    @property
    def kind(self) -> str:
        return type(self).__name__


class ShardListError(PseudolabelError):
    """The SHARDS argument names nothing, or two shards of one name."""


class DamagedShard(PseudolabelError):
    """A shard is not a whole, well-formed tar of samples."""


class SourceError(PseudolabelError):
    """What `pack` was given can't be packed."""


class SpecError(PseudolabelError):
    """A teacher, student or encoding spec can't be understood or loaded."""


class StoreError(PseudolabelError):
    """A store is absent, unreadable, or of a format this version doesn't know."""


class StoreMismatch(PseudolabelError):
    """A store, a part or a shard doesn't belong to the other."""


class QueryError(PseudolabelError):
    """A question in SQL is wrong, asks for more than reading, or has too long an answer."""


class DamagedPart(PseudolabelError):
    """A Parquet file of a store is torn or corrupted."""


class CalibrationError(PseudolabelError):
    """A calibration can't be made from these rows, or read."""


class SelectionError(PseudolabelError):
    """A selection would be empty, can't be read, or doesn't fit."""


class ForeignFile(PseudolabelError):
    """Something in a store that none of our commands wrote."""


class OtherLabels(PseudolabelError):
    """Labels of a store are not those that its teacher gives when it is asked again."""


class DamagedModel(PseudolabelError):
    """A model or checkpoint directory is incomplete or corrupted."""


class TooManyRejects(PseudolabelError):
    """More samples were rejected than the run allows."""


class LabelError(PseudolabelError):
    """A label is missing, not a number, or out of range."""


class RecipeError(PseudolabelError):
    """A recipe has an unknown key, a wrong value, or contradicts itself."""


class OutputExists(PseudolabelError):
    """The output is already there and would be overwritten."""


class StorageError(PseudolabelError):
    """Writing or reading failed: full disk, no permission, no such place."""


class MissingFile(StorageError):
    """A file is not there, says a storage that answers."""


class TrackerError(PseudolabelError):
    """A tracker can't begin."""


class WorkerDied(PseudolabelError):
    """A worker process ended without finishing its work."""


class LaunchError(PseudolabelError):
    """Processes that were started together can't work together like this."""


class OutOfMemory(PseudolabelError):
    """The device's memory is too small for the batch."""


class Diverged(PseudolabelError):
    """Training produced a loss that is not finite."""

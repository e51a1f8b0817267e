"""What TensorBoard's own reader finds in a directory of event files."""

from __future__ import annotations

from pathlib import Path


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value, by the metric's name; the settings must be there, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    (text,) = tags["tensors"]
    assert text.startswith("settings")
    assert b"| student | " in accumulator.Tensors(text)[0].tensor_proto.string_val[0]
    return {name: [(one.step, one.value) for one in accumulator.Scalars(name)] for name in tags["scalars"]}

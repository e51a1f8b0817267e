"""A self-contained HTML page of a run: the table, training curves, and images with the soft labels they got.

Opens offline: plotly's script and all images are inside the page.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pseudolabel import storage
from pseudolabel.errors import PseudolabelError, ShardListError, StoreError
from pseudolabel.rundir import read_metrics
from pseudolabel.storage import Location

_SHOWN_PER_ROW = 8


@dataclass(frozen=True)
class _Shown:
    """One image of the grid and its largest soft labels, as (class, percent)."""

    source: str
    key: str
    labels: list[tuple[str, float]]


def write_report(directory: str | os.PathLike[str]) -> Location:
    """Write `report.html` into a run's directory and return its path.

    Raises:
        StoreError: nothing there that could be shown.
    """
    from jinja2 import Environment, StrictUndefined

    root = storage.location(directory)
    marker = root / "run.json"
    if not marker.exists():
        raise StoreError(f"{root}: no finished run here (no run.json); finish it with the command that started it")
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        rows = _rows(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{marker}: can't be read ({error!r}); run the command that made it again") from error
    runs = dict(_run_directories(root))
    template = resources.files("pseudolabel.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = Environment(undefined=StrictUndefined, autoescape=True).from_string(template)
    text = page.render(
        title=(root if isinstance(root, storage.RemotePath) else root.resolve()).name,
        rows=rows,
        plot=_curves(runs),
        grid=_grid(root, content),
        recipe=_recipe(root),
    )
    target = root / "report.html"
    storage.write_atomic(target, text)
    return target


def _rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    if content["kind"] == "run":
        return list(content["table"])
    model = {"student": content["identity"]["settings"]["student"], "test_accuracy": None, "gain": None}
    return [{"name": "run", **content["result"], **model}]


def _run_directories(root: Location) -> Iterator[tuple[str, Location]]:
    candidates = [
        ("run", root),
        ("teacher", root / "teacher"),
        *sorted((one.name, one / "student") for one in root.iterdir() if one.name.startswith("round-")),
        ("control", root / "control"),
    ]
    return ((name, path) for name, path in candidates if (path / "metrics.jsonl").exists())


def _curves(runs: dict[str, Location]) -> str:
    """Loss and validation accuracy over steps as one plotly figure."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=("validation accuracy", "training loss (its parts differ with alpha: compare shapes)"),
    )
    colours = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#555555")
    for (name, path), colour in zip(runs.items(), colours * 4, strict=False):
        lines = read_metrics(path / "metrics.jsonl")
        validated = [line for line in lines if "val_accuracy" in line]
        for column, field, points in ((1, "val_accuracy", validated), (2, "loss", lines)):
            steps, values = [point["step"] for point in points], [point[field] for point in points]
            trace = go.Scatter(
                x=steps,
                y=values,
                name=name,
                mode="lines",
                line={"color": colour},
                legendgroup=name,
                showlegend=column == 1,
            )
            figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(title_text="step")
    figure.update_layout(height=380, margin={"l": 50, "r": 20, "t": 50, "b": 40}, template="plotly_white")
    plot: str = figure.to_html(full_html=False, include_plotlyjs="inline")
    return plot


def _grid(root: Location, content: dict[str, Any]) -> list[tuple[str, list[_Shown]]]:
    """Images of the first store's first shard: where the teacher is sure, in doubt, and lost."""
    if content["kind"] != "run":
        return []
    import torch

    from pseudolabel.labels.encodings import parse_encoding
    from pseudolabel.labels.store import open_store
    from pseudolabel.shard_lists import list_shards
    from pseudolabel.shards import ShardFile

    store = open_store(root / "round-1" / "store")
    try:
        shards = {shard.name: shard for shard in list_shards(content["recipe"]["data"]["unlabeled"])}
    except ShardListError:
        return []  # moved, or named relative to another directory: the page does without images
    name = next((part for part in store.part_names() if part in shards), None)
    if name is None:
        return []
    part = store.read_view(name)
    encoding, num_classes = parse_encoding(store.identity.encoding), store.identity.num_classes
    chosen = _choose(part["confidence"].to_numpy(), part["pred"].to_numpy())
    grid = []
    with ShardFile(shards[name]) as opened:
        if opened.sha256() != store.info(name).sha256:
            return []  # other images than those that got these labels
        for title, rows in chosen.items():
            shown = []
            for row in rows:
                columns = encoding.tensors(part.slice(row, 1), num_classes)
                probs = encoding.full_log_probs(columns, encoding.temperatures[0], num_classes).exp()[0]
                values, ids = torch.topk(probs, min(3, len(probs)))
                labels = [(store.identity.classes[int(c)], 100 * float(v)) for v, c in zip(values, ids, strict=True)]
                sample = opened[part["index"][row].as_py()]
                shown.append(_Shown(_data_uri(sample.fields), sample.key, labels))
            grid.append((title, shown))
    return grid


def _choose(confidence_N: NDArray[np.float32], pred_N: NDArray[np.int32]) -> dict[str, list[int]]:
    """Rows to show: the surest of each class, some around the tenth percentile, the least sure."""
    order = confidence_N.argsort(kind="stable")
    surest = {int(pred_N[row]): int(row) for row in order}  # the last one of a class stays
    doubt = max(len(order) // 10, _SHOWN_PER_ROW)
    return {
        "sure": list(surest.values())[:_SHOWN_PER_ROW],
        "in doubt": order[doubt : doubt + _SHOWN_PER_ROW].tolist(),
        "lost": order[:_SHOWN_PER_ROW].tolist(),
    }


def _data_uri(fields: Any) -> str:
    """A thumbnail as PNG."""
    from PIL import Image

    from pseudolabel.views.image import decode, image_field

    try:
        pixels = decode(fields[image_field(fields)])
    except ValueError as error:
        raise PseudolabelError(str(error)) from error
    image = Image.fromarray(pixels[0].numpy() if pixels.shape[0] == 1 else pixels.permute(1, 2, 0).numpy())
    image.thumbnail((160, 160))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _recipe(root: Location) -> str:
    path = root / "recipe.toml"
    return path.read_text(encoding="utf-8") if path.exists() else ""

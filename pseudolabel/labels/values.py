"""Values that no teacher gives: row by row of a part, whole columns at once.

    for wrong in wrong_values(batch, fields, encoding, num_classes):    wrong.what, wrong.rows_N (True where it is so)

The rules are those of FORMAT.md. Columns of an encoding that has no rule of its own here are still looked through for
NaN, infinity and nulls. What makes sense but is another teacher's, only annotating again can tell (`reannotate.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Values = NDArray[Any]
Rows = NDArray[np.bool_]

_MEMBER = re.compile(r"member\d+_")
_DRAWS = re.compile(r"sampled:(\d+)")
_NEGATIVE, _LARGEST16 = 0x8000, 0x7BFF  # sign, and the largest finite number, of float16
_ROUNDING = 1e-3  # of float32 sums over many classes
_ROUNDING16 = 1e-3  # relative, of float16
_SEEDS = 1 << 53
_OTHER_PRED = "pred is not the class of the largest logit"
_OTHER_CONFIDENCE = "confidence is not what the logits say"


class Wrong(NamedTuple):
    """What is wrong, and in which rows."""

    what: str
    rows_N: Any


class _Own(NamedTuple):
    """What the rules of an encoding know beside its columns. Of an ensemble's members no row is summed up."""

    num_classes: int
    draws: int
    summary: tuple[Values, Values] | None  # pred_N, confidence_N


def wrong_values(batch: pa.RecordBatch, fields: Sequence[pa.Field], encoding: str, num_classes: int) -> Iterator[Wrong]:
    """All rules on some rows of a part whose columns have the right types; `fields` are the encoding's and those of
    members.
    """
    if not batch.num_rows:
        return
    draws = int(found[1]) if (found := _DRAWS.match(encoding)) else 0
    for name in batch.schema.names:
        yield from _without_value(name, batch.column(name))
    yield from _summary(batch, num_classes)
    if "crop" in batch.schema.names:
        yield from _views(batch)
    groups: dict[str, dict[str, pa.Array]] = {}
    for field in fields:
        prefix = found[0] if (found := _MEMBER.match(field.name)) else ""
        groups.setdefault(prefix, {})[field.name.removeprefix(prefix)] = batch.column(field.name)
    for prefix, columns in groups.items():
        pred_N, confidence_N = batch.column("pred").to_numpy(), batch.column("confidence").to_numpy()
        own = _Own(num_classes, draws, None if prefix else (pred_N, confidence_N))
        for name in columns.keys() & _RULES.keys():
            for what, rows_N in _RULES[name](columns, own):
                yield Wrong(f"{prefix}{what}", rows_N)


def _without_value(name: str, column: pa.Array) -> Iterator[Wrong]:
    """Nulls, NaN and infinity, in the column or in its lists."""
    if name != "label":
        yield Wrong(f"{name} is null", column.is_null().to_numpy(zero_copy_only=False))
    flat = column.flatten() if _is_list(column.type) else column
    if name != "label" and flat.null_count:
        yield Wrong(f"{name} holds a null", _any_in_row(column, flat.is_null().to_numpy(zero_copy_only=False)))
    if pa.types.is_floating(flat.type) and not flat.null_count:
        wrong = ~_finite(flat.to_numpy())
        if wrong.any():
            yield Wrong(f"{name} is NaN or infinite", _any_in_row(column, wrong))


def _finite(values: Values) -> Rows:
    if values.dtype == np.float16:  # by its bits, many times quicker than numpy's
        found: Rows = (values.view(np.uint16) & 0x7FFF) <= _LARGEST16
        return found
    return np.isfinite(values)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind))


def _any_in_row(column: pa.Array, wrong: Rows) -> Rows:
    """Of flags of a column's elements: the rows that have one."""
    if not _is_list(column.type):
        return wrong
    rows_N = np.zeros(len(column), np.bool_)
    rows_N[_row_of(column)[wrong]] = True
    return rows_N


def _row_of(column: pa.Array) -> Values:
    """The row of each element of a list column."""
    if pa.types.is_fixed_size_list(column.type):
        return np.repeat(np.arange(len(column)), column.type.list_size)
    return np.repeat(np.arange(len(column)), pc.list_value_length(column).to_numpy(zero_copy_only=False))


def _summary(batch: pa.RecordBatch, num_classes: int) -> Iterator[Wrong]:
    pred_N, confidence_N, entropy_N, margin_N = (
        batch.column(name).to_numpy() for name in ("pred", "confidence", "entropy", "margin")
    )
    label_N = batch.column("label").fill_null(0).to_numpy()
    yield Wrong("label is negative", label_N < 0)
    yield Wrong(f"pred is none of {num_classes} classes", (pred_N < 0) | (pred_N >= num_classes))
    least = (1 - _ROUNDING) / num_classes
    yield Wrong("confidence is not from 1/classes to 1", (confidence_N < least) | (confidence_N > 1 + _ROUNDING))
    most = math.log(num_classes) + _ROUNDING
    yield Wrong("entropy is not from 0 to log(classes)", (entropy_N < 0) | (entropy_N > most))
    yield Wrong("margin is not from 0 to confidence", (margin_N < 0) | (margin_N > confidence_N + _ROUNDING))


def _views(batch: pa.RecordBatch) -> Iterator[Wrong]:
    """Crops lie in their image, and view 0 is the whole of it."""
    crop_N4 = batch.column("crop").flatten().to_numpy().reshape(-1, 4).astype(np.float64)
    flip_N = batch.column("flip").to_numpy(zero_copy_only=False)
    seed_N = batch.column("aug_seed").to_numpy()
    clean_N = batch.column("view").to_numpy() == 0
    top_N, left_N, height_N, width_N = crop_N4.T
    outside_N = (np.minimum(top_N, left_N) < 0) | (np.minimum(height_N, width_N) <= 0)
    # float32: top and height may add up to a little more than 1
    outside_N |= np.maximum(top_N + height_N, left_N + width_N) > 1 + 1e-6
    yield Wrong("the crop is outside of its image", outside_N)
    changed_N = (crop_N4 != (0, 0, 1, 1)).any(axis=1) | flip_N | (seed_N != 0)
    yield Wrong("view 0 is not the clean view", clean_N & changed_N)
    yield Wrong("aug_seed is none of a view", (seed_N < 0) | (seed_N >= _SEEDS))


def _of_pred(values_NC: Values, own: _Own) -> Values:
    """Each row's value of its `pred`, which need be no class."""
    assert own.summary is not None
    found: Values = values_NC[np.arange(len(values_NC)), own.summary[0].clip(0, own.num_classes - 1)]
    return found


def _is_other(own: _Own, logits_NC: NDArray[np.float32], relative_N: Values | float = 0.0) -> Rows:
    """Where the confidence isn't the largest probability, which these logits, the largest 0, know up to rounding."""
    assert own.summary is not None
    largest_N = 1 / np.exp(logits_NC, out=logits_NC).sum(axis=-1)
    found: Rows = np.abs(largest_N - own.summary[1]) > 5 * _ROUNDING16 + relative_N * largest_N
    return found


def _matrix(column: pa.Array) -> Values:
    values: Values = column.flatten().to_numpy().reshape(len(column), -1)
    return values


def _dense(columns: Mapping[str, pa.Array], own: _Own) -> Iterator[Wrong]:
    """No logit is above 0, one is 0: that of `pred`. Looked at as integers: sign and magnitude."""
    bits_NC = _matrix(columns["logits"]).view(np.uint16)
    positive_NC = (bits_NC - np.uint16(1)) < _NEGATIVE - 1  # zero wraps around
    yield Wrong("logits are above 0", positive_NC.any(axis=1))
    magnitude_NC = bits_NC & 0x7FFF
    yield Wrong("logits have no 0", magnitude_NC.min(axis=1) != 0)
    if own.summary is not None:
        logits_NC = _matrix(columns["logits"])
        yield Wrong(_OTHER_PRED, _of_pred(logits_NC, own) < -_ROUNDING16)
        yield Wrong(_OTHER_CONFIDENCE, _is_other(own, logits_NC.astype(np.float32)))


def _dense8(columns: Mapping[str, pa.Array], own: _Own) -> Iterator[Wrong]:
    """The largest logit, that of `pred`, is at level 255, the least at 0."""
    levels_NC = _matrix(columns["logits8"])
    min_N = columns["logit_min"].to_numpy()
    yield Wrong("logits8 have no 255", levels_NC.max(axis=1) != 255)
    yield Wrong("logits8 have no 0", (levels_NC.min(axis=1) != 0) & (min_N < 0))
    yield Wrong("logit_min is not from -100 to 0", (min_N > 0) | (min_N < -100))
    if own.summary is not None:
        yield Wrong(_OTHER_PRED, min_N * (1 - _of_pred(levels_NC, own) / 255) < -_ROUNDING16)
        logits_NC = min_N[:, None] * (1 - levels_NC * np.float32(1 / 255))
        yield Wrong(_OTHER_CONFIDENCE, _is_other(own, logits_NC, np.expm1(-min_N / 255 / 2)))


def _topk(columns: Mapping[str, pa.Array], own: _Own) -> Iterator[Wrong]:
    """Classes once each, their logits from 0 downwards, and a tail that is below them."""
    id_NK, logit_NK = _matrix(columns["topk_id"]), _matrix(columns["topk_logit"]).astype(np.float32)
    in_order_NK = np.sort(id_NK, axis=1)
    yield Wrong(f"topk_id holds none of {own.num_classes} classes", in_order_NK[:, -1] >= own.num_classes)
    yield Wrong("topk_id holds a class twice", (in_order_NK[:, 1:] == in_order_NK[:, :-1]).any(axis=1))
    yield Wrong("topk_logit doesn't begin with 0", logit_NK[:, 0] != 0)
    yield Wrong("topk_logit doesn't fall", (logit_NK[:, 1:] > logit_NK[:, :-1]).any(axis=1))
    lse_N, mean_N, var_N = (columns[name].to_numpy() for name in ("lse", "tail_mean", "tail_var"))
    most = math.log(own.num_classes) + _ROUNDING
    yield Wrong("lse is not from 0 to log(classes)", (lse_N < -_ROUNDING) | (lse_N > most))
    yield Wrong("tail_var is negative", var_N < 0)
    if id_NK.shape[1] == own.num_classes:
        yield Wrong("there is a tail of no classes", (mean_N != 0) | (var_N != 0))
    else:
        last_N = logit_NK[:, -1]
        yield Wrong("tail_mean is above the kept logits", mean_N > last_N + _ROUNDING16 * (1 + np.abs(last_N)))
    if own.summary is not None:
        pred_N, confidence_N = own.summary
        yield Wrong(_OTHER_CONFIDENCE, np.abs(np.exp(-lse_N) - confidence_N) > _ROUNDING16)
        high_NK = logit_NK >= -_ROUNDING16
        own_N = (high_NK & (id_NK == pred_N[:, None])).any(axis=1) | high_NK.all(axis=1)
        yield Wrong(_OTHER_PRED, ~own_N)


def _sampled(columns: Mapping[str, pa.Array], own: _Own) -> Iterator[Wrong]:
    """Classes once each, ascending, drawn at least once; all draws together."""
    ids, counts = columns["sample_id"], columns["sample_count"]
    length_N = pc.list_value_length(ids).to_numpy(zero_copy_only=False)
    uneven_N = (length_N != pc.list_value_length(counts).to_numpy(zero_copy_only=False)) | (length_N == 0)
    yield Wrong("sample_id and sample_count have not one length", uneven_N)
    id_E, row_E = ids.flatten().to_numpy().astype(np.int64), _row_of(ids)
    yield Wrong(f"sample_id holds none of {own.num_classes} classes", _any_in_row(ids, id_E >= own.num_classes))
    falling_E = np.zeros(len(id_E), np.bool_)
    falling_E[1:] = (id_E[1:] <= id_E[:-1]) & (row_E[1:] == row_E[:-1])
    yield Wrong("sample_id doesn't rise", _any_in_row(ids, falling_E))
    count_E = counts.flatten().to_numpy().astype(np.int64)
    yield Wrong("sample_count holds a 0", _any_in_row(counts, count_E == 0))
    draws_N = np.bincount(_row_of(counts), weights=count_E, minlength=len(counts))
    yield Wrong(f"sample_count doesn't add up to {own.draws}", draws_N != own.draws)


_Rule = Callable[[Mapping[str, pa.Array], _Own], Iterator[Wrong]]
_RULES: Mapping[str, _Rule] = {"logits": _dense, "logits8": _dense8, "topk_id": _topk, "sample_id": _sampled}

"""Between a part's columns and tensors: numbers, lists of one length, and lists of any length, padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

PAD = -1
"""In a row of a tensor that stands for a list of any length: no element."""


def to_arrow(column: Tensor, kind: pa.DataType) -> pa.Array:
    """A tensor's rows, (N,) or (N, K), as a column of this type. In lists of any length, `PAD` is left out."""
    values = column.numpy()
    if pa.types.is_fixed_size_list(kind):
        flat = values.reshape(-1).astype(kind.value_type.to_pandas_dtype())
        return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind)
    if pa.types.is_list(kind):
        there = values != PAD
        offsets = np.concatenate([[0], there.sum(-1).cumsum()]).astype(np.int32)
        flat = pa.array(values[there].astype(kind.value_type.to_pandas_dtype()), kind.value_type)
        return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)
    return pa.array(values.astype(kind.to_pandas_dtype()), kind)


def to_torch(column: pa.ChunkedArray, width: int = 0) -> Tensor:
    """A column as a tensor (N,) or (N, K); lists of any length as (N, width), filled up with `PAD`."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of no chunks
        array = pa.array([], column.type)
    if pa.types.is_list(array.type):
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        padded = np.full((len(array), width), PAD, np.int64)
        padded[np.arange(width) < lengths[:, None]] = array.flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(padded)
    if pa.types.is_fixed_size_list(array.type):
        return _numbers(array.flatten()).view(-1, array.type.list_size)
    return _numbers(array)


def tensors(table: pa.Table, fields: Sequence[pa.Field]) -> dict[str, Tensor]:
    """The columns of these fields, each (N,) or (N, K)."""
    return {field.name: to_torch(table[field.name]) for field in fields}


def _numbers(array: pa.Array) -> Tensor:
    values = array.to_numpy(zero_copy_only=False)
    wider = {np.dtype(np.uint16): np.int32, np.dtype(np.uint32): np.int64}.get(values.dtype)
    return torch.from_numpy(values.astype(wider) if wider else values.copy())

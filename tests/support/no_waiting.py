"""Finds operations that make a process wait for its device; on a CPU they cost nothing, but they are called as well."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# `item`, `float`, `bool` and so on of a tensor all call the first one. The others have results whose shape depends on
# values.
OPERATIONS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.equal.default,
}
# With a mask as index, as in `x[mask]`, they call `nonzero`, which no dispatch mode sees.
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
# The first four copy all values to the memory of the process, and the others from there to the device. No operation
# shows that.
METHODS = {
    *(torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__),
    *(torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor),
}


def _fail(func: Any) -> None:
    raise AssertionError(f"{func} waits for the device:\n{''.join(traceback.format_stack(limit=25))}")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func in INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1])
        if func in OPERATIONS or masked:
            _fail(func)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS:
            _fail(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise AssertionError, with the stack of the caller, where a value of a tensor is read inside the block."""
    with _Methods(), _Operations():
        yield

"""Write a part of a pipeline as an ONNX graph, compare it with PyTorch, and time both."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cli import UserError, cause
from .onnx_parts import Part

LARGEST_SIZE = 8192
# Diffusers treats larger batches in another way, for kernels that a graph does not have; the graph takes any batch.
LARGEST_TRACED_BATCH = 63
LEAST_TIMING_SECONDS = 1.0
TIMED_CALLS = (5, 50)  # at least, at most


def write_graph(part: Part, path: Path, opset: int) -> bool:
    """Write the network of a part to `path`, for any batch size; return whether its other sizes may vary as well.

    Where an operation of the network needs a fixed size, the graph has the size of training.

    Raises:
        UserError: the network cannot be exported.
    """
    error: Exception | None = None
    for varying in (True, False) if part.axes else (False,):
        try:
            with torch.no_grad(), _quiet(), _plain_attention(part.network):
                inputs = part.example(2, int(varying))
                program = torch.export.export(
                    part.network.eval(), (), kwargs=inputs, dynamic_shapes=_dimensions(part, inputs, varying),
                    strict=False,
                )  # fmt: skip
                onnx_program = torch.onnx.export(
                    program, output_names=list(part.outputs), opset_version=opset, verbose=False
                )
            assert onnx_program is not None
            onnx_program.save(path)
            return varying
        # The exporters raise dozens of classes; whatever it is, a size may be the reason.
        except Exception as caught:
            error = caught
    assert error is not None
    raise UserError(f"part '{part.name}' cannot be exported to ONNX with opset {opset} ({cause(error)})") from error


def _dimensions(part: Part, inputs: dict[str, Any], varying: bool) -> dict[str, Any]:
    """Return which axes of the inputs vary, as `torch.export` takes it."""
    batch = torch.export.Dim("batch", min=1, max=LARGEST_TRACED_BATCH)
    named: dict[str, Any] = {}

    def axes(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [axes(f"{name}_{number}", one) for number, one in enumerate(value)]
        if name in part.without_batch:
            return {}
        result = {0: batch}
        for axis, (dimension, multiple) in part.axes.get(name, {}).items() if varying else ():
            largest = part.largest.get(dimension, LARGEST_SIZE)
            size = named.setdefault(dimension, torch.export.Dim(dimension, min=1, max=largest))
            result[axis] = size if multiple == 1 else multiple * size
        return result

    return {name: axes(name, value) for name, value in inputs.items()}


@contextmanager
def _plain_attention(network: torch.nn.Module) -> Iterator[None]:
    """Context manager in which models of Transformers compute attention step by step.

    The fused kernel returns a tensor whose memory layout the exporter takes for fixed (T5).
    """
    models = [module for module in network.modules() if hasattr(module, "set_attn_implementation")]
    before = [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model, implementation in zip(models, before, strict=True):
            model.set_attn_implementation(implementation)


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that hides what the exporters report about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def open_graph(path: Path, num_threads: int | None = None) -> Any:
    """Open a graph with ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = num_threads or 0
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def largest_difference(part: Part, session: Any, varying: bool) -> float:
    """Return the largest absolute difference of the outputs of a graph and of PyTorch, for two batches.

    The second one has more rows and, if the sizes may vary, is larger than the example of the export.
    """
    differences = []
    for batch, units in ((1, 0), (3, 2 if varying else 0)):
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(batch)
            inputs = part.example(batch, units)
            expected = part.network(**inputs)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        outputs = session.run(None, arrays(inputs))
        differences += [float(np.abs(own - its.numpy()).max()) for own, its in zip(outputs, expected, strict=True)]
    # NaN compares as neither smaller nor larger, so that `max` could drop it.
    return float("nan") if any(map(np.isnan, differences)) else max(differences)


def arrays(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return inputs by the names that a graph gives them: an entry of a list has its number in its name."""
    flat: dict[str, np.ndarray] = {}
    for name, value in inputs.items():
        if isinstance(value, list):
            flat |= {f"{name}_{number}": one.numpy() for number, one in enumerate(value)}
        else:
            flat[name] = value.numpy()
    return flat


def latencies(part: Part, session: Any) -> tuple[float, float]:
    """Return the seconds that PyTorch and ONNX Runtime need for a batch of one, medians of alternating calls."""
    inputs = part.example(1, 0)
    feeds = arrays(inputs)
    with torch.inference_mode():
        return alternating(lambda: part.network(**inputs), lambda: session.run(None, feeds))


def alternating(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, float]:
    """Return the median seconds of two functions that are called in turn, so that both meet the same machine."""
    seconds: tuple[list[float], list[float]] = ([], [])
    one(), other()  # memory is allocated in the first call
    started = time.perf_counter()
    least, most = TIMED_CALLS
    while len(seconds[0]) < most and (len(seconds[0]) < least or time.perf_counter() - started < LEAST_TIMING_SECONDS):
        for function, times in zip((one, other), seconds, strict=True):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
    return statistics.median(seconds[0]), statistics.median(seconds[1])

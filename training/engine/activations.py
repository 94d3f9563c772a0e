"""The activations of a forward pass: feature maps by resolution, and their bytes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from training.core.draws import Draws
from training.core.stage import Batch, Phase
from training.engine.validation import evaluating


@dataclass
class Activations:
    """What the modules of a phase return in a forward pass.

    Attributes:
        channels: number of channels of each feature map, by height and width.
        bytes_at: bytes of these feature maps, by height and width.
        bytes: bytes of all tensors that modules return.
    """

    channels: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    bytes_at: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    bytes: int = 0

    def record(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Count the output of a module; a forward hook."""
        if not isinstance(output, torch.Tensor):
            return
        size = output.numel() * output.element_size()
        # A container returns the tensor of its last child, which is counted there.
        size = 0 if any(module.children()) else size
        self.bytes += size
        if output.ndim == 4:
            height, width = output.shape[-2:]
            self.channels[height, width].append(output.shape[1])
            self.bytes_at[height, width] += size


def measure_activations(phase: Phase, batch: Batch, draws: Draws) -> Activations:
    """Return the activations of one forward pass of a phase, in eval mode and without gradients."""
    measured = Activations()
    hooks = [module.register_forward_hook(measured.record) for module in phase.modules()]
    try:
        with evaluating([phase], None):
            phase(batch, draws)
    finally:
        for hook in hooks:
            hook.remove()
    return measured

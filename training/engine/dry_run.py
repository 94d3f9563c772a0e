"""`--dry_run`: what a run would be, without training a step."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from training.core.batches import fetch
from training.core.draws import Draws
from training.core.layout import BatchLayout, steps_per_epoch
from training.core.stage import Stage
from training.engine.balance import balanced_strata
from training.engine.sampler import StepSampler
from training.engine.validation import evaluating

if TYPE_CHECKING:
    from training.engine.run_config import RunConfig


def missing_inputs(config: RunConfig) -> str | None:
    """What a run would make before anything else, and could not be looked at without; None when all is there."""
    missing = {path: command for path, command in config.recipes().items() if not Path(path).exists()}
    if not missing:
        return None
    lines = [_resolved(config), "inputs that are missing; the run would make them first, and so can you:"]
    lines += [f"  {path}\n    python {command}" for path, command in missing.items()]
    return "\n".join([*lines, "parameters, shapes and memory can be told once they are there"])


def _resolved(config: RunConfig) -> str:
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def report(stage: Stage, config: RunConfig, num_processes: int) -> str:
    """The resolved config, parameters, tensor shapes per resolution, steps per epoch and a memory estimate."""
    data = stage.train_data()
    layout = BatchLayout(config.train_batch_size, num_processes, config.gradient_accumulation_steps)
    spe = steps_per_epoch(len(data), layout)
    total = config.total_steps(spe)
    lines = [_resolved(config)]
    lines.append(f"{len(data)} images, {spe} steps an epoch of {layout.global_batch_size} images, {total} steps in all")
    balanced_strata(data, config)
    state_bytes = 0
    activations = 0
    for phase in stage.phases:
        trained = sum(p.numel() for p in phase.parameters() if p.requires_grad)
        fixed = sum(p.numel() for p in phase.parameters() if not p.requires_grad)
        lines.append(f"\nphase '{phase.name}': {trained:,} parameters trained, {fixed:,} fixed")
        for name, module in phase.named_children():
            lines.append(
                f"  {name}: {type(module).__name__}, {sum(p.numel() for p in module.parameters()):,} parameters"
            )
        shapes, phase_activations = _shapes(stage, phase, data, config, layout)
        lines += shapes
        activations = max(activations, phase_activations)
        state_bytes += (4 * 4) * trained + 4 * fixed  # weights, gradients, two moments
    for module in stage.frozen:
        size = sum(p.numel() for p in module.parameters())
        lines.append(f"frozen: {type(module).__name__}, {size:,} parameters")
        state_bytes += 4 * size
    if config.use_ema:
        state_bytes += 4 * sum(p.numel() for m in stage.ema_of.values() for p in m.parameters())
    lines.append(
        f"\nmemory, about: {state_bytes / 2**20:.0f} MiB for weights, gradients, optimizer and EMA weights, and "
        f"{activations * config.train_batch_size / 2**20:.0f} MiB for activations at --train_batch_size "
        f"{config.train_batch_size} (float32; half of that under bf16 or fp16)"
    )
    return "\n".join(lines)


def _shapes(stage: Stage, phase, data, config, layout) -> tuple[list[str], int]:
    """Lines on the feature maps of one forward pass with one sample, and the bytes of all module outputs."""
    maps: dict[tuple[int, int], list[int]] = defaultdict(list)
    total = 0

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal total
        if not isinstance(output, torch.Tensor):
            return
        if not any(module.children()):
            total += output.numel() * output.element_size()
        if output.ndim == 4:
            maps[tuple(output.shape[-2:])].append(output.shape[1])

    hooks = [module.register_forward_hook(note) for module in phase.modules()]
    key = StepSampler(len(data), layout, config.seed).keys(0, 0)[:1]
    try:
        with evaluating([phase], None):
            phase(fetch(data, key), Draws(config.seed, 0, [0]))
    finally:
        for hook in hooks:
            hook.remove()
    lines = [
        f"  {height}×{width}: {min(channels)} to {max(channels)} channels in {len(channels)} feature maps"
        for (height, width), channels in sorted(maps.items(), reverse=True)
    ]
    return lines, total

"""`--dry_run`: describe a run without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from training.core.batches import fetch
from training.core.draws import Draws
from training.core.layout import BatchLayout, steps_per_epoch
from training.core.stage import Phase, Stage
from training.engine import prepare
from training.engine.activations import measure_activations
from training.engine.balance import balanced_strata
from training.engine.sampler import StepSampler

if TYPE_CHECKING:
    from training.engine.run_config import RunConfig


def missing_inputs(config: RunConfig) -> str | None:
    """Describe the missing inputs, without which the stage cannot be built; None when all inputs exist."""
    missing = prepare.missing_inputs(config.recipes())
    if not missing:
        return None
    lines = [*config.announcements, *prepare.described(missing)]
    lines += ["parameter counts, shapes and memory can be estimated once these inputs exist", *_resolved(config)]
    return "\n".join(lines)


def _resolved(config: RunConfig) -> list[str]:
    """Return all settings as YAML, if --print_config asks for them."""
    return [yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)] if config.prints_config else []


def report(stage: Stage, config: RunConfig, num_processes: int) -> str:
    """Return steps per epoch, parameter counts, feature maps per resolution and memory."""
    data = stage.train_data()
    layout = BatchLayout(config.train_batch_size, num_processes, config.gradient_accumulation_steps)
    spe = steps_per_epoch(len(data), layout, getattr(data, "batch_groups", None))
    total = config.total_steps(spe)
    lines = list(config.announcements)
    lines.append(
        f"{len(data)} images, {spe} steps per epoch with a global batch of {layout.global_batch_size} images, "
        f"{total} steps in total"
    )
    lines += stage.data_notes
    balanced_strata(data, config)  # for its checks and its log line
    state_bytes = 0
    activations = 0
    for phase in stage.phases:
        trained = sum(p.numel() for p in phase.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in phase.parameters() if not p.requires_grad)
        lines.append(f"\nphase '{phase.name}': {trained:,} trainable parameters, {frozen:,} frozen")
        for name, module in phase.named_children():
            lines.append(
                f"  {name}: {type(module).__name__}, {sum(p.numel() for p in module.parameters()):,} parameters"
            )
        shapes, phase_activations = _shapes(stage, phase, data, config, layout)
        lines += shapes
        activations = max(activations, phase_activations)
        state_bytes += (4 * 4) * trained + 4 * frozen  # weights, gradients, two moments
    for module in stage.frozen:
        size = sum(p.numel() for p in module.parameters())
        lines.append(f"frozen: {type(module).__name__}, {size:,} parameters")
        state_bytes += 4 * size
    if config.use_ema:
        state_bytes += 4 * sum(p.numel() for m in stage.ema_of.values() for p in m.parameters())
    lines.append(
        f"\nestimated memory: {state_bytes / 2**20:.0f} MiB for weights, gradients, optimizer and EMA weights, and "
        f"{activations * config.train_batch_size / 2**20:.0f} MiB for activations at --train_batch_size "
        f"{config.train_batch_size} (float32; activations take half as much with bf16 or fp16)"
    )
    return "\n".join([*lines, *_resolved(config)])


def _shapes(stage: Stage, phase: Phase, data, config, layout) -> tuple[list[str], int]:
    """Run one forward pass with one sample; return lines about its feature maps, and the bytes of its activations."""
    key = StepSampler(len(data), layout, config.seed).keys(0, 0)[:1]
    measured = measure_activations(phase, fetch(data, key), Draws(config.seed, 0, [0]))
    lines = [
        f"  {height}×{width}: {min(channels)} to {max(channels)} channels in {len(channels)} feature maps"
        for (height, width), channels in sorted(measured.channels.items(), reverse=True)
    ]
    return lines, measured.bytes

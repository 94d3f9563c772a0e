"""The groups of metrics in trackers. W&B, TensorBoard and Trackio show the charts of `group/…` under one heading.

metrics.csv keeps the names without a group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

QUALITY = "quality"
NOISE_LEVELS = "loss_by_noise_level"
# The first pattern that matches the whole name decides. Whatever else a stage computes in a step is a part of its loss.
_GROUPS = (
    (re.compile(r"eval_.*"), QUALITY),
    (re.compile(r"val_loss_noise_.*"), NOISE_LEVELS),
    (re.compile(r"val_.*"), "validation"),
    (re.compile(r"learning_rate|(.*_)?(grad_norm|grad_scale)|weight_.*"), "optimizer"),
    (re.compile(r"(peak_)?memory_mib"), "memory"),
    (re.compile(r"epoch|images_seen|images_per_second|elapsed_seconds"), "throughput"),
)
_OTHER = "loss"


def group_of(name: str) -> str:
    """Return the group of a metric, given its column in metrics.csv."""
    return next((group for pattern, group in _GROUPS if pattern.fullmatch(name)), _OTHER)


def grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics with their group in front of their names; a name that contains `/` has a group already."""
    return {name if "/" in name else f"{group_of(name)}/{name}": value for name, value in metrics.items()}

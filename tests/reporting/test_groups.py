"""The groups of metrics in trackers."""

from __future__ import annotations

import pytest

from training.reporting.groups import group_of, grouped


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("loss", ["loss", "critic_loss", "denoising_loss", "epoch_loss_mean", "l1", "kl", "counts_ce"]),
        ("validation", ["val_loss", "val_psnr", "val_control_iou", "val_image_loss"]),
        ("loss_by_noise_level", ["val_loss_noise_0_25", "val_loss_noise_75_100"]),
        ("quality", ["eval_kid", "eval_kid_standard_error", "eval_fd", "eval_copy_rate"]),
        ("optimizer", ["learning_rate", "grad_norm", "critic_grad_norm", "grad_scale", "weight_l1"]),
        ("throughput", ["epoch", "images_seen", "images_per_second", "elapsed_seconds"]),
        ("memory", ["memory_mib", "peak_memory_mib"]),
    ],
)
def test_the_group_of_every_kind_of_metric(group, names):
    assert {name: group_of(name) for name in names} == dict.fromkeys(names, group)


def test_groups_are_put_in_front_once():
    assert grouped({"loss": 1.0, "best/val_loss": 0.5}) == {"loss/loss": 1.0, "best/val_loss": 0.5}

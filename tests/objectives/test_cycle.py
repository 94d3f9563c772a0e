"""The cycle losses against the metrics that they stand for, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.metrics.cycle import palette_distance
from training.objectives.cycle import counts_loss, grammar_loss, palette_loss

GENERATOR = torch.Generator().manual_seed(0)


def bytes_of(colors: torch.Tensor) -> list[str]:
    return ["#" + "".join(f"{round(float(value) * 255):02x}" for value in color) for color in colors]


def test_the_palette_loss_is_the_palette_distance():
    """For colours of 8 bits, a palette with missing colours, and pixels that do not count."""
    pixels = torch.randint(0, 256, (3, 3, 6, 5), generator=GENERATOR) / 255
    palette = torch.randint(0, 256, (3, 4, 3), generator=GENERATOR) / 255
    present = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    counted = torch.rand(3, 6, 5, generator=GENERATOR) < 0.5
    counted[2] = False
    expected = []
    for poster, colors, known, outside in zip(pixels, palette, present, counted, strict=True):
        image = (poster.permute(1, 2, 0) * 255).round().byte().numpy()
        expected.append(palette_distance(image, outside.numpy(), bytes_of(colors[known])))
    loss = palette_loss(pixels, palette, present, counted)
    assert float(loss) * 255 == pytest.approx(np.mean(expected), rel=1e-3)


def test_a_poster_without_a_palette_does_not_count():
    pixels = torch.rand(2, 3, 4, 4, generator=GENERATOR)
    palette = torch.rand(2, 5, 3, generator=GENERATOR)
    counted = torch.ones(2, 4, 4, dtype=torch.bool)
    present = torch.tensor([[True] * 5, [False] * 5])
    alone = palette_loss(pixels[:1], palette[:1], present[:1], counted[:1])
    assert torch.equal(palette_loss(pixels, palette, present, counted), alone)
    assert float(palette_loss(pixels, palette, torch.zeros_like(present), counted)) == 0


def test_the_gradient_of_the_palette_loss_leads_to_the_nearest_color_and_is_finite_there():
    palette, present = torch.tensor([[[1.0, 0, 0]]]), torch.ones(1, 1, dtype=torch.bool)
    pixels = torch.tensor([0.5, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2).clone().requires_grad_()
    counted = torch.ones(1, 2, 2, dtype=torch.bool)
    counted[0, 0, 0] = False
    palette_loss(pixels, palette, present, counted).backward()
    assert (pixels.grad[0, 0].flatten()[1:] < 0).all()
    assert float(pixels.grad[0, :, 0, 0].abs().sum()) == 0, "a pixel that does not count has no gradient"
    exact = palette[0].view(1, 3, 1, 1).clone().requires_grad_()
    palette_loss(exact, palette, present, torch.ones(1, 1, 1, dtype=torch.bool)).backward()
    assert torch.isfinite(exact.grad).all()


def test_absent_fields_do_not_count():
    read, asked = torch.tensor([[1.0, 5.0], [2.0, 0.0]]), torch.zeros(2, 2)
    present = torch.tensor([[True, False], [True, True]])
    assert float(grammar_loss(read, asked, present)) == pytest.approx((1 + 4 + 0) / 3)
    logits = [torch.zeros(2, 4), torch.tensor([[100.0, 0, 0, 0], [0, 100.0, 0, 0]])]
    counts = torch.tensor([[1, 0], [2, 3]])
    assert float(counts_loss(logits, counts, torch.tensor([[True, True], [True, False]]))) == pytest.approx(
        2 * math.log(4) / 3
    )
    assert float(counts_loss(logits, counts, torch.zeros(2, 2, dtype=torch.bool))) == 0

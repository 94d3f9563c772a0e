"""PSNR and SSIM compared with closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from training.metrics.images import psnr, ssim, to_pil


def test_psnr_of_a_constant_error():
    images = torch.zeros(3, 3, 16, 16)
    wrong = images + torch.tensor([0.02, 0.2, 1.0]).reshape(-1, 1, 1, 1)
    assert psnr(wrong, images).tolist() == pytest.approx([20 * math.log10(2 / e) for e in (0.02, 0.2, 1.0)], abs=1e-3)
    assert psnr(images, images).tolist() == pytest.approx([100] * 3)


def test_values_out_of_range_count_as_their_limits():
    white = torch.ones(1, 3, 16, 16)
    assert psnr(5 * white, white).item() == pytest.approx(100)
    assert ssim(5 * white, white).item() == pytest.approx(1)


def test_ssim_of_constants_is_the_luminance_term():
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.25)
    c1 = (0.01 * 2) ** 2
    assert ssim(a, b).item() == pytest.approx((2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1), rel=1e-4)


def test_ssim_of_an_inverted_pattern_is_the_structure_term():
    """Local means are 0 and variances a², so that SSIM is (-2a² + C2) / (2a² + C2)."""
    rows = torch.arange(32).reshape(-1, 1) + torch.arange(32)
    board = (0.5 * (-1.0) ** rows).expand(1, 3, 32, 32)
    c2 = (0.03 * 2) ** 2
    assert ssim(board, board).item() == pytest.approx(1, abs=1e-6)
    assert ssim(board, -board).item() == pytest.approx((-0.5 + c2) / (0.5 + c2), rel=1e-3)


def test_ssim_is_computed_for_each_sample_separately():
    images = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    other = images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    one_by_one = [ssim(images[i : i + 1], other[i : i + 1]).item() for i in range(4)]
    assert ssim(images, other).tolist() == pytest.approx(one_by_one, abs=1e-6)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="11×11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_pixels_of_an_image():
    image = torch.tensor([-1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 4).expand(3, 1, 4)
    assert [to_pil(image).getpixel((x, 0))[0] for x in range(4)] == [0, 128, 255, 255]

"""Metrics of how well a control is followed, compared with values by hand, and readers of controls.

B images, C control channels, H W pixels.
"""

from __future__ import annotations

import math

import pytest
import torch

from pipelines.autoencoder import AutoencoderPipeline
from pipelines.layout_analysis import LayoutAnalysisPipeline
from pipelines.models.layout_encoder import LayoutEncoderModel
from pipelines.models.multi_head_autoencoder import MultiHeadAutoencoderKL
from pipelines.tools.cli import UserError
from tests.support.tiny_models import TWO_LEVELS, tiny_pipeline
from training.metrics.control import ControlReader, control_iou, in_standard_errors, others

# --- intersection over union


def channel(rows: str) -> torch.Tensor:
    """Convert a drawing to a tensor H W; # is 1."""
    return torch.tensor([[float(c == "#") for c in line] for line in rows.split()])


def test_iou_by_hand():
    read = torch.stack([channel("##.. ##.."), channel(".... ...#")])[None].bool()
    target = torch.stack([channel(".##. .##."), channel(".... ...#")])[None]
    # The overlap is 2 of 6 pixels in the first channel and all pixels in the second.
    assert control_iou(read, target).tolist() == pytest.approx([(2 / 6 + 1) / 2])


def test_empty_channels_do_not_count_and_all_empty_gives_one():
    full, empty = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    assert control_iou(torch.cat([full, empty], 1).bool(), torch.cat([full, empty], 1)).tolist() == [1.0]
    assert control_iou(torch.cat([full, full], 1).bool(), torch.cat([full, empty], 1)).tolist() == [0.5]
    assert control_iou(empty.bool(), empty).tolist() == [1.0]
    assert control_iou(empty.bool(), full).tolist() == [0.0]
    assert control_iou(full.bool(), empty).tolist() == [0.0]


def test_each_image_has_its_own_iou_and_grey_counts_above_a_half():
    target = torch.stack([torch.full((1, 2, 2), 0.6), torch.full((1, 2, 2), 0.5)])
    assert control_iou(torch.ones(2, 1, 2, 2, dtype=torch.bool), target).tolist() == [1.0, 0.0]


# --- controls of other samples


def test_others_never_returns_the_own_control():
    batch = torch.arange(4.0)[:, None, None, None].expand(4, 2, 3, 3)
    shuffled = others(batch)
    assert sorted(shuffled[:, 0, 0, 0].tolist()) == [0, 1, 2, 3]
    assert (shuffled != batch).all()
    lone = torch.arange(6.0).reshape(1, 1, 3, 2)
    assert torch.equal(others(lone)[0, 0], lone[0, 0].flip(0))


# --- standard errors


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [-3.0, 1.0], [0.1] * 5 + [0.2] * 4])
def test_mean_over_standard_error(values):
    x = torch.tensor(values, dtype=torch.float64)
    expected = x.mean() / (x.std(unbiased=True) / len(x) ** 0.5)
    assert in_standard_errors(x.sum().item(), x.square().sum().item(), len(x)) == pytest.approx(expected.item())


def test_differences_without_a_spread():
    assert in_standard_errors(0.0, 0.0, 5) == 0.0
    assert in_standard_errors(10.0, 20.0, 5) == math.inf  # five times 2
    assert in_standard_errors(-10.0, 20.0, 5) == -math.inf
    assert in_standard_errors(3.0, 9.0, 1) == 0.0
    assert in_standard_errors(0.0, 0.0, 0) == 0.0


def test_noise_is_within_its_errors():
    """For 50 differences around 0, 5 % of the draws are beyond 2.01 (Student's t, 49 degrees of freedom)."""
    draws = torch.randn(400, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = [in_standard_errors(d.sum().item(), d.square().sum().item(), 50) for d in draws]
    beyond = sum(abs(x) > 2.01 for x in values) / 400
    assert abs(beyond - 0.05) < 3 * (0.05 * 0.95 / 400) ** 0.5


# --- readers


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("layout")
    LayoutAnalysisPipeline(encoder=LayoutEncoderModel((8, 16), sample_size=16).eval()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmenting(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("segmenting")
    AutoencoderPipeline(vae=MultiHeadAutoencoderKL(**TWO_LEVELS, num_mask_classes=3).eval()).save_pretrained(folder)
    return folder


def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_layout_encoder_reads_roles_and_masks_in_the_given_order(layout):
    encoder = LayoutEncoderModel.from_pretrained(layout / "encoder")
    with torch.no_grad():
        expected = encoder(images())
    both = ControlReader(str(layout), "masks", ["text_mask", "image_mask"], 2)(images())
    assert both.dtype == torch.bool
    assert torch.equal(both, torch.cat([expected.text_mask, expected.image_mask], 1) > 0)
    assert torch.equal(ControlReader(str(layout), "masks", ["image_mask", "text_mask"], 2)(images()), both.flip(1))
    assert torch.equal(ControlReader(str(layout), "masks", ["image_mask"], 1)(images()), both[:, 1:])
    roles = ControlReader(str(layout), "classes", ["color_role"], 6)(images())
    assert torch.equal(roles.float().argmax(1), expected.color_role.argmax(1))
    assert (roles.sum(1) == 1).all()


def test_a_segmentation_head_reads_classes(segmenting):
    reader = ControlReader(str(segmenting), "classes", ["mask"], 3)
    read = reader(images())
    assert read.shape == (2, 3, 16, 16)
    assert (read.sum(1) == 1).all()
    assert not any(p.requires_grad for p in reader.module.parameters())
    # What is read equals the output of the head for the latents of the image.
    vae = MultiHeadAutoencoderKL.from_pretrained(segmenting / "vae")
    with torch.no_grad():
        logits = vae.segment(vae.encode(images()).latent_dist.mode())
    assert torch.equal(read.float().argmax(1), logits.argmax(1))


@pytest.mark.parametrize(
    ("reader", "kind", "names", "channels"),
    [
        ("layout", "image", [], 3),
        ("layout", "masks", ["text_mask", "hierarchy"], 2),
        ("layout", "classes", ["color_role"], 4),
        ("segmenting", "masks", ["text_mask"], 1),
        ("segmenting", "classes", ["mask"], 4),
    ],
)
def test_a_reader_of_other_controls_is_refused(request, reader, kind, names, channels):
    path = str(request.getfixturevalue(reader))
    with pytest.raises(UserError, match="--reader .* does not read this control") as caught:
        ControlReader(path, kind, names, channels)
    assert kind in str(caught.value)


def test_a_model_that_reads_nothing_is_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--reader .* does not read this control"):
        ControlReader(str(tmp_path), "classes", ["mask"], 3)

"""Controls as tensors: each kind is read as in training, and invalid controls are refused; steps during sampling."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.common.control_images import control_tensor, per_net, step_share
from training.data.companions import control_of

HEIGHT, WIDTH = 4, 6


def net(kind: str, channels: int) -> SimpleNamespace:
    """The part of a ControlNet's config that describes its control."""
    return SimpleNamespace(control_kind=kind, conditioning_channels=channels)


def noise(*shape: int, seed: int = 0, below: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape, dtype=np.uint8)


def tensor(kind: str, channels: int, control: object) -> torch.Tensor:
    return control_tensor(net(kind, channels), control, HEIGHT, WIDTH)


def test_a_colour_image_is_divided_by_255():
    pixels = noise(HEIGHT, WIDTH, 3)
    result = tensor("image", 3, Image.fromarray(pixels))
    assert result.shape == (1, 3, HEIGHT, WIDTH)
    assert result.dtype == torch.float32
    assert torch.equal(result[0], torch.from_numpy(pixels).movedim(2, 0) / 255)
    both = tensor("image", 3, [Image.fromarray(pixels), Image.fromarray(255 - pixels)])
    torch.testing.assert_close(both, torch.cat([result, 1 - result]))


def test_masks_are_channels_in_the_given_order():
    masks = [Image.fromarray(noise(HEIGHT, WIDTH, seed=seed)) for seed in range(4)]
    one = tensor("masks", 2, masks[:2])
    assert one.shape == (1, 2, HEIGHT, WIDTH)
    assert torch.equal(one[0, 1], torch.from_numpy(np.array(masks[1])) / 255)
    assert torch.equal(tensor("masks", 2, [masks[:2], masks[2:]])[:1], one)
    assert torch.equal(tensor("masks", 2, [tuple(masks[:2])]), one)
    assert torch.equal(tensor("masks", 2, masks[1::-1]), one.flip(1))


def test_with_one_mask_per_control_a_list_is_several_controls():
    masks = [Image.fromarray(noise(HEIGHT, WIDTH, seed=seed)) for seed in range(3)]
    assert tensor("masks", 1, masks).shape == (3, 1, HEIGHT, WIDTH)
    assert torch.equal(tensor("masks", 1, masks[1]), tensor("masks", 1, masks)[1:2])


def test_class_ids_are_one_hot_and_unlabelled_pixels_are_zero():
    ids = noise(HEIGHT, WIDTH, below=3)
    ids[0, :2] = 255
    result = tensor("classes", 3, Image.fromarray(ids))
    assert result.shape == (1, 3, HEIGHT, WIDTH)
    assert set(result.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(result[0].sum(0), torch.from_numpy(ids != 255).float())
    labelled = ids != 255
    assert np.array_equal(result[0].argmax(0).numpy()[labelled], ids[labelled])


def test_tensors_are_used_unchanged():
    batch = torch.rand(2, 5, HEIGHT, WIDTH, dtype=torch.float64)
    assert torch.equal(tensor("classes", 5, batch), batch.float())
    assert torch.equal(tensor("classes", 5, batch[0]), batch[:1].float())


def with_palette(ids: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette([7, 250, 90] * 256)
    return image


def deep(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint16) * 257)


# Images that users draw, save or scan: a pipeline must read them in the same way as training does.
IMAGES = {
    "grey": Image.fromarray(noise(HEIGHT, WIDTH)),
    "black and white": Image.fromarray(noise(HEIGHT, WIDTH, below=2).astype(bool)),
    "palette": with_palette(noise(HEIGHT, WIDTH, below=4)),
    "transparent": Image.fromarray(noise(HEIGHT, WIDTH, 4)),
    "grey with transparency": Image.fromarray(noise(HEIGHT, WIDTH, 2)),
    "16-bit grey": deep(noise(HEIGHT, WIDTH)),
    "float": Image.fromarray(noise(HEIGHT, WIDTH).astype(np.float32) / 255),
    "print colours": Image.fromarray(noise(HEIGHT, WIDTH, 4)[..., :3]).convert("CMYK"),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("kind", ["image", "masks"])
def test_images_of_every_mode_are_read_as_in_training(name: str, kind: str):
    columns = "control" if kind == "image" else ["control"]
    trained = control_of(columns, 0)
    expected = trained.tensor(trained.load({"control": IMAGES[name]}, (WIDTH, HEIGHT)))
    assert torch.equal(tensor(kind, trained.channels, IMAGES[name])[0], expected)


@pytest.mark.parametrize("name", ["black and white", "palette", "16-bit ids"])
def test_class_ids_of_every_mode_are_read_as_in_training(name: str):
    ids = {**IMAGES, "16-bit ids": Image.fromarray(noise(HEIGHT, WIDTH, below=4).astype(np.uint16))}[name]
    trained = control_of("control", 4)
    expected = trained.tensor(trained.load({"control": ids}, (WIDTH, HEIGHT)))
    assert torch.equal(tensor("classes", 4, ids)[0], expected)
    assert expected.sum() == HEIGHT * WIDTH


GREY = Image.new("L", (WIDTH, HEIGHT))


@pytest.mark.parametrize(
    ("kind", "channels", "control", "message"),
    [
        ("image", 3, Image.new("RGB", (HEIGHT, WIDTH)), r"3 channels of 4×6 .* but has shape \(3, 6, 4\); resize it"),
        ("masks", 2, [GREY], "must have 2 images for each control, but has 1"),
        ("masks", 2, [[GREY] * 3], "must have 2 images for each control, but has 3"),
        (
            "masks",
            2,
            [GREY, Image.new("L", (2, 2))],
            r"must be of one size, but are \[\(2, 2\), \(6, 4\)\] .width, height",
        ),
        ("masks", 2, [GREY, [GREY, GREY]], "mixes images and lists of images"),
        ("classes", 3, Image.new("L", (WIDTH, HEIGHT), 3), "has class id 3; the model's ids are 0 to 2"),
        ("classes", 3, Image.new("RGB", (WIDTH, HEIGHT)), r"has colours \(mode RGB\), not one class id per pixel"),
        ("image", 3, torch.zeros(2, 2, HEIGHT, WIDTH), r"must have 3 channels of 4×6 .* but has shape \(2, 4, 6\)"),
        ("image", 3, torch.full((3, HEIGHT, WIDTH), 255.0), r"must lie in \[0, 1\], but lies in \[255, 255\]"),
        ("image", 3, torch.full((3, HEIGHT, WIDTH), -0.5), r"must lie in \[0, 1\]"),
        ("image", 3, torch.full((3, HEIGHT, WIDTH), torch.nan), r"must lie in \[0, 1\], but lies in \[nan, nan\]"),
        ("image", 3, [], r"must be an image, a list of images or a tensor, but is \[\]"),
        ("image", 3, "edges.png", "must be an image, a list of images or a tensor, but is 'edges.png'"),
        ("image", 3, None, "must be an image, a list of images or a tensor, but is None"),
    ],
)
def test_errors_quote_invalid_values(kind: str, channels: int, control: object, message: str):
    with pytest.raises(ValueError, match=message):
        tensor(kind, channels, control)


def test_shares_of_the_steps():
    timesteps = torch.tensor([900.0, 600.0, 300.0, 0.0])
    assert [step_share(timesteps, t) for t in timesteps] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    # Heun's method lists every step but the first twice; the U-Net gets a timestep as 0-dimensional tensor or number.
    twice = torch.tensor([900.0, 600.0, 600.0, 300.0, 300.0, 0.0, 0.0])
    assert [step_share(twice, float(t)) for t in timesteps] == [step_share(timesteps, t) for t in timesteps]


def test_one_value_is_for_all_nets_and_a_list_has_one_for_each():
    assert per_net("scale", 0.5, 3) == [0.5, 0.5, 0.5]
    assert per_net("scale", (1, 2), 2) == [1, 2]
    with pytest.raises(ValueError, match="`scale` has 2 entries for 3 ControlNets"):
        per_net("scale", [1, 2], 3)

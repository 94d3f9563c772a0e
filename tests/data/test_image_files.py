"""Image files of every kind are read right: embedded colour profiles, orientation, and pixels that are not finite."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_scripts.duplicates.prints import verified_print
from pipelines.autoencoder import AutoencoderPipeline
from pipelines.common.control_images import control_tensor
from pipelines.common.pixels import blended, straight, to_rgb
from pipelines.image_caption import fitted
from pipelines.layout_analysis import LayoutAnalysisPipeline
from pipelines.models.layout_encoder import LayoutEncoderModel
from pipelines.tools.cli import UserError
from pipelines.tools.control_files import open_controls
from pipelines.tools.files import read_image
from tests.support.color_profiles import (
    colorful,
    grey_profile,
    ink_profile,
    p3_profile,
    p3_to_srgb,
    srgb_profile,
    srgb_value,
)
from tests.support.tiny_models import tiny_vae
from training.core.draws import SampleKey
from training.data.checks import require_clean
from training.data.companions import ClassControl, ControlImage, SegmentationMask
from training.data.images import DataConfig, ImageDataset, load_split
from training.data.transforms import load_rgb, to_tensor, verify_image
from training.metrics.images import to_pil


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def turned_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def deviation(image: Image.Image, expected: np.ndarray) -> float:
    assert image.mode == "RGB"
    return float(np.abs(np.asarray(image) - expected).max())


# --- colour profiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_a_photo_in_display_p3_is_converted_to_srgb(kind: str):
    image = colorful()
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    read = load_rgb(encoded(image, kind, icc_profile=p3_profile(), **options))
    expected = p3_to_srgb(np.asarray(image))
    assert np.abs(np.asarray(image) - expected).max() > 50, "without a conversion, the colours are far off"
    assert deviation(read, expected) <= (8 if kind == "JPEG" else 1.5)


def test_a_conversion_happens_only_once():
    once = load_rgb(encoded(colorful(), icc_profile=p3_profile()))
    assert to_rgb(once).tobytes() == once.tobytes()
    assert load_rgb(encoded(once, icc_profile=once.info.get("icc_profile"))).tobytes() == once.tobytes()


def test_images_in_srgb_keep_their_bytes():
    image = colorful()
    assert load_rgb(encoded(image, icc_profile=srgb_profile())).tobytes() == image.tobytes()
    plain = Image.open(io.BytesIO(encoded(image)["bytes"]))
    assert load_rgb(plain) is plain, "without a profile, the image is not even copied"


def test_palettes_and_transparent_images_have_profiles_too():
    image = colorful()
    expected = p3_to_srgb(np.asarray(image))
    assert deviation(load_rgb(encoded(image.quantize(64), icc_profile=p3_profile())), expected) <= 1.5
    alpha = np.linspace(0, 255, image.width * image.height).reshape(image.height, image.width).astype(np.uint8)
    layers = image.copy()
    layers.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    read = load_rgb(encoded(layers, icc_profile=p3_profile()))
    assert deviation(read, share * expected + (1 - share) * 255) <= 2.5


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "F"])
def test_grey_profiles_are_applied(mode: str):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = {
        "L": Image.fromarray(values),
        "LA": Image.merge("LA", (Image.fromarray(values), Image.new("L", (16, 16), 255))),
        "I;16": Image.fromarray(values.astype(np.uint16) * 257),
        "F": Image.fromarray(values.astype(np.float32) / 255),
    }[mode]
    assert image.mode == mode
    expected = 255 * srgb_value((values / 255.0) ** 1.5)[..., None].repeat(3, -1)
    read = load_rgb(encoded(image, "TIFF", icc_profile=grey_profile(1.5)))
    assert np.abs(expected[..., 0] - values).max() > 30
    assert deviation(read, expected) <= 2.5


def test_cmyk_profiles_are_applied():
    inks = np.zeros((4, 64, 4), np.uint8)
    for channel in range(4):
        inks[channel, :, channel] = np.arange(64) * 4
    read = load_rgb(encoded(Image.fromarray(inks, "CMYK"), "TIFF", icc_profile=ink_profile()))
    lightness = 100 * (1 - inks.max(-1) / 255.0)
    luminance = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    assert deviation(read, 255 * srgb_value(luminance)[..., None].repeat(3, -1)) <= 2


@pytest.mark.parametrize(
    "profile",
    [b"", b"no profile", p3_profile()[:200], grey_profile(1.5), ink_profile(), b"\0" * 4000],
    ids=["empty", "text", "cut off", "of grey images", "of CMYK images", "zeros"],
)
def test_an_unusable_profile_is_ignored(profile: bytes):
    image = colorful()
    image.info["icc_profile"] = profile
    assert load_rgb(image).tobytes() == image.tobytes()
    assert deviation(load_rgb(encoded(image, "TIFF", icc_profile=profile)), np.asarray(colorful())) == 0


def test_ids_of_masks_are_never_converted():
    ids = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6))
    source = encoded(ids, icc_profile=grey_profile(1.5))
    mask = SegmentationMask("mask", 255)
    assert mask.load({"mask": source}, (6, 4))[0].tobytes() == ids.tobytes()
    control = SimpleNamespace(control_kind="classes", conditioning_channels=255)
    opened = Image.open(io.BytesIO(source["bytes"]))
    assert control_tensor(control, opened, 4, 6).argmax(1)[0].tolist() == np.asarray(ids).tolist()


# --- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_measured_size_is_that_of_the_turned_image(kind: str, orientation: int):
    """Pillow turns a TIFF itself when it is decoded, so that its tag may not be counted again."""
    source = encoded(colorful(80, 48), kind, exif=turned_exif(orientation))
    size = (48, 80) if orientation > 4 else (80, 48)
    assert load_rgb(source).size == size
    assert verify_image(source) == size
    assert verified_print(source)[0] == size


@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_is_ignored(exif: bytes):
    source = encoded(colorful(80, 48), "JPEG", exif=exif)
    assert load_rgb(source).size == verify_image(source) == (80, 48)


def odd_images() -> dict[str, Image.Image]:
    """Return opened files that are not plain RGB, whose upright size is 24 × 16."""
    image = colorful()
    sideways = image.transpose(Image.Transpose.ROTATE_90)
    clear = sideways.copy()
    clear.putalpha(128)
    grey = image.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    sources = {
        "turned": encoded(sideways, exif=turned_exif(6)),
        "turned TIFF": encoded(sideways, "TIFF", exif=turned_exif(6)),
        "P3": encoded(image, icc_profile=p3_profile()),
        "turned, P3, transparent": encoded(clear, exif=turned_exif(6), icc_profile=p3_profile()),
        "palette": encoded(image.quantize(16), transparency=3, icc_profile=p3_profile()),
        "grey": encoded(grey, icc_profile=grey_profile(1.5)),
        "16-bit": encoded(deep),
        "CMYK": encoded(image.convert("CMYK"), "TIFF", icc_profile=ink_profile()),
    }
    return {name: Image.open(io.BytesIO(source["bytes"])) for name, source in sources.items()}


@pytest.mark.parametrize("name", list(odd_images()))
def test_pipelines_read_images_as_training_does(name: str):
    image = odd_images()[name]
    trained = load_rgb(odd_images()[name])
    assert trained.size == (24, 16)
    assert torch.allclose(AutoencoderPipeline(tiny_vae())._pixels(image)[0], to_tensor(trained), atol=1e-6)
    assert torch.equal(fitted(image, 16, "crop"), to_tensor(trained.crop((4, 0, 20, 16))))
    reader = LayoutAnalysisPipeline(LayoutEncoderModel(block_out_channels=(8, 16), patch_size=2, sample_size=32))
    assert reader.check_inputs(image, None)[0].tobytes() == trained.tobytes()
    for mode, kind, channels in (("rgb", "image", 3), ("l", "masks", 1)):
        companion = ControlImage(["control"], mode)  # type: ignore[arg-type]
        expected = companion.tensor(companion.load({"control": odd_images()[name]}, (24, 16)))
        config = SimpleNamespace(control_kind=kind, conditioning_channels=channels)
        assert torch.equal(control_tensor(config, image, 16, 24)[0], expected)


def test_maps_of_ids_are_turned_in_training_and_sampling(tmp_path: Path):
    ids = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    file = tmp_path / "ids.png"
    ids.save(file, exif=turned_exif(6))
    companion = ClassControl("control", 6)
    expected = companion.tensor(companion.load({"control": str(file)}, (2, 3)))
    assert expected.argmax(0).tolist() == [[3, 0], [4, 1], [5, 2]]
    config = SimpleNamespace(control_kind="classes", conditioning_channels=6)
    assert torch.equal(control_tensor(config, Image.open(file), 3, 2)[0], expected)
    (opened,) = open_controls([str(file)])
    assert torch.equal(control_tensor(config, opened.image, 3, 2)[0], expected)


# --- pixels that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_an_error_that_names_the_row(tmp_path: Path, value: float):
    for row in range(4):
        pixels = np.full((16, 16), 0.25, np.float32)
        if row == 2:
            pixels[3, 4:6] = value
        Image.fromarray(pixels).save(tmp_path / f"{row}.tif")
    config = DataConfig(train_data_dir=str(tmp_path), validation_fraction=0, resolution=16)
    data = ImageDataset(load_split(config, "train", 0), config, captions=False)
    assert data[SampleKey(1, 0)]["pixel_values"].unique().tolist() == pytest.approx([64 * 2 / 255 - 1])
    with pytest.raises(UserError, match=r"row 2 .*2\.tif.*2 of its 256 pixels are not finite"):
        data[SampleKey(2, 0)]
    with pytest.raises(UserError, match=r"row 2 .*2\.tif.*2 of its 256 pixels are not finite"):
        require_clean(data)
    with pytest.raises(UserError, match=r"2\.tif cannot be read as an image \(2 of its 256 pixels"):
        read_image(tmp_path / "2.tif")


# --- grey and transparent images -------------------------------------------------------------------------------------


def soft_disc(side: int = 16) -> Image.Image:
    """An image whose alpha takes all kinds of values, with noise below."""
    random = np.random.default_rng(1)
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    alpha = np.clip(255 * (1.4 - np.hypot(x - side / 2, y - side / 2) / (side / 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
    image.putalpha(Image.fromarray(alpha))
    return image


def items(folder: Path, mode: str, **settings: Any) -> torch.Tensor:
    config = DataConfig(train_data_dir=str(folder), validation_fraction=0, image_mode=mode, **settings)  # type: ignore[arg-type]
    data = ImageDataset(load_split(config, "train", 0), config, captions=False)
    first = data[SampleKey(0, 0)]["pixel_values"]
    assert torch.equal(data[SampleKey(0, 0)]["pixel_values"], first), "from memory as from the file"
    return first


def test_the_modes_of_images_in_training(tmp_path: Path):
    image = soft_disc()
    image.save(tmp_path / "a.png", icc_profile=p3_profile())
    white = items(tmp_path, "rgb", resolution=16)
    clear = items(tmp_path, "rgba", resolution=16)
    grey = items(tmp_path, "l", resolution=16)
    assert [len(one) for one in (white, clear, grey)] == [3, 4, 1]
    assert torch.equal(clear[:3], white), "the colours are blended with white"
    alpha = np.asarray(image.getchannel("A"))
    assert np.array_equal(((clear[3].double() + 1) * 127.5).round().numpy(), alpha)
    assert (clear[:3, torch.from_numpy(alpha == 0)] == 1).all()
    weights = torch.tensor([0.299, 0.587, 0.114])
    assert (grey[0] - (white * weights[:, None, None]).sum(0)).abs().max() <= 1.01 * 2 / 255


@pytest.mark.parametrize("settings", [{"resolution": 8}, {"resolution": 8, "center_crop": False}, {"crop_scale": 0.5}])
def test_scaling_is_of_what_can_be_seen(tmp_path: Path, settings: dict):
    """The noise below transparent pixels does not enter those beside them.

    The colours may differ a little where the filter rings, because Pillow clips it with and without alpha elsewhere.
    """
    soft_disc(32).save(tmp_path / "a.png")
    settings = {"resolution": 16, **settings}
    white, clear = items(tmp_path, "rgb", **settings), items(tmp_path, "rgba", **settings)
    difference = (clear[:3] - white).abs()
    assert difference.max() < 0.2
    assert difference.mean() < 0.01
    assert (clear[:3, clear[3] == -1] == 1).all()


def test_straight_alpha_is_the_inverse_of_blending():
    pixels = torch.rand(2, 4, 5, 6, dtype=torch.float64) * 2 - 1
    pixels[:, 3].clamp_(min=-0.9)
    assert torch.allclose(straight(blended(pixels)), pixels)
    opacity = (pixels[:, 3:] + 1) / 2
    assert torch.allclose((blended(pixels)[:, :3] + 1) / 2, opacity * (pixels[:, :3] + 1) / 2 + 1 - opacity)
    pixels[:, 3] = -1
    assert (straight(pixels)[:, :3] == 1).all(), "what is fully transparent is white"
    colors = pixels[:, :3]
    assert straight(colors) is colors


def test_an_image_of_any_mode_comes_back_from_its_tensor():
    for image in (soft_disc(), soft_disc().convert("RGB"), soft_disc().convert("L")):
        back = to_pil(to_tensor(image))
        assert back.mode == image.mode
        error = np.abs(np.asarray(to_rgb(back), dtype=int) - np.asarray(to_rgb(image), dtype=int))
        assert error.max() <= 1
        assert back.getchannel(back.getbands()[-1]).tobytes() == image.getchannel(image.getbands()[-1]).tobytes()

"""AutoencoderPipeline: pictures in and out at their own size, latents in scaled units."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.autoencoder import AutoencoderPipeline
from pipelines.latents import encode_latents
from pipelines.loading import load_pipeline
from tests.tiny_models import tiny_vae


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("patch_size", [None, 2])
def test_pictures_keep_their_size_and_order(patch_size):
    pipeline = AutoencoderPipeline(tiny_vae(patch_size))
    images = [picture(seed=0), picture(seed=1)]
    reconstructed = pipeline.reconstruct(images)
    assert [image.size for image in reconstructed] == [(24, 16), (24, 16)]
    alone = pipeline.reconstruct(images[1])[0]
    assert np.abs(np.asarray(alone, int) - np.asarray(reconstructed[1], int)).max() <= 1


def test_latents_are_in_scaled_units_and_decode_inverts():
    vae = tiny_vae()
    pipeline = AutoencoderPipeline(vae)
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = encode_latents(vae, pixels)
    assert torch.allclose(pipeline.encode(picture()), expected, atol=1e-5)
    assert torch.equal(pipeline(picture(), output_type="latent").images, pipeline.encode(picture()))
    decoded = pipeline.decode(pipeline.encode(picture()), output_type="np")
    assert np.array_equal(decoded, pipeline(picture(), output_type="np").images)


def test_a_generator_draws_from_the_posterior():
    pipeline = AutoencoderPipeline(tiny_vae())
    first, second = (pipeline.encode(picture(), torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(first, pipeline.encode(picture(), torch.Generator().manual_seed(0)))


def test_arrays_and_tensors_are_taken_as_the_same_picture():
    pipeline = AutoencoderPipeline(tiny_vae())
    array = np.asarray(picture(), dtype=np.float32)[None] / 255
    expected = pipeline.encode(picture())
    assert torch.allclose(pipeline.encode(array), expected, atol=1e-5)
    assert torch.allclose(pipeline.encode(torch.from_numpy(array).permute(0, 3, 1, 2)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (picture(25, 16), "`width` must be a multiple of 2 .* but is 25; try 2[46]"),
        ([picture(24, 16), picture(16, 16)], r"must be of one size, but are \[\(16, 16\), \(24, 16\)\]"),
    ],
)
def test_bad_input_is_quoted(images, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderPipeline(tiny_vae())(images)


def test_saved_and_loaded(tmp_path):
    pipeline = AutoencoderPipeline(tiny_vae(patch_size=4))
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert type(loaded) is AutoencoderPipeline
    assert type(loaded.vae) is type(pipeline.vae)
    images = [p(picture(), output_type="np").images for p in (pipeline, loaded)]
    assert np.allclose(*images, atol=1e-5)
    assert sorted(p.name.rsplit("_", 1)[0] for p in tmp_path.glob("*.py")) == ["autoencoder", "latents", "standalone"]

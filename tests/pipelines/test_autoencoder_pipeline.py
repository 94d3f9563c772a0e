"""AutoencoderPipeline: pictures in and out at their own size, latents in scaled units."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.autoencoder import AutoencoderPipeline
from pipelines.common.class_colors import COLOR_BLIND_SAFE, UNLABELLED, UNLABELLED_COLOR, class_color, class_ids_to_pil
from pipelines.common.latents import encode_latents
from pipelines.models.multi_head_autoencoder import MultiHeadAutoencoderKL
from pipelines.tools.loading import load_pipeline
from tests.support.tiny_models import TWO_LEVELS, tiny_vae


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
    shipped = sorted(p.name.rsplit("_", 1)[0] for p in tmp_path.glob("*.py"))
    assert shipped == ["autoencoder", "checks", "class_colors", "latents", "standalone"]


LABELS = {0: "swiss", 1: "pop", 2: "brutalist"}


def vae_with_heads() -> MultiHeadAutoencoderKL:
    torch.manual_seed(5)
    heads = {"num_mask_classes": 4, "num_classes": len(LABELS), "id2label": LABELS}
    return MultiHeadAutoencoderKL(**TWO_LEVELS, patch_size=2, force_upcast=False, **heads).eval()


def test_masks_are_class_ids_in_every_form():
    pipeline = AutoencoderPipeline(vae_with_heads())
    images = [picture(seed=0), picture(seed=1)]
    shares = pipeline.segment(images, output_type="pt")
    ids = pipeline.segment(images, output_type="np")
    assert shares.shape == (2, 4, 16, 24)
    assert torch.allclose(shares.sum(1), torch.ones(2, 16, 24))
    assert ids.dtype == np.uint8
    assert np.array_equal(ids, shares.argmax(1).numpy())
    assert len(np.unique(ids)) > 1, "one class everywhere: this would show nothing"
    masks = pipeline.segment(images)
    for mask, expected in zip(masks, ids, strict=True):
        assert np.array_equal(np.asarray(mask), expected)
        shown = np.asarray(mask.convert("RGB"))
        assert all((shown[expected == id_] == class_color(id_)).all() for id_ in np.unique(expected))


def test_a_picture_is_read_as_its_latents_are():
    pipeline = AutoencoderPipeline(vae_with_heads())
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
        logits = pipeline.vae.classify(pipeline.vae.encode(pixels).latent_dist.mean)
    (read,) = pipeline.classify(picture())
    expected = {LABELS[i]: share for i, share in enumerate(logits[0].softmax(0).tolist())}
    assert read == pytest.approx(expected, abs=1e-5)
    assert list(read.values()) == sorted(read.values(), reverse=True)


def test_heads_travel_with_a_saved_pipeline_and_its_code(tmp_path):
    from diffusers import DiffusionPipeline

    pipeline = AutoencoderPipeline(vae_with_heads())
    pipeline.save_pretrained(tmp_path)
    remote = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(remote).__module__.startswith("diffusers_modules")
    assert remote.vae.config.id2label == {str(id_): name for id_, name in LABELS.items()}
    for loaded in (load_pipeline(tmp_path), remote):
        assert np.array_equal(loaded.segment(picture(), "np"), pipeline.segment(picture(), "np"))
        assert loaded.classify(picture())[0] == pytest.approx(pipeline.classify(picture())[0])


@pytest.mark.parametrize("ask", ["segment", "classify"])
@pytest.mark.parametrize("vae", [tiny_vae(), tiny_vae(patch_size=2)], ids=["stock", "own"])
def test_a_vae_without_heads_says_so(vae, ask):
    with pytest.raises(ValueError, match="`vae` has no (segmentation|classification) head"):
        getattr(AutoencoderPipeline(vae), ask)(picture())


def test_class_colours_differ_and_stay():
    assert [class_color(id_) for id_ in range(8)] == list(COLOR_BLIND_SAFE)
    assert class_color(UNLABELLED) == UNLABELLED_COLOR
    assert len({class_color(id_) for id_ in range(64)}) == 64
    shown = class_ids_to_pil(np.array([[0, 3, 255]])).convert("RGB")
    assert [shown.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (0, 158, 115), UNLABELLED_COLOR]

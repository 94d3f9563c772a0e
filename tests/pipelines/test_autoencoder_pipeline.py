"""AutoencoderPipeline: image sizes, scaled latents, heads, saving and invalid input."""

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


def random_image(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("patch_size", [None, 2])
def test_images_keep_their_size_and_order(patch_size):
    pipeline = AutoencoderPipeline(tiny_vae(patch_size))
    images = [random_image(seed=0), random_image(seed=1)]
    reconstructed = pipeline.reconstruct(images)
    assert [image.size for image in reconstructed] == [(24, 16), (24, 16)]
    alone = pipeline.reconstruct(images[1])[0]
    assert np.abs(np.asarray(alone, int) - np.asarray(reconstructed[1], int)).max() <= 1


def test_latents_are_scaled_and_decode_inverts_encode():
    vae = tiny_vae()
    pipeline = AutoencoderPipeline(vae)
    pixels = torch.from_numpy(np.array(random_image())).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = encode_latents(vae, pixels)
    assert torch.allclose(pipeline.encode(random_image()), expected, atol=1e-5)
    assert torch.equal(pipeline(random_image(), output_type="latent").images, pipeline.encode(random_image()))
    decoded = pipeline.decode(pipeline.encode(random_image()), output_type="np")
    assert np.array_equal(decoded, pipeline(random_image(), output_type="np").images)


def test_a_generator_draws_from_the_posterior():
    pipeline = AutoencoderPipeline(tiny_vae())
    first, second = (pipeline.encode(random_image(), torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(first, pipeline.encode(random_image(), torch.Generator().manual_seed(0)))


def test_arrays_and_tensors_are_encoded_like_the_same_pil_image():
    pipeline = AutoencoderPipeline(tiny_vae())
    array = np.asarray(random_image(), dtype=np.float32)[None] / 255
    expected = pipeline.encode(random_image())
    assert torch.allclose(pipeline.encode(array), expected, atol=1e-5)
    assert torch.allclose(pipeline.encode(torch.from_numpy(array).permute(0, 3, 1, 2)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (random_image(25, 16), "`width` must be a multiple of 2 .* but is 25; try 2[46]"),
        (
            [random_image(24, 16), random_image(16, 16)],
            r"the same size, but have \[\(16, 16\), \(24, 16\)\]",
        ),
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
    images = [p(random_image(), output_type="np").images for p in (pipeline, loaded)]
    assert np.allclose(*images, atol=1e-5)
    shipped = sorted(p.name.rsplit("_", 1)[0] for p in tmp_path.glob("*.py"))
    assert shipped == [
        "autoencoder", "checks", "class_colors", "compatibility", "latents", "pixels", "sampling", "standalone"
    ]  # fmt: skip


LABELS = {0: "swiss", 1: "pop", 2: "brutalist"}


def vae_with_heads() -> MultiHeadAutoencoderKL:
    torch.manual_seed(5)
    heads = {"num_mask_classes": 4, "num_classes": len(LABELS), "id2label": LABELS}
    return MultiHeadAutoencoderKL(**TWO_LEVELS, patch_size=2, force_upcast=False, **heads).eval()


def test_masks_are_class_ids_in_every_form():
    pipeline = AutoencoderPipeline(vae_with_heads())
    images = [random_image(seed=0), random_image(seed=1)]
    shares = pipeline.segment(images, output_type="pt")
    ids = pipeline.segment(images, output_type="np")
    assert shares.shape == (2, 4, 16, 24)
    assert torch.allclose(shares.sum(1), torch.ones(2, 16, 24))
    assert ids.dtype == np.uint8
    assert np.array_equal(ids, shares.argmax(1).numpy())
    assert len(np.unique(ids)) > 1, "the test is meaningless if all pixels have one class"
    masks = pipeline.segment(images)
    for mask, expected in zip(masks, ids, strict=True):
        assert np.array_equal(np.asarray(mask), expected)
        shown = np.asarray(mask.convert("RGB"))
        assert all((shown[expected == id_] == class_color(id_)).all() for id_ in np.unique(expected))


def test_classify_uses_the_mean_of_the_posterior():
    pipeline = AutoencoderPipeline(vae_with_heads())
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(random_image())).permute(2, 0, 1)[None] / 127.5 - 1
        logits = pipeline.vae.classify(pipeline.vae.encode(pixels).latent_dist.mean)
    (predicted,) = pipeline.classify(random_image())
    expected = {LABELS[i]: share for i, share in enumerate(logits[0].softmax(0).tolist())}
    assert predicted == pytest.approx(expected, abs=1e-5)
    assert list(predicted.values()) == sorted(predicted.values(), reverse=True)


def test_heads_are_saved_with_the_pipeline_and_its_code(tmp_path):
    from diffusers import DiffusionPipeline

    pipeline = AutoencoderPipeline(vae_with_heads())
    pipeline.save_pretrained(tmp_path)
    remote = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(remote).__module__.startswith("diffusers_modules")
    assert remote.vae.config.id2label == {str(id_): name for id_, name in LABELS.items()}
    for loaded in (load_pipeline(tmp_path), remote):
        assert np.array_equal(loaded.segment(random_image(), "np"), pipeline.segment(random_image(), "np"))
        assert loaded.classify(random_image())[0] == pytest.approx(pipeline.classify(random_image())[0])


@pytest.mark.parametrize("method", ["segment", "classify"])
@pytest.mark.parametrize("vae", [tiny_vae(), tiny_vae(patch_size=2)], ids=["stock", "own"])
def test_a_vae_without_heads_raises(vae, method):
    with pytest.raises(ValueError, match="`vae` has no (segmentation|classification) head"):
        getattr(AutoencoderPipeline(vae), method)(random_image())


def test_class_colours_are_distinct_and_fixed():
    assert [class_color(id_) for id_ in range(8)] == list(COLOR_BLIND_SAFE)
    assert class_color(UNLABELLED) == UNLABELLED_COLOR
    assert len({class_color(id_) for id_ in range(64)}) == 64
    shown = class_ids_to_pil(np.array([[0, 3, 255]])).convert("RGB")
    assert [shown.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (0, 158, 115), UNLABELLED_COLOR]

"""The settings for a collection and a device."""

from __future__ import annotations

import pytest

from training.core.checks import SMALLEST_MAP
from training.data.aspect_buckets import BucketRule
from training.models.autoencoder import AutoencoderModelConfig
from training.models.unet import UNetConfig
from training.recipes.collection import Collection
from training.recipes.settings import CONV_LAYERS, autoencoder_levels, kept, latent_cells, settings_for

STAGES = ("autoencoder", "latent_diffusion", "controlnet", "image_caption")
FEW, MANY = Collection("few", images=20, held_out=1, caption_words=8), Collection("many", images=200_000, held_out=50)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
@pytest.mark.parametrize("collection", [FEW, MANY], ids=lambda collection: collection.source)
def test_batches_fit_the_collection_and_runs_are_neither_hopelessly_short_nor_endless(stage, device, collection):
    found = settings_for(stage, collection, device=device, resolution=64, cells=8)
    assert 1 <= found["train_batch_size"] <= collection.images
    assert 4_000 <= found["max_train_steps"] <= 60_000
    assert found["max_train_steps"] % 100 == 0


def test_processes_divide_a_small_collection_among_themselves():
    found = settings_for("latent_diffusion", FEW, device="cuda", resolution=64, cells=8, num_processes=8)
    assert found["train_batch_size"] * 8 <= FEW.images
    single = Collection("single", images=1, held_out=0)
    assert (
        settings_for("latent_diffusion", single, device="cpu", resolution=64, num_processes=4)["train_batch_size"] == 1
    )


@pytest.mark.parametrize(("resolution", "cells"), [(16, 4), (32, 4), (64, 8), (128, 16), (256, 16), (512, 16)])
def test_latents_have_at_most_16_cells_and_the_networks_fit_them(resolution, cells):
    assert latent_cells(resolution) == cells
    chosen = settings_for("autoencoder", MANY, device="cpu", resolution=resolution)
    assert len(chosen["model.block_out_channels"]) == autoencoder_levels(resolution)
    model = AutoencoderModelConfig(block_out_channels=chosen["model.block_out_channels"])
    model.validate()
    model.check_resolution(resolution)
    unet = settings_for("latent_diffusion", MANY, device="cpu", resolution=resolution, cells=cells)
    widths, attention = unet["model.block_out_channels"], unet["model.attention_levels"]
    UNetConfig(block_out_channels=widths, attention_levels=attention).validate()
    assert cells % 2 ** (len(widths) - 1) == 0
    assert cells / 2 ** (len(widths) - 1) >= 4  # the smallest feature map that the U-Net takes
    assert cells / 2 ** min(attention) <= 16
    shapes = settings_for("latent_diffusion", MANY, device="cpu", resolution=resolution, cells=cells, rectangles=True)
    levels = len(shapes["model.block_out_channels"])
    if cells > SMALLEST_MAP:  # otherwise only squares are large enough for a U-Net
        BucketRule(resolution, resolution // cells * 2 ** (levels - 1)).require_rectangles()


def test_attention_follows_the_levels_that_are_given():
    found = settings_for("latent_diffusion", FEW, device="cpu", resolution=64, cells=8, widths=[32])
    assert found["model.attention_levels"] == [0]
    found = settings_for("latent_diffusion", FEW, device="cpu", resolution=64, cells=8, widths=[32, 64, 96])
    assert found["model.attention_levels"] == [1, 2]


@pytest.mark.parametrize(("words", "length"), [(1, 16), (8, 16), (14, 24), (30, 48), (60, 77), (500, 77)])
def test_captions_get_room_for_their_pieces(words, length):
    collection = Collection("x", images=100, held_out=0, caption_words=words)
    found = settings_for("latent_diffusion", collection, device="cpu", resolution=64, cells=8)
    assert found["text_encoder.max_length"] == length


def test_what_is_given_is_kept():
    chosen = {"learning_rate": 1e-3, "max_train_steps": 4000, "train_batch_size": 16}
    assert kept(chosen, frozenset({"learning_rate"})) == {"max_train_steps": 4000, "train_batch_size": 16}
    assert "max_train_steps" not in kept(chosen, frozenset({"num_train_epochs"}))


def test_only_an_autoencoder_that_sees_its_images_often_varies_them():
    assert settings_for("autoencoder", FEW, device="cpu", resolution=64)["crop_scale"] == 0.5
    assert "crop_scale" not in settings_for("autoencoder", MANY, device="cpu", resolution=64)
    for stage in STAGES[1:]:  # the images of a generator are not mirrored and cut unasked
        assert not {"crop_scale", "random_flip"} & {*settings_for(stage, FEW, device="cpu", resolution=64, cells=8)}


def test_copies_are_searched_for_in_the_middle_and_at_the_end_where_images_are_few():
    few = Collection("few", images=190, held_out=10)
    found = settings_for("latent_diffusion", few, device="cpu", resolution=64, cells=8)
    epochs = found["max_train_steps"] // (190 // found["train_batch_size"])
    assert found["memorization_epochs"] == epochs // 2 + 1  # and at the end, as every run that searches at all
    assert settings_for("latent_diffusion", FEW, device="cuda", resolution=64, cells=8)["memorization_epochs"] >= 1
    assert "memorization_epochs" not in settings_for("latent_diffusion", MANY, device="cpu", resolution=64, cells=8)


@pytest.mark.parametrize("resolution", [16, 32, 64, 96, 100, 128, 256])
def test_a_transformer_has_few_patches_that_divide_the_image(resolution):
    size = settings_for(
        "latent_diffusion", MANY, device="cpu", resolution=resolution, cells=resolution, transformer=True
    )["transformer.patch_size"]
    assert resolution % size == 0
    assert 4 <= resolution // size <= 10


def test_a_transformer_ends_with_convolutions_where_its_patches_have_an_even_side():
    def layers(resolution: int) -> int:
        found = settings_for(
            "latent_diffusion", MANY, device="cpu", resolution=resolution, cells=resolution, transformer=True
        )
        return found["transformer.conv_layers"]

    assert layers(64) == CONV_LAYERS > 0
    assert layers(9) == 0  # patches of one pixel


def test_a_transformer_has_bfloat16_on_a_cpu_that_is_faster_with_it():
    def precision(device: str, **options: bool) -> str | None:
        found = settings_for("latent_diffusion", MANY, device=device, resolution=64, cells=64, **options)
        return found.get("mixed_precision")

    assert precision("cpu", transformer=True, fast_bf16=True) == "bf16"
    assert precision("cpu", transformer=True) is None
    assert precision("cpu", fast_bf16=True) is None
    assert precision("cuda", transformer=True, fast_bf16=True) is None

"""The patch autoencoder: round trips, shapes, equality with the stock class, tiling, gradient checkpointing, heads.

Shapes: B batch, H W pixels, h w latent cells, p patch side.
"""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from pipelines.common.latents import decode_latents, downsampling_factor, encode_latents, latent_shape
from pipelines.models.multi_head_autoencoder import MultiHeadAutoencoderKL

HEADS = {"num_mask_classes": 3, "num_classes": 4, "id2mask_class": {0: "page", 1: "text", 2: "picture"}}
TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 5,
    "mid_block_add_attention": False,
}


def tiny(**overrides) -> MultiHeadAutoencoderKL:
    torch.manual_seed(0)
    return MultiHeadAutoencoderKL(**{**TWO_LEVELS, "patch_size": 4, "sample_size": 32, **overrides}).eval()


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_shapes_and_downsampling_count_the_patch(patch_size):
    vae = tiny(patch_size=patch_size)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = encode_latents(vae, images)
    assert downsampling_factor(vae) == 2 * patch_size
    assert tuple(latents.shape[1:]) == latent_shape(vae, 32, 48) == (5, 32 // (2 * patch_size), 48 // (2 * patch_size))
    assert decode_latents(vae, latents).shape == images.shape


def test_config_keeps_image_channels_and_everything_round_trips(tmp_path):
    vae = tiny()
    assert (vae.config.in_channels, vae.config.out_channels, vae.config.patch_size) == (3, 3, 4)
    again = MultiHeadAutoencoderKL.from_config(vae.config)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in vae.named_parameters()}
    vae.save_pretrained(tmp_path)
    loaded = MultiHeadAutoencoderKL.from_pretrained(tmp_path)
    assert (loaded.config.in_channels, loaded.config.out_channels, loaded.config.patch_size) == (3, 3, 4)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(images).sample, vae(images).sample)


def test_a_patch_becomes_the_channels_of_its_own_cell():
    """The channels of the encoder's input at a cell are the pixels of one patch."""
    vae = tiny()
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 8:12, 4:8] = 1.0
    unshuffled = vae.encoder.conv_in[0](images)
    assert unshuffled.shape == (1, 48, 8, 8)
    assert unshuffled[0, :, 2, 1].eq(1).all()
    assert unshuffled.sum() == 48


def test_without_patches_it_is_the_stock_architecture_with_the_same_weights():
    vae = tiny(patch_size=1, latents_mean=[0.1] * 5, latents_std=[2.0] * 5)
    stock = vae.autoencoder()
    assert type(stock) is AutoencoderKL
    assert stock.config.latents_mean == [0.1] * 5
    assert stock.config.scaling_factor == 1.0
    assert not any(p.is_meta for p in stock.parameters())
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), vae.state_dict().values(), strict=True))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(stock(images).sample, vae(images).sample)


def test_the_stock_copy_loads_as_stock(tmp_path):
    vae = tiny(patch_size=1)
    vae.autoencoder().save_pretrained(tmp_path)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(AutoencoderKL.from_pretrained(tmp_path)(images).sample, vae(images).sample)


def test_with_patches_the_autoencoder_is_the_model_itself():
    vae = tiny()
    assert vae.autoencoder() is vae


def test_slicing_changes_nothing():
    vae = tiny()
    images = torch.rand(3, 3, 32, 32)
    whole = vae(images).sample
    vae.enable_slicing()
    assert torch.allclose(vae(images).sample, whole, atol=1e-5)


def test_tiling_keeps_shapes_and_stays_near_the_untiled_image():
    vae = tiny(sample_size=32)
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (32, 4)
    images = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), size=(96, 64), mode="bilinear") * 2 - 1
    whole = vae.encode(images).latent_dist.mean
    vae.enable_tiling()
    tiled = vae.encode(images).latent_dist.mean
    assert tiled.shape == whole.shape == (1, 5, 12, 8)
    assert not torch.equal(tiled, whole), "the image was not split into tiles: the sizes are wrong"
    # Away from the borders of tiles, only the statistics of group normalization differ.
    assert (tiled - whole).abs().mean() < whole.std()
    assert vae.decode(tiled).sample.shape == images.shape


def test_gradient_checkpointing_gives_the_same_gradients():
    images = torch.rand(2, 3, 32, 32)

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        vae = tiny().train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        vae(images).sample.square().mean().backward()
        return [p.grad for p in vae.parameters()]

    plain, checkpointed = gradients(False), gradients(True)
    assert all(g is not None for g in plain), "a parameter gets no gradient"
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_the_autoencoder_learns_to_reconstruct():
    vae = tiny(block_out_channels=(16, 16)).train()
    images = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4), size=(32, 32)) * 2 - 1
    optimizer = torch.optim.AdamW(vae.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = (vae(images).sample - images).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_a_patch_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="`patch_size` must be at least 1, but is 0"):
        tiny(patch_size=0)


# --- heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"patch_size": 1}, {"patch_size": 4}, {"patch_size": 2, "linear_shortcut": True}])
def test_heads_predict_every_pixel_and_image_and_change_no_reconstruction(options):
    vae = tiny(**options, **HEADS)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    z = vae.encode(images).latent_dist.mean
    decoded = vae.decode_with_masks(z)
    assert torch.equal(decoded.sample, vae.decode(z).sample)
    assert decoded.mask_logits.shape == (2, 3, 32, 48)
    assert torch.equal(decoded.mask_logits, vae.segment(z))
    assert vae.classify(z).shape == (2, 4)
    assert torch.allclose(vae.classify(z)[1], vae.classify(z[1:])[0], atol=1e-6), (
        "the class of an image depends on another image"
    )


def test_mask_logits_of_a_cell_become_the_pixels_of_its_patch():
    """Pixel (y, x) of the patch of a class is channel y p + x of this class in the cell."""
    head = tiny(**HEADS).segmentation_head
    cells = torch.arange(3 * 16.0).reshape(1, 48, 1, 1).expand(1, 48, 2, 2)
    mask = head[-1](cells)
    assert mask.shape == (1, 3, 8, 8)
    assert [mask[0, 2, 0, 0], mask[0, 2, 1, 0], mask[0, 2, 4, 7]] == [32, 36, 35]


@pytest.mark.parametrize("options", [{"patch_size": 1}, {"patch_size": 4}, {"patch_size": 2, "linear_shortcut": True}])
def test_without_heads_the_same_weights_give_the_same_images(tmp_path, options):
    vae = tiny(**options, **HEADS, latents_mean=[0.1] * 5, latents_std=[2.0] * 5)
    bare = vae.autoencoder()
    assert (type(bare) is AutoencoderKL) == (options == {"patch_size": 1})
    assert bare.config.get("num_mask_classes", 0) == bare.config.get("num_classes", 0) == 0
    assert bare.config.get("id2mask_class") is None
    assert bare.config.latents_std == [2.0] * 5
    own = vae.state_dict()
    assert all(tensor.data_ptr() == own[name].data_ptr() for name, tensor in bare.state_dict().items())
    assert own.keys() - bare.state_dict().keys() == {n for n in own if "ation_head." in n}
    assert bare.state_dict().keys() == tiny(**options).state_dict().keys()
    bare.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(type(bare).from_pretrained(tmp_path)(images).sample, vae(images).sample)


def test_models_saved_by_versions_without_heads_still_load(tmp_path):
    vae = tiny(linear_shortcut=True)
    vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_mask_classes", "num_classes", "id2mask_class", "id2label"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(MultiHeadAutoencoderKL.from_pretrained(tmp_path)(images).sample, vae(images).sample)


def test_heads_and_names_round_trip(tmp_path):
    vae = tiny(**HEADS)
    assert vae.config.id2mask_class == {"0": "page", "1": "text", "2": "picture"}
    vae.save_pretrained(tmp_path)
    loaded = MultiHeadAutoencoderKL.from_pretrained(tmp_path)
    assert loaded.config.id2mask_class == vae.config.id2mask_class
    z = torch.randn(1, 5, 4, 4)
    assert torch.equal(loaded.segment(z), vae.segment(z))
    assert torch.equal(loaded.classify(z), vae.classify(z))
    again = MultiHeadAutoencoderKL.from_config(vae.config)
    assert again.state_dict().keys() == vae.state_dict().keys()


def test_gradient_checkpointing_of_the_masks_gives_the_same_gradients():
    z = torch.randn(2, 5, 4, 4)

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        vae = tiny(**HEADS).train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        vae.segment(z).square().mean().backward()
        return {name: p.grad for name, p in vae.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert any(name.startswith("decoder.mid_block") for name in plain)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mask_classes": 1}, "`num_mask_classes` must be 0 .* but is 1"),
        ({"num_classes": -2}, "`num_classes` must be 0 .* but is -2"),
        ({"num_classes": 3, "id2label": {0: "a", 1: "b"}}, "`id2label` must name the classes 0 to 2, but names 0, 1"),
    ],
)
def test_invalid_heads_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_using_a_missing_head_is_an_error():
    vae, z = tiny(), torch.zeros(1, 5, 4, 4)
    for method, head in (
        (vae.segment, "segmentation"),
        (vae.decode_with_masks, "segmentation"),
        (vae.classify, "class"),
    ):
        with pytest.raises(ValueError, match=f"no {head}"):
            method(z)

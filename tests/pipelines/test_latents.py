"""Latent scaling: in closed form for each kind of config, with decoding as its exact inverse.

Shapes: B batch, C latent channels, h w latent cells.
"""

import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from pipelines.common.latents import (
    decode_latents,
    downsampling_factor,
    encode_latents,
    latent_channels,
    latent_shape,
    latents_from_moments,
    posterior_moments,
    scale_latents,
    unscale_latents,
    write_latent_statistics,
)

MEAN, STD = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.5, 3.0]
TINY_KL = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def kl(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**TINY_KL, **config).eval()


def tiny_autoencoder(**config) -> AutoencoderTiny:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**widths, **blocks, **config).eval()


def column(numbers: list[float], dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype).reshape(1, -1, 1, 1)


VAES = {
    "sdxl": (lambda: kl(scaling_factor=0.13025, force_upcast=True), lambda z: z * 0.13025),
    "sd1": (lambda: kl(scaling_factor=0.18215, force_upcast=False), lambda z: z * 0.18215),
    "sd3": (lambda: kl(scaling_factor=1.5305, shift_factor=0.0609), lambda z: (z - 0.0609) * 1.5305),
    "mean_std": (
        lambda: kl(scaling_factor=0.7, latents_mean=MEAN, latents_std=STD),
        lambda z: (z - column(MEAN)) / column(STD) * 0.7,
    ),
    "tiny": (tiny_autoencoder, lambda z: z),
    "tiny_scaled": (lambda: tiny_autoencoder(scaling_factor=0.5), lambda z: z * 0.5),
}


@pytest.mark.parametrize("name", VAES)
def test_latents_are_scaled_by_the_config_and_decode_inverts_encode(name):
    make, rule = VAES[name]
    vae = make().double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    encoded = vae.encode(images)
    z = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
    latents = encode_latents(vae, images)
    assert torch.allclose(latents, rule(z), rtol=0, atol=1e-12)
    assert torch.allclose(unscale_latents(vae, latents), z, rtol=0, atol=1e-12)
    assert torch.equal(
        decode_latents(vae, latents), vae.decode(unscale_latents(vae, latents)).sample.float().clamp(-1, 1)
    )


def test_the_rules_of_two_configs_give_different_latents():
    z = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    scaled = [scale_latents(make(), z) for make, _ in VAES.values()]
    assert all(not torch.allclose(a, b) for i, a in enumerate(scaled) for b in scaled[i + 1 :])


def test_missing_numbers_have_no_effect():
    z = torch.randn(1, 4, 2, 2)
    vae = kl(latents_mean=MEAN, scaling_factor=None)
    assert torch.allclose(scale_latents(vae, z), z - column(MEAN, torch.float32))
    assert torch.equal(scale_latents(kl(scaling_factor=None), z), z)


def test_posterior_sampling_against_its_closed_form():
    vae = kl(scaling_factor=0.5).double()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64) * 2 - 1
    noise = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    posterior = vae.encode(images).latent_dist
    expected = (posterior.mean + posterior.std * noise) * 0.5
    assert torch.allclose(encode_latents(vae, images, noise), expected, rtol=0, atol=1e-12)
    mean, logvar = posterior_moments(vae, images)
    assert torch.equal(latents_from_moments(vae, mean, logvar, noise), encode_latents(vae, images, noise))
    assert torch.equal(latents_from_moments(vae, mean, logvar), posterior.mean * 0.5)


def test_posterior_samples_have_the_posterior_moments():
    vae = kl(scaling_factor=2.0)
    mean, logvar = torch.full((1, 4, 1, 1), 3.0), torch.full((1, 4, 1, 1), -1.0)
    noise = torch.randn(100_000, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    samples = latents_from_moments(vae, mean, logvar, noise)
    assert samples.mean().item() == pytest.approx(6.0, abs=0.01)
    assert samples.std().item() == pytest.approx(2.0 * torch.tensor(-0.5).exp().item(), rel=0.01)


def test_a_vae_without_posterior_ignores_noise():
    vae = tiny_autoencoder()
    images = torch.rand(1, 3, 16, 16)
    mean, logvar = posterior_moments(vae, images)
    assert logvar is None
    assert torch.equal(encode_latents(vae, images, torch.randn_like(mean)), mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_force_upcast_runs_in_float32_even_under_autocast(dtype):
    """A half-precision VAE under autocast gives the results of its float32 copy, and its dtype is restored."""
    half = kl(force_upcast=True).to(dtype)
    reference = kl(force_upcast=True)
    reference.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        latents = encode_latents(reference, images)
        decoded = decode_latents(reference, latents)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(encode_latents(half, images), latents)
            assert torch.equal(decode_latents(half, latents), decoded)
            # Without upcasting, the numbers would differ visibly.
            assert not torch.equal(reference.encode(images).latent_dist.mean.float() * 0.18215, latents)
    assert {p.dtype for p in half.parameters()} == {dtype}


def test_force_upcast_restores_the_dtype_when_the_vae_fails():
    vae = kl(force_upcast=True).to(torch.bfloat16)
    with pytest.raises(RuntimeError):
        encode_latents(vae, torch.rand(1, 5, 16, 16))
    assert vae.dtype == torch.bfloat16


def test_latents_of_a_half_precision_vae_are_scaled_in_float32():
    vae = kl(scaling_factor=0.13025, force_upcast=False).to(torch.bfloat16)
    latents = encode_latents(vae, torch.rand(1, 3, 16, 16))
    assert latents.dtype == torch.float32
    assert decode_latents(vae, latents).dtype == torch.float32


def test_shapes():
    assert latent_channels(kl(latent_channels=6)) == 6
    assert downsampling_factor(kl()) == 2
    assert downsampling_factor(tiny_autoencoder()) == 2
    assert latent_shape(kl(), 16, 24) == (4, 8, 12)
    with pytest.raises(ValueError, match="`width` must be a multiple of 2 .* but is 15; try 16"):
        latent_shape(kl(), 16, 15)


def test_written_statistics_survive_saving_and_copying(tmp_path):
    """`from_config(vae.config)` drops keys listed as default values: scaling_factor would be 0.18215 again."""
    vae = kl()
    write_latent_statistics(vae, MEAN, STD)
    vae.save_pretrained(tmp_path)
    for copy in (vae, AutoencoderKL.from_config(vae.config), AutoencoderKL.from_pretrained(tmp_path)):
        z = torch.randn(1, 4, 2, 2)
        assert torch.allclose(scale_latents(copy, z), (z - column(MEAN, torch.float32)) / column(STD, torch.float32))
    assert json.loads((tmp_path / "config.json").read_text())["scaling_factor"] == 1.0


def test_written_statistics_give_unit_latents():
    vae = kl()
    z = torch.randn(4096, 4, 1, 1) * column(STD, torch.float32) + column(MEAN, torch.float32)
    write_latent_statistics(vae, z.mean((0, 2, 3)).tolist(), z.std((0, 2, 3)).tolist())
    latents = scale_latents(vae, z)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-5
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-5


def test_a_class_without_latents_mean_gets_a_scaling_factor(tmp_path):
    vae = tiny_autoencoder()
    write_latent_statistics(vae, [0.0] * 4, [2.0] * 4)
    vae.save_pretrained(tmp_path)
    assert AutoencoderTiny.from_pretrained(tmp_path).config.scaling_factor == pytest.approx(0.5)


def test_statistics_with_a_wrong_number_of_channels_are_an_error():
    with pytest.raises(ValueError, match="has 3 latents_mean, but latents have 4 channels"):
        scale_latents(kl(latents_mean=[0.0] * 3, latents_std=[1.0] * 3), torch.zeros(1, 4, 2, 2))


def test_a_real_pretrained_vae_reconstructs_a_real_image(shared_dir):
    """The tiny SDXL autoencoder: images in [-1, 1] at both ends, latents of about unit scale, 8 pixels per cell."""
    vae = AutoencoderTiny.from_pretrained(shared_dir / "weights" / "taesdxl")
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    disc = (x.square() + y.square() < 0.4).float() * 2 - 1
    images = torch.stack([disc, y, 0.5 * x])[None]
    with torch.no_grad():
        latents = encode_latents(vae, images)
        decoded = decode_latents(vae, latents)
    assert latents.shape[1:] == latent_shape(vae, 128, 128) == (4, 16, 16)
    assert 0.3 < latents.std() < 3
    psnr = 10 * torch.log10(4 / (decoded - images).square().mean())
    assert psnr > 25

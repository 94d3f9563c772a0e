"""PatchTransformer2DModel and PixelAutoencoder: closed forms, other sizes, precision, and a folder that loads alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.common.latents import decode_latents, encode_latents, latent_shape
from pipelines.common.sampling import restarted
from pipelines.common.schedulers import sampling_scheduler, training_scheduler
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.models import patch_transformer
from pipelines.models.patch_transformer import LEAST_SIGMA, PatchTransformer2DModel, positions
from pipelines.models.pixel_autoencoder import PixelAutoencoder
from tests.support.tiny_models import TEXT_WIDTH, TOKENS, tiny_text_encoder, tiny_tokenizer, tiny_unet


def tiny_transformer(**options) -> PatchTransformer2DModel:
    """Make a transformer whose output layers are not zero."""
    torch.manual_seed(3)
    sizes = {"sample_size": 8, "patch_size": 2, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
    network = PatchTransformer2DModel(**{**sizes, "bottleneck_size": 4, **options})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def pixel_pipeline(**options) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline(
        vae=PixelAutoencoder(),
        unet=None,
        transformer=tiny_transformer(cross_attention_dim=TEXT_WIDTH, **options),
        scheduler=sampling_scheduler(training_scheduler("flow_prediction")),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
    )


def test_patches_are_put_together_as_they_were_taken_apart():
    network = tiny_transformer()
    images = torch.randn(2, 3, 8, 12)
    patches = network._to_patches(images, 4, 6)
    assert torch.equal(patches[1, 7].reshape(3, 2, 2), images[1, :, 2:4, 2:4])
    assert torch.equal(network._from_patches(patches, 4, 6), images)


def test_convolutions_see_across_the_borders_of_patches():
    """Without layers, a patch depends on itself alone; with convolutions, on the pixels of its neighbours too."""
    noisy = torch.randn(1, 3, 8, 8)
    other = noisy.clone()
    other[..., 4:] += 1
    for convolutions, reaches in ((0, False), (2, True)):
        network = tiny_transformer(patch_size=4, num_layers=0, conv_layers=convolutions, conv_width=8)
        before, after = (network(one, 500).sample[..., :4] for one in (noisy, other))
        assert torch.equal(before, after) != reaches
        assert network(torch.randn(2, 3, 12, 8), 500).sample.shape == (2, 3, 12, 8)


def test_a_new_network_with_convolutions_predicts_an_image_of_zeros():
    network = PatchTransformer2DModel(sample_size=8, patch_size=2, hidden_size=16, num_layers=1, conv_layers=3)
    noisy = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network(noisy, 500).sample, 2 * noisy)


def test_the_last_convolution_is_not_in_half_precision():
    """bfloat16 numbers near 1 are 1/128 apart, which is a whole grey level."""
    network = tiny_transformer(conv_layers=1, conv_width=4, predicts_sample=False)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = network(torch.randn(1, 3, 8, 8), 500).sample
    assert predicted.dtype == torch.float32
    assert not torch.equal(predicted, predicted.bfloat16().float())


def test_convolutions_need_an_even_patch():
    with pytest.raises(ValueError, match="needs an even `patch_size`, not 1"):
        tiny_transformer(conv_layers=1, patch_size=1)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm", "unipc"])
def test_sampling_ends_where_the_training_did(name: str):
    """The network is called at no lower noise level, and the images are those that it predicts at the last one."""
    pipeline = pixel_pipeline(least_noise_level=0.3)
    pipeline.set_scheduler(name)
    asked, forward = [], pipeline.transformer.forward

    def watched(sample, timestep, **conditions):
        predicted = forward(sample, timestep, **conditions)
        sigma = float(timestep) / 1000
        asked.append((sigma, (sample - sigma * predicted[0]).clamp(-1, 1)))
        return predicted

    pipeline.transformer.forward = watched
    options = {"guidance_scale": 1.0, "generator": 0, "output_type": "pt", "num_inference_steps": 10}
    images = pipeline("red", **options).images
    assert 0.3 <= min(level for level, _ in asked) < 0.45
    torch.testing.assert_close(images, (asked[-1][1] + 1) / 2, rtol=1e-4, atol=1e-4)
    asked.clear()
    assert pipeline("red", **{**options, "num_inference_steps": 1}).images.isfinite().all()
    assert len(asked) in (1, 2)


def test_models_without_a_least_noise_level_are_sampled_to_the_end():
    pipeline = pixel_pipeline()
    calls, forward = [], pipeline.transformer.forward
    pipeline.transformer.forward = lambda *a, **k: (calls.append(float(a[1])), forward(*a, **k))[1]
    pipeline("red", guidance_scale=1.0, num_inference_steps=10)
    assert len(calls) == 10
    assert min(calls) < 10


def test_what_a_network_predicts_in_proportion_to_the_noise_is_gone_after_a_restart():
    """A network that predicts half of what it sees leaves half of the clean share of its input, and no noise."""
    x = torch.rand(2, 3, 8, 8)
    levels: list[float] = []

    def flow(noisy, timestep):
        levels.append(float(timestep) / 1000)
        return (noisy - noisy / 2) / levels[-1]

    clean = restarted(x, (0.3, 0.1), flow, 1000, None)
    torch.testing.assert_close(clean, x * 0.35 * 0.45)
    assert levels == pytest.approx([0.3, 0.3, 0.1, 0.1])


def test_a_finished_image_is_denoised_again_without_guidance():
    plain, pipeline = pixel_pipeline(), pixel_pipeline(restart_levels=(0.4, 0.2))
    pipeline.transformer.load_state_dict(plain.transformer.state_dict())
    calls, forward = [], pipeline.transformer.forward
    pipeline.transformer.forward = lambda *a, **k: (calls.append((len(a[0]), float(a[1]))), forward(*a, **k))[1]
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    both = pipeline(["red", "blue"], generator=5, **options).images
    assert calls[3:] == [(2, 400.0), (2, 400.0), (2, 200.0), (2, 200.0)]
    assert [rows for rows, _ in calls[:3]] == [4, 4, 4]
    torch.testing.assert_close(pipeline("blue", generator=6, **options).images[0], both[1], rtol=0, atol=1e-4)
    assert (plain(["red", "blue"], generator=5, **options).images - both).abs().max() > 1e-3


def test_an_interrupted_image_is_not_denoised_again():
    pipeline = pixel_pipeline(restart_levels=(0.4, 0.2))
    calls, forward = [], pipeline.transformer.forward
    pipeline.transformer.forward = lambda *a, **k: (calls.append(float(a[1])), forward(*a, **k))[1]

    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = True
        return tensors

    pipeline("red", guidance_scale=1.0, num_inference_steps=5, callback_on_step_end=stop)
    assert len(calls) == 1


@pytest.mark.parametrize("sigma", [1.0, 0.5, 0.01])
def test_the_flow_follows_from_the_predicted_image(sigma):
    """A new network predicts an image of zeros, from which the flow is (x_t - 0) / sigma, with a least sigma."""
    network = PatchTransformer2DModel(sample_size=8, patch_size=2, hidden_size=16, num_layers=1)
    noisy = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    flow = network.double()(noisy, torch.full((2,), 1000 * sigma)).sample
    torch.testing.assert_close(flow, noisy / max(sigma, LEAST_SIGMA), rtol=1e-6, atol=1e-6)
    plain = PatchTransformer2DModel(sample_size=8, patch_size=2, hidden_size=16, num_layers=1, predicts_sample=False)
    assert not plain(noisy.float(), 1000 * sigma).sample.any()


def test_every_weight_takes_part_and_every_condition_counts():
    network = tiny_transformer(cross_attention_dim=TEXT_WIDTH, num_class_embeds=3)
    x, text = torch.randn(2, 3, 8, 8), torch.randn(2, TOKENS, TEXT_WIDTH)
    labels = torch.tensor([0, 1])
    before = network(x, 500, text, labels).sample
    before.square().sum().backward()
    missing = [name for name, parameter in network.named_parameters() if not parameter.grad.any()]
    assert not missing
    others = {"timestep": 400, "encoder_hidden_states": text.flip(1) + 1, "class_labels": labels + 1}
    for name, other in others.items():
        arguments = {"timestep": 500, "encoder_hidden_states": text, "class_labels": labels, name: other}
        assert not torch.allclose(network(x, **arguments).sample, before, atol=1e-3), name


def test_the_first_channels_are_the_noisy_sample():
    network = tiny_transformer(in_channels=6)
    x, condition = torch.randn(2, 2, 3, 8, 8).unbind()
    network.patch_out.weight.data.zero_()
    network.patch_out.bias.data.zero_()
    torch.testing.assert_close(network(torch.cat([x, condition], 1), 500.0).sample, x / 0.5)


def test_the_centre_of_the_image_has_the_same_position_in_every_size():
    small = positions(3, 5, 16, torch.zeros(1)).unflatten(0, (3, 5))
    large = positions(5, 7, 16, torch.zeros(1)).unflatten(0, (5, 7))
    torch.testing.assert_close(large[1:4, 1:6], small)
    assert len(small.flatten(0, 1).unique(dim=0)) == 15


def test_both_kinds_of_attention_and_checkpointing_agree(monkeypatch):
    network, x = tiny_transformer(cross_attention_dim=TEXT_WIDTH), torch.randn(2, 3, 8, 8)
    text = torch.randn(2, TOKENS, TEXT_WIDTH)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(x, 300, text).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    plain = gradients()
    monkeypatch.setattr(patch_transformer, "PLAIN_ATTENTION_TOKENS", 0)
    torch.testing.assert_close(gradients(), plain, rtol=1e-3, atol=1e-5)
    network.enable_gradient_checkpointing()
    network.train()
    torch.testing.assert_close(gradients(), plain, rtol=1e-3, atol=1e-5)


def test_pixels_are_latents_of_their_own():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    vae = PixelAutoencoder()
    assert latent_shape(vae, 8, 12) == (3, 8, 12)
    assert torch.equal(decode_latents(vae, encode_latents(vae, images, torch.randn_like(images))), images)
    half = encode_latents(PixelAutoencoder(scaling_factor=0.5), images)
    assert torch.equal(half, images / 2)


def test_a_pipeline_has_one_network_that_denoises():
    parts = {"vae": PixelAutoencoder(), "scheduler": training_scheduler("flow_prediction")}
    with pytest.raises(ValueError, match="pass either `unet` or `transformer`"):
        LatentDiffusionPipeline(unet=None, **parts)
    with pytest.raises(ValueError, match="pass either `unet` or `transformer`"):
        LatentDiffusionPipeline(unet=tiny_unet(), transformer=tiny_transformer(), **parts)


def test_images_are_generated_in_every_size_and_in_bfloat16():
    pipeline = pixel_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a red poster", "num_inference_steps": 2, "generator": 0, "output_type": "pt"}
    image = pipeline(**arguments).images
    assert image.shape == (1, 3, 8, 8)
    assert pipeline(**arguments, height=12, width=6).images.shape == (1, 3, 12, 6)
    low = pipeline.to(dtype=torch.bfloat16)(**arguments).images
    assert (low.float() - image).abs().mean() < 0.1
    with pytest.raises(ValueError, match="prompt"):
        pipeline(prompt=3)


@pytest.mark.slow
def test_a_saved_pipeline_loads_without_halftone(tmp_path: Path):
    pipeline = pixel_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "model")
    arguments = "prompt='a red poster', num_inference_steps=2, generator=0, output_type='pt'"
    expected = pipeline(prompt="a red poster", num_inference_steps=2, generator=0, output_type="pt").images
    code = (
        "import sys, torch; from diffusers import DiffusionPipeline; "
        f"p = DiffusionPipeline.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True); "
        f"torch.save(p({arguments}).images, {str(tmp_path / 'image.pt')!r}); "
        "assert not [m for m in sys.modules if m.split('.')[0] in ('pipelines', 'training')]"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "image.pt", weights_only=True), expected)

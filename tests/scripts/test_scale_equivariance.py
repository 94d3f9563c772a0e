"""The scale equivariance loss: closed forms, all classes of autoencoders, other losses, and a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from pipelines.models.pixel_autoencoder import PixelAutoencoder
from tests.conftest import forget_accelerate
from tests.support.runs import assert_same_state, rows, sigterm_in_step
from training import train_autoencoder
from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.stage import StageContext

WEIGHT = 0.25
ON = ("--scale_equivariance", str(WEIGHT))
NAME = "scale_equivariance_loss"
STOCK = ("--model.patch_size", "1", "--model.block_out_channels", "[8,8,8,8]")
ATTENTION = ("--model.mid_block_add_attention", "true")
CLASSES = {
    "patches": (),
    "attention": ATTENTION,
    "AutoencoderKL": (*STOCK, *ATTENTION, "--model.class_name", "AutoencoderKL"),
    "AutoencoderTiny": (*STOCK, "--model.class_name", "AutoencoderTiny"),
    "segmentation": ("--heads", "[segmentation]", "--mask_column", "color_role", "--num_mask_classes", "6"),
}


class Cells(nn.Module):
    """Latents are the means of cells of 2×2 pixels, and each is decoded to a cell of one colour."""

    config: dict = {}

    def encode(self, images: Tensor) -> AutoencoderTinyOutput:
        return AutoencoderTinyOutput(latents=F.avg_pool2d(images, 2))

    def decode(self, latents: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=F.interpolate(latents, scale_factor=2, mode="nearest"))


class Shuffled(nn.Module):
    """Latents are the pixels of cells of 2×2 as channels. The reconstruction is exact, but not scale equivariant."""

    config: dict = {}

    def encode(self, images: Tensor) -> AutoencoderTinyOutput:
        return AutoencoderTinyOutput(latents=F.pixel_unshuffle(images, 2))

    def decode(self, latents: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=F.pixel_shuffle(latents, 2))


def phase_of(autoencoder: nn.Module, *words: str) -> train_autoencoder.AutoencoderPhase:
    config = parse_config(train_autoencoder.Config, ["--recipe", "none", *ON, *words])
    return train_autoencoder.AutoencoderPhase(autoencoder, config, None)


def noise_images(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def batch_and_draws(images: Tensor) -> tuple[dict[str, Tensor], Draws]:
    return {"pixel_values": images}, Draws(0, 0, range(len(images)))


# --- closed forms --------------------------------------------------------------------------------------------------


def test_pixels_are_scale_equivariant():
    loss, metrics = phase_of(PixelAutoencoder(), "--l2_weight", "1")(*batch_and_draws(noise_images(16)))
    assert metrics[NAME] == 0
    assert loss == 0


def test_nearest_neighbour_decoding_is_equivariant_on_cells_of_four_pixels_and_on_no_smaller_ones():
    large, small = (F.interpolate(noise_images(16 // cell), scale_factor=cell) for cell in (4, 2))
    phase = phase_of(Cells(), "--l2_weight", "1")
    assert phase(*batch_and_draws(large))[1][NAME] == pytest.approx(0, abs=1e-6)
    metrics = phase(*batch_and_draws(small))[1]
    assert metrics["l1"] == pytest.approx(0, abs=1e-6)
    # The image of half the side has cells of one pixel; they are decoded to their means over 2×2.
    half = small[:, :, ::2, ::2]
    error = half - F.interpolate(F.avg_pool2d(half, 2), scale_factor=2)
    assert metrics[NAME] == pytest.approx((error.abs().mean() + error.square().mean()).item(), rel=1e-5)


def test_a_ramp_of_shuffled_pixels():
    """On a ramp of slope s, pixels that a cell decodes to are s apart instead of 2 s, so each is wrong by s / 2."""
    slope = 0.1
    ramp = (torch.arange(16) * slope - 0.75).expand(2, 3, 16, 16)
    loss, metrics = phase_of(Shuffled(), "--l1_weight", "2", "--l2_weight", "3")(*batch_and_draws(ramp))
    assert metrics["l1"] == metrics["l2"] == 0
    assert metrics[NAME] == pytest.approx(2 * slope / 2 + 3 * (slope / 2) ** 2, rel=1e-4)
    assert loss == pytest.approx(WEIGHT * metrics[NAME].item())


# --- stages --------------------------------------------------------------------------------------------------------


def stage_of(*words: str) -> train_autoencoder.AutoencoderStage:
    return train_autoencoder.AutoencoderStage(parse_config(train_autoencoder.Config, [*words]), StageContext())


def first_batch(stage: train_autoencoder.AutoencoderStage) -> tuple[dict, Draws]:
    return dict(fetch(stage.train_data(), [SampleKey(0, 0), SampleKey(1, 1)])), Draws(0, 0, range(2))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_decodes_half_the_latents_once_more_and_encodes_once(autoencoder_flags, name):
    stage = stage_of(*autoencoder_flags, *ON, *CLASSES[name])
    encoded, decoded = [], []
    stage.autoencoder.encoder.register_forward_hook(lambda *_: encoded.append(1))
    inner = getattr(stage.autoencoder.decoder, "body", stage.autoencoder.decoder)
    first = next(module for module in inner.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda _, inputs, __: decoded.append(inputs[0].shape[-1]))
    losses = stage.generator.losses(*first_batch(stage))
    assert len(encoded) == 1
    assert decoded == [8, 4]
    losses[NAME].backward()
    still = {n for n, p in stage.autoencoder.named_parameters() if p.grad is None or not p.grad.any()}
    # The biases of keys have no influence on attention.
    assert {n for n in still if "_head." not in n and not n.endswith("to_k.bias")} == set()


def gradients_of(stage: train_autoencoder.AutoencoderStage, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(stage.autoencoder.parameters()), allow_unused=True))


def test_without_it_a_step_is_the_sum_of_the_other_losses(autoencoder_flags):
    """The gradients are bit-identical to those of the losses, written out, and one more term does not change them."""
    off, on = (stage_of(*autoencoder_flags, "--l2_weight", "2", *flags) for flags in ((), ON))
    batch, draws = first_batch(off)
    loss, metrics = off.generator(batch, draws)
    assert list(metrics) == ["l1", "l2", "kl"]
    latents, kl = off.generator.latents(batch["pixel_values"], draws)
    error = off.autoencoder.decode(latents).sample - batch["pixel_values"]
    written_out = torch.stack([error.abs().mean(), 2 * error.square().mean(), off.config.kl_weight * kl.mean()]).sum()
    assert torch.equal(loss, written_out)
    pairs = zip(gradients_of(off, loss), gradients_of(off, written_out), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    total, more = on.generator(batch, draws)
    assert {name: more[name] for name in metrics} == metrics
    assert total.item() == pytest.approx((loss + WEIGHT * more[NAME]).item())
    assert more[NAME] > 0


def test_with_learned_weights_it_shares_the_weight_of_the_reconstruction(autoencoder_flags):
    heads = ("--heads", "[segmentation]", "--mask_column", "color_role", "--num_mask_classes", "6")
    words = (*autoencoder_flags, *heads, "--learned_loss_weights", "true")
    off, on = (stage_of(*words, *flags) for flags in ((), ON))
    for stage in (off, on):
        stage.generator.loss_weights.log_variances["reconstruction"].data.fill_(-2.0)
    before, metrics = off.generator(*first_batch(off))
    after, more = on.generator(*first_batch(on))
    assert more.keys() - metrics.keys() == {NAME}
    weight = more["weight_reconstruction"].item()
    assert weight == pytest.approx(torch.tensor(2.0).exp().item() / 2)
    assert (after - before).item() == pytest.approx(weight * WEIGHT * more[NAME].item(), rel=1e-4)


# --- a run ---------------------------------------------------------------------------------------------------------


def train(folder: Path, *words: str) -> int:
    forget_accelerate()
    return train_autoencoder.main([*words, "--num_train_epochs", "2", "--output_dir", str(folder)])


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, autoencoder_flags, monkeypatch):
    """The discriminator starts before the interruption. The column of the loss is in all rows."""
    words = (*autoencoder_flags, *ON, "--adversarial_weight", "0.1", "--discriminator_start", "2")
    assert train(tmp_path / "whole", *words) == 0
    with sigterm_in_step(5, train_autoencoder.AutoencoderPhase, monkeypatch):
        assert train(tmp_path / "run", *words) == 75
    assert json.loads((tmp_path / "run/checkpoints/latest/trainer_state.json").read_text())["step"] in (6, 7)
    assert train(tmp_path / "run", *words) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    assert all(float(row[NAME]) > 0 for row in rows(tmp_path / "run"))

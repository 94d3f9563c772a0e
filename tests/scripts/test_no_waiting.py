"""No step of any stage reads a value from its device, so that a GPU never waits for the process."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.conftest import forget_accelerate
from tests.scripts.conftest import COMMON, TINY_AUTOENCODER, TINY_DIFFUSION
from tests.scripts.test_distill_latent_diffusion import TINY as TINY_STUDENT
from tests.scripts.test_finetune_decoder import TINY as TINY_FINETUNING
from tests.scripts.test_train_controlnet import MASKS
from tests.scripts.test_train_controlnet import TINY as TINY_CONTROLNET
from tests.scripts.test_train_decoder import TINY as TINY_DECODER
from tests.scripts.test_train_image_caption import TINY as TINY_CAPTIONS
from tests.scripts.test_train_layout import COMMON as LAYOUT
from tests.scripts.test_train_layout import TINY_ABSTRACTOR, TINY_ENCODER
from tests.support.no_waiting import no_waiting
from training.core.scripts import script_module
from training.engine.loop import Loop

STEPS = 3
HEADS = (
    *("--heads", "[segmentation,classification]", "--mask_column", "color_role", "--label_column", "style"),
    *("--learned_loss_weights", "true", "--adversarial_weight", "0.1", "--discriminator_start", "1"),
    *("--latent_noise", "0.1", "--scale_equivariance", "0.25"),
)
# Objectives with a table of noise levels, weights of the loss, and class labels besides captions.
LABELLED = (
    *("--condition_on", "[caption,label]", "--label_column", "style", "--caption_prior.hidden_size", "16"),
    *("--prediction_type", "v_prediction", "--snr_gamma", "5", "--noise_offset", "0.1"),
    *("--noise_candidates", "3"),
)


def run(script: str, folder: Path, *flags: str) -> Path:
    """Train a few steps of a stage."""
    forget_accelerate()
    ending = ("--max_train_steps", str(STEPS), "--output_dir", str(folder), "--preview_epochs", "0")
    assert script_module(script).main([*flags, *ending]) == 0
    return folder


@pytest.fixture(scope="module")
def made(posters, tokenizer, autoencoder, tmp_path_factory) -> dict[str, Path]:
    """What the stages below are trained on: models of other stages."""
    folder, data = tmp_path_factory.mktemp("made"), ("--dataset_name", str(posters))
    inputs = ("--tokenizer", str(tokenizer), "--vae", str(autoencoder))
    small = (*data, "--resolution", "32")  # that of the decoder
    encoder = run("encoder", folder / "encoder_32", *LAYOUT, *TINY_ENCODER, *small)
    reads = ("--encoder", str(encoder))
    return {
        "posters": posters,
        "tokenizer": tokenizer,
        "vae": autoencoder,
        "latent": run("latent_diffusion", folder / "latent", *COMMON, *TINY_DIFFUSION, *data, *inputs),
        "decoder": run("decoder", folder / "decoder", *TINY_DECODER, *data),
        "encoder": run("encoder", folder / "encoder", *LAYOUT, *TINY_ENCODER, *data),
        "reader": run("abstractor", folder / "reader", *LAYOUT, *TINY_ABSTRACTOR, *reads, *small),
    }


LATENT = (*COMMON, *TINY_DIFFUSION, "--vae", "{vae}")
CASES = {
    "latent diffusion": ("latent_diffusion", *LATENT, "--tokenizer", "{tokenizer}"),
    "latent diffusion of classes": ("latent_diffusion", *LATENT, "--tokenizer", "{tokenizer}", *LABELLED),
    "distillation": ("distill_latent_diffusion", *COMMON, *TINY_STUDENT, "--teacher", "{latent}"),
    "autoencoder": ("autoencoder", *COMMON, *TINY_AUTOENCODER, *HEADS),
    "controlnet": (
        *("controlnet", *COMMON, *TINY_CONTROLNET, *MASKS, "--base_model", "{latent}", "--noise_candidates", "2"),
    ),
    "controlnet of the decoder": (
        *("controlnet", *COMMON, *TINY_CONTROLNET, *MASKS, "--base_model", "{decoder}"),
        *("--fusion_mode", "cross_attention", "--resolution", "32"),
    ),
    "decoder": ("decoder", *TINY_DECODER, "--noise_candidates", "2"),
    "fine-tuning": ("finetune_decoder", *TINY_FINETUNING, "--decoder", "{decoder}", "--reader", "{reader}"),
    "image caption": ("image_caption", *TINY_CAPTIONS, "--prior.start", "0"),
    "encoder": ("encoder", *LAYOUT, *TINY_ENCODER),
    "abstractor": ("abstractor", *LAYOUT, *TINY_ABSTRACTOR, "--encoder", "{encoder}"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_nothing_from_the_device(tmp_path, made, monkeypatch, case):
    step, watched = Loop.step, []

    def watch(self, batches):
        with no_waiting() if self.state.step else nullcontext():  # the first step copies constants to the device
            step(self, batches)
        watched.append(self.state.step)

    monkeypatch.setattr(Loop, "step", watch)
    script, *flags = (word.format(**made) for word in CASES[case])
    run(script, tmp_path / "run", *flags, "--dataset_name", str(made["posters"]))
    assert watched == [*range(1, STEPS + 1)]


@pytest.mark.parametrize(
    "read",
    [
        *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, bool, torch.as_tensor),
        *(lambda x: torch.ones(2)[torch.ones(2) > x], lambda x: torch.tensor([1.0, 2.0])),
    ],
)
def test_what_waits_is_found(read):
    with pytest.raises(AssertionError, match=r"(?s)waits for the device.*test_no_waiting"), no_waiting():
        read(torch.tensor(0.5))

"""Class-conditional latent diffusion on cached latents: balanced, previewed through the VAE, and partly fine-tuned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_scripts import precompute_latents
from tests.conftest import forget_accelerate
from tests.scripts.test_bad_input import nothing_was_trained, refusal
from tests.support.runs import rows
from training import train_latent_diffusion
from training.core.exchange import ALONE
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.run.checkpoint import load_tensors

LABELLED = ("--condition_on", "[caption,label]", "--balance_by", "style", "--max_grad_norm", "0.1")


@pytest.fixture(scope="module")
def cache_flags(tmp_path_factory, posters, autoencoder, diffusion_flags) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("cache") / "latents"
    forget_accelerate()
    data = ("--dataset_name", str(posters), "--resolution", "64", "--vae", str(autoencoder), "--random_flip", "true")
    assert not precompute_latents.main([*data, "--mask_column", "color_role", "--output_dir", str(folder)])
    return (*diffusion_flags, "--latent_cache", str(folder), "--random_flip", "true")


def train(folder: Path, flags, *more: str) -> None:
    forget_accelerate()
    assert train_latent_diffusion.main([*flags, "--output_dir", str(folder), "--num_train_epochs", "1", *more]) == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory, cache_flags) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    train(folder, cache_flags, *LABELLED, "--mixed_precision", "bf16")
    return folder


def test_a_balanced_labelled_run_on_cached_latents(base, cache_flags):
    assert (base / "samples/epoch_0001.png").is_file()
    log = (base / "run.log").read_text()
    assert "balancing by style (power 1); share of the rows → share of an epoch:" in log
    assert rows(base)[-1]["val_loss"]
    stage = train_latent_diffusion.LatentDiffusionStage(
        parse_config(train_latent_diffusion.Config, [*cache_flags, *LABELLED]), StageContext()
    )
    previews = stage.previews(ALONE)
    assert [image.size for image in previews.images] == [(64, 64)] * 2
    assert [image.size for image in previews.references] == [(64, 64)] * 2  # decoded from the cache
    assert all(caption.endswith("]") for caption in previews.captions)


def test_fine_tuning_in_parts(tmp_path, base, cache_flags):
    patterns = ["unet.down_blocks.*", "unet.class_embedding.*", "text_encoder.*"]
    flags = (*LABELLED, "--init_from", str(base), "--learning_rate", "1e-3", "--preview_epochs", "0")
    train(tmp_path / "run", cache_flags, *flags, "--freeze_parameters", f"[{', '.join(patterns)}]")
    starts = tuple(pattern.removesuffix("*") for pattern in patterns)
    seen = set()
    for part, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        before, after = (load_tensors(run / "pipeline" / part / file) for run in (base, tmp_path / "run"))
        for name, tensor in before.items():
            frozen = f"{part}.{name}".startswith(starts)
            assert torch.equal(tensor, after[name]) == frozen, name
            seen.add(frozen)
    assert seen == {True, False}


MISTAKES = {
    "no such column": (["--balance_by", "stile"], ["no column 'stile'", "style", "--balance_by"]),
    "a class without a sample": (["--balance_by", "label", "--max_train_samples", "8"], ["no sample", "8 classes"]),
    "a power out of range": (["--balance_by", "label", "--balance_power", "2"], ["--balance_power is 2"]),
    "a pattern without a match": (
        ["--freeze_parameters", "[unet.down_block.*]"],
        ["did you mean 'unet.down_blocks.*'"],
    ),
    "everything frozen": (["--freeze_parameters", "['*']"], ["leaves nothing to train"]),
    "clipping below zero": (["--max_grad_norm", "-1"], ["--max_grad_norm is -1"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_message_and_status_2(tmp_path, diffusion_flags, capfd, name):
    words, named = MISTAKES[name]
    message = refusal(train_latent_diffusion, [*diffusion_flags, "--output_dir", str(tmp_path / "run"), *words], capfd)
    assert [word for word in named if word not in message] == [], message
    assert nothing_was_trained(tmp_path / "run")

"""--freeze_parameters: matching parameters are bit-identical after training, and all others are trained."""

from __future__ import annotations

import pytest
import torch

from pipelines.tools.cli import UserError
from tests.support.toy import ToyConfig, ToyStage
from tests.support.toy_runs import assert_equal, run, tensors_of
from training.engine.weights import freeze_parameters

PATTERNS = ("--freeze_parameters", "[unet.down_blocks.*, unet.conv_in.bias]")
PREFIX = "phase_denoiser.safetensors:unet."


def is_frozen(name: str) -> bool:
    return name.startswith("down_blocks.") or name == "conv_in.bias"


def test_frozen_parts_are_bit_identical_after_training_and_a_resume(tmp_path):
    flags = (*PATTERNS, "--num_train_epochs", "2", "--weight_decay", "0.1", "--learning_rate", "1e-2")
    assert run(tmp_path / "whole", *flags) == 0
    assert run(tmp_path / "parts", *flags, "--signal_step", "8") == 75
    assert run(tmp_path / "parts", *flags) == 0
    trained = tensors_of(tmp_path / "whole" / "checkpoints/latest")
    assert_equal(tensors_of(tmp_path / "parts" / "checkpoints/latest"), trained)
    fresh = ToyStage(ToyConfig()).unet.state_dict()
    unmoved = {name for name, tensor in fresh.items() if torch.equal(tensor, trained[PREFIX + name])}
    assert unmoved == {name for name in fresh if is_frozen(name)}
    assert all(torch.equal(trained[f"ema.safetensors:unet.{name}"], fresh[name]) for name in unmoved)
    moments = sum(name.startswith("optimizer_denoiser") and name.endswith("exp_avg") for name in trained)
    assert moments == len(fresh) - len(unmoved)


def test_a_pattern_that_matches_nothing_is_refused():
    stage = ToyStage(ToyConfig())
    with pytest.raises(UserError, match=r"'unet.down_block.\*' matches none.*did you mean 'unet.down_blocks.\*'"):
        freeze_parameters(stage, ["unet.conv_in.*", "unet.down_block.*"])
    with pytest.raises(UserError, match="leaves nothing to train in phase 'denoiser'"):
        freeze_parameters(stage, ["*"])


def test_nothing_is_frozen_by_default():
    stage = ToyStage(ToyConfig())
    freeze_parameters(stage, [])
    assert all(parameter.requires_grad for parameter in stage.unet.parameters())


def test_frozen_parameters_may_not_change_in_a_run(tmp_path):
    run(tmp_path / "run", *PATTERNS, "--max_train_steps", "1")
    with pytest.raises(UserError, match="--freeze_parameters"):
        run(tmp_path / "run", "--max_train_steps", "2")

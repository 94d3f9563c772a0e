"""The registry finds the stage of a config file; the experiments that come with the project are consistent."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.tools.cli import UserError
from tests.conftest import ROOT
from training.core.parsing import parse_config
from training.core.scripts import script_path, stage_names
from training.experiments.registry import config_class, read_config_file, stage_class, stage_of
from training.models.unet import UNetConfig

EXPERIMENTS = ROOT / "configs/experiments"
ABLATION = EXPERIMENTS / "latent_diffusion/ablation"
EXPECTED = {
    "autoencoder/quickstart.yaml": "autoencoder",
    "autoencoder/emoji_64.yaml": "autoencoder",
    "latent_diffusion/quickstart.yaml": "latent_diffusion",
    "latent_diffusion/ablation/capacity_unet128_d4.yaml": "latent_diffusion",
    "latent_diffusion/ablation/inputs/autoencoder.yaml": "autoencoder",
    "latent_diffusion/distill_quickstart.yaml": "distill_latent_diffusion",
    "posters/encoder_tiny.yaml": "encoder",
    "posters/abstractor_small.yaml": "abstractor",
    "posters/decoder_64.yaml": "decoder",
    "posters/finetune_plain_64.yaml": "finetune_decoder",
}


@pytest.mark.parametrize("file", EXPECTED)
def test_the_stage_of_a_file(file):
    assert stage_of(EXPERIMENTS / file) == EXPECTED[file]


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_belongs_to_one_script(path):
    assert stage_of(path) in stage_names()
    folder = path.relative_to(EXPERIMENTS).parts[0]
    elsewhere = path.parent.name == "inputs" or path.stem == "stage3_controlnet"  # an input of another series
    distilled = f"distill_{folder}" if path.stem.startswith("distill_") else folder
    assert folder not in stage_names() or elsewhere or stage_of(path) == distilled


def test_every_script_has_its_config_and_its_stage():
    for name in stage_names():
        module = f"training.{script_path(name).stem}"
        assert config_class(name).__module__ == stage_class(name).__module__ == module


def test_the_config_of_a_run_needs_no_name(tmp_path):
    for stage, flags in (("encoder", []), ("latent_diffusion", ["--vae", "v", "--tokenizer", "t"])):
        config = parse_config(config_class(stage), ["--dataset_name", "x", *flags])
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
        assert stage_of(tmp_path / "config.yaml") == stage


def test_mistakes_are_user_errors(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1.0e-3\nmodel: {block_out_channels: [16, 32]}\n")
    with pytest.raises(UserError, match=r"could belong to .*autoencoder or .*move it into a folder"):
        stage_of(file)
    file.write_text("kl_weigth: 1.0e-6\nl1_weight: 1.0\n")
    with pytest.raises(UserError, match="unknown key 'kl_weigth'.*did you mean 'kl_weight'.*autoencoder"):
        stage_of(file)
    with pytest.raises(UserError, match="no file '.*nowhere.yaml'"):
        stage_of(tmp_path / "nowhere.yaml")
    file.write_text("just words")
    with pytest.raises(UserError, match="does not consist of named settings"):
        stage_of(file)
    with pytest.raises(UserError, match="unknown stage 'autoencodr'; did you mean 'autoencoder'"):
        config_class("autoencodr")


# --- the ablations of latent diffusion -------------------------------------------------------------------------------


def ablations(prefix: str) -> dict[str, dict]:
    return {path.stem: read_config_file(path) for path in sorted(ABLATION.glob(f"{prefix}_*.yaml"))}


@pytest.mark.parametrize(
    ("prefix", "least", "differing"),
    [
        ("capacity", 5, {"model"}),
        ("attention", 4, {"model"}),
        ("scheduler", 4, {"prediction_type", "beta_schedule", "rescale_betas_zero_snr", "timestep_sampling"}),
        ("prediction", 4, {"prediction_type", "beta_schedule", "timestep_sampling"}),
        ("stage2", 3, {"freeze_parameters", "balance_by", "balance_power"}),
    ],
)
def test_experiments_of_a_group_differ_only_in_what_they_compare(prefix, least, differing):
    files = ablations(prefix)
    assert len(files) >= least
    keys = {key for values in files.values() for key in values}
    varied = {key for key in keys if len({str(values.get(key)) for values in files.values()}) > 1}
    assert varied == {"output_dir"} | differing
    for name, values in files.items():
        assert values["output_dir"] == f"runs/ablation/{name}"
        config = parse_config(config_class("latent_diffusion"), ["--config", str(ABLATION / f"{name}.yaml")])
        assert config.resolution // 4 // 2 ** (len(config.model.block_out_channels) - 1) >= 4


def test_the_capacity_matches_the_name():
    for name, values in ablations("capacity").items():
        width, depth = name.removeprefix("capacity_unet").split("_d")
        widths = UNetConfig(**values["model"]).block_out_channels
        assert (widths[0], len(widths)) == (int(width), int(depth))


def test_the_attention_levels_match_the_name():
    levels = {name: values["model"]["attention_levels"] for name, values in ablations("attention").items()}
    assert levels == {
        "attention_none": [],
        "attention_lowest": [2],
        "attention_two_lowest": [1, 2],
        "attention_all": [0, 1, 2],
    }


def test_each_runs_alone():
    """The `prepare` of each experiment makes all of its inputs; the experiments of a series share them."""
    for path in ABLATION.rglob("*.yaml"):
        values = read_config_file(path)
        made = " ".join(values["prepare"])
        for key in ("dataset_name", "latent_cache", "vae", "tokenizer", "init_from"):
            assert values.get(key, "") in made, f"{path.name}: {key}"
        for command in values["prepare"].values():
            words = command.split()
            assert (ROOT / words[0]).is_file()
            assert all((ROOT / word).is_file() for word in words if word.startswith("configs/"))


def test_tiny_experiments_are_six():
    assert len(list((ABLATION / "tiny").glob("*.yaml"))) == 6
    assert len({Path(read_config_file(path)["output_dir"]) for path in (ABLATION / "tiny").glob("*.yaml")}) == 6

"""Parsing flags and YAML files into a config: flags override files, and errors suggest the nearest known name."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import yaml

from pipelines.tools.cli import UserError
from tests.conftest import ROOT
from training import train_autoencoder
from training.core.options import option
from training.core.parsing import known_names, parse_config
from training.engine.run_config import RunConfig


@dataclass
class Model:
    """A model."""

    block_out_channels: list[int] = field(default_factory=lambda: [8, 16])
    """Channels"""
    dropout: float = 0.0
    """Share"""


@dataclass
class Config(RunConfig):
    """Flags."""

    output_dir: str = option("runs/x", on_resume="free")
    """Folder"""
    model: Model = field(default_factory=Model)
    """The model"""
    names: list[str] = option(["a"])
    """Names"""


def parse(*words: str) -> Config:
    return parse_config(Config, list(words))


def yaml_file(tmp_path, text: str) -> str:
    (tmp_path / "c.yaml").write_text(text)
    return str(tmp_path / "c.yaml")


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path):
    path = yaml_file(tmp_path, "seed: 3\nlearning_rate: 1.0e-3\nmodel:\n  dropout: 0.5\n")
    config = parse("--config", path, "--seed", "4", "--model.block_out_channels", "[4,8,12]")
    assert (config.seed, config.learning_rate, config.train_batch_size) == (4, 1e-3, 16)
    assert config.model == Model([4, 8, 12], 0.5)


def test_numbers_in_common_notations(tmp_path):
    """YAML reads 1e-3 as a string; as a learning rate it must still be a number."""
    assert parse("--config", yaml_file(tmp_path, "learning_rate: 1e-3\n")).learning_rate == 1e-3
    assert parse("--learning_rate", "1e-3").learning_rate == 1e-3
    assert parse("--names", "[]").names == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean 'learning_rate'"),
        (["--model.droput", "1"], "unknown flag --model.droput; did you mean 'model.dropout'"),
        (["--seed", "one"], "--seed"),
        (["--train_batch_size", "0"], "--train_batch_size is 0; it must be at least 1"),
        (["--optimizer", "adam8"], "did you mean 'adam'"),
        (["--mixed_precision", "fp8"], "mixed_precision"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_in_flags(words, message):
    with pytest.raises(UserError) as error:
        parse(*words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat' in the YAML file; did you mean 'learning_rate'?"),
        ("model:\n  droput: 1", "unknown key 'model.droput' in the YAML file; did you mean 'model.dropout'?"),
        ("seed: [1]", "--seed"),
        ("seed: 1: 2", ""),
    ],
)
def test_mistakes_in_files(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        parse("--config", yaml_file(tmp_path, text))
    assert message in str(error.value)


def test_without_arguments_the_preset_is_used(tmp_path):
    preset = yaml_file(tmp_path, "seed: 9\n")
    assert parse_config(Config, [], preset=preset).seed == 9
    assert parse_config(Config, ["--train_batch_size", "2"], preset=preset).seed == 0


def test_a_preset_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = yaml.safe_load((ROOT / "configs/experiments/autoencoder/quickstart.yaml").read_text())["max_train_steps"]
    for name in ("autoencoder/quickstart", "configs/experiments/autoencoder/quickstart.yaml"):
        for words in (["--config", name], [f"--config={name}"]):
            assert parse_config(train_autoencoder.Config, words).max_train_steps == expected
    with pytest.raises(UserError, match="no file 'autoencoder/quickstrt'.*did you mean 'autoencoder/quickstart'"):
        parse("--config", "autoencoder/quickstrt")
    with pytest.raises(UserError, match="--config"):
        parse("--config")


def test_help_has_every_flag_with_its_description(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    for name in known_names(Config):
        assert f"--{name}" in output, name
    assert "Batch size per process (of one micro-batch)." in output


def test_a_config_written_and_read_again_is_the_same(tmp_path):
    import yaml

    config = parse("--seed", "5", "--model.dropout", "0.25", "--hub_token", "hf_secret")
    assert "hf_secret" not in str(config.to_dict())
    again = parse("--config", yaml_file(tmp_path, yaml.safe_dump(config.to_dict())))
    assert again.to_dict() == config.to_dict()

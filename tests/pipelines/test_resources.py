"""Shipped files are found by name from any folder, unless the user has a file of that name; commands can be typed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipelines.tools.cli import UserError
from pipelines.tools.commands import command, install_command, subcommand, this_command
from pipelines.tools.resources import BRIEFS, find_file, shipped_files, shipped_path
from tests.conftest import ROOT

QUICKSTART = ROOT / "configs/experiments/latent_diffusion/quickstart.yaml"


@pytest.mark.parametrize(
    "name",
    [
        "latent_diffusion/quickstart",
        "latent_diffusion/quickstart.yaml",
        "configs/experiments/latent_diffusion/quickstart.yaml",
        QUICKSTART,
    ],
)
def test_a_preset_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file(name) == QUICKSTART


def test_the_users_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("latent_diffusion/quickstart.yaml")
    own.parent.mkdir()
    own.write_text("seed: 1\n", encoding="utf-8")
    assert find_file("latent_diffusion/quickstart.yaml") == own
    assert find_file("latent_diffusion/quickstart") == QUICKSTART  # the user has no file of this name


def test_briefs_are_found_in_their_own_folder():
    assert find_file("swiss", BRIEFS) == shipped_path("configs/briefs/swiss.yaml")
    with pytest.raises(UserError, match="no file 'swis'.*did you mean 'swiss'"):
        find_file("swis", BRIEFS)


@pytest.mark.parametrize("name", ["latent_diffusion/quickstrt", "configs/experiments/latent_diffusion/quickstrt.yaml"])
def test_an_unknown_name_suggests_the_nearest(name):
    with pytest.raises(UserError, match="did you mean 'latent_diffusion/quickstart'"):
        find_file(name)
    with pytest.raises(UserError, match="no file '/nowhere/x.yaml'"):
        find_file("/nowhere/x.yaml")


def test_every_yaml_and_template_of_the_repository_is_shipped():
    configs = [file for suffix in ("yaml", "jinja") for file in (ROOT / "configs").rglob(f"*.{suffix}")]
    on_disk = [*configs, *(ROOT / "model_cards").glob("*.jinja")]
    assert shipped_files() == sorted(file.relative_to(ROOT).as_posix() for file in on_disk)


@pytest.mark.parametrize(
    ("script", "in_checkout", "installed"),
    [
        ("data_scripts/make_posters.py", "python data_scripts/make_posters.py", "halftone data make_posters"),
        ("training/train_encoder.py --seed 1", "accelerate launch training/train_encoder.py --seed 1",
         "halftone train encoder --seed 1"),
        ("pipelines/sample.py", "python pipelines/sample.py", "halftone sample"),
    ],
)  # fmt: skip
def test_commands_as_they_can_be_typed(script, in_checkout, installed):
    assert command(script, checkout=True) == in_checkout
    assert command(script, checkout=False) == installed


def test_extras_as_they_can_be_installed():
    assert install_command("cuda", "bitsandbytes", checkout=True) == "pip install -e '.[cuda]'"
    assert install_command("cuda", "bitsandbytes", checkout=False) == "pip install bitsandbytes"


def test_subcommands_of_scripts():
    assert subcommand("training/evaluate.py") == "evaluate"
    assert subcommand("training/run_experiments.py") == "run_experiments"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Return a function that simulates starting a program with these words in its own folder, without a launcher."""
    monkeypatch.chdir(tmp_path)
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def start(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", [*words])
        return this_command()

    return start


def test_this_command_is_what_was_typed(started, monkeypatch, tmp_path):
    flags = ("--run_name", "two words")
    assert started(str(tmp_path / "training/x.py"), *flags) == "python training/x.py --run_name 'two words'"
    assert started("/elsewhere/x.py", *flags) == "python /elsewhere/x.py --run_name 'two words'"
    assert started("halftone train encoder", *flags) == "halftone train encoder --run_name 'two words'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert started("/elsewhere/x.py") == "torchrun --nproc-per-node 2 /elsewhere/x.py"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert started("/elsewhere/x.py") == "accelerate launch /elsewhere/x.py"

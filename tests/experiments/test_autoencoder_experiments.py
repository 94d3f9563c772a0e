"""The autoencoder experiments: their settings match their names, and they differ in nothing else."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml

from pipelines.common.poster_domain import COLOR_ROLES
from tests.conftest import ROOT
from training.core.parsing import parse_config
from training.train_autoencoder import Config

FOLDER = ROOT / "configs/experiments/autoencoder"
PHASE1 = sorted((FOLDER / "phase1").glob("*.yaml"))
HEADS = {
    "S1": [],
    "S2": ["segmentation"],
    "S3": ["classification"],
    "S4": ["segmentation", "classification"],
}
VARIED = ("output_dir", "heads", "model")


def test_phase_1_is_complete_and_numbered_in_order():
    grid = itertools.product(HEADS, (16, 8, 4), (4, 8))
    expected = [f"phase1_{n}_AE_{heads}_ch{ch}_ds{ds}" for n, (heads, ch, ds) in enumerate(grid, 1)]
    assert {path.stem for path in PHASE1} == set(expected)
    assert len(PHASE1) == 24


def test_the_settings_of_a_phase_1_experiment_match_its_name():
    for path in PHASE1:
        match = re.fullmatch(r"phase1_\d+_AE_(S\d)_ch(\d+)_ds(\d+)", path.stem)
        assert match is not None
        config = yaml.safe_load(path.read_text())
        assert config["output_dir"] == f"runs/phase1/{path.stem}"
        assert config["heads"] == HEADS[match[1]]
        model = config["model"]
        downsampling = model["patch_size"] * 2 ** (len(model["block_out_channels"]) - 1)
        assert (model["latent_channels"], downsampling) == (int(match[2]), int(match[3]))
        assert config["mask_class_names"] == list(COLOR_ROLES)
        assert list(config["prepare"]) == [config["dataset_name"]]


def test_phase_1_experiments_differ_in_nothing_else():
    read = [yaml.safe_load(path.read_text()) for path in PHASE1]
    rest = [{key: value for key, value in config.items() if key not in VARIED} for config in read]
    assert all(one == rest[0] for one in rest)


# From phase 1, one experiment for each set of heads: the others have the same keys.
@pytest.mark.parametrize("path", [*sorted(FOLDER.glob("*.yaml")), *PHASE1[::6]], ids=lambda path: path.stem)
def test_presets_parse(path: Path):
    parse_config(Config, ["--config", str(path)])

"""The shell script of docs/clusters.md submits a whole sweep to a real Slurm, with tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.hpc.conftest import SITE
from tests.scripts.conftest import COMMON, TINY_AUTOENCODER, TINY_DIFFUSION
from tests.scripts.test_train_controlnet import TINY as CONTROLNET
from tests.support.runs import ROOT
from training.core.parsing import parse_config
from training.experiments.registry import config_class
from training.hpc.submissions import read_submitted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def sweep_of_the_docs() -> str:
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if block.startswith("#!/bin/bash"))


def test_the_script_is_short():
    assert len(sweep_of_the_docs().splitlines()) <= 20


def write(folder: Path, stage: str, name: str, flags: tuple[str, ...], **settings: object) -> None:
    needed = [
        f"--{key}={settings[key]}" for key in ("dataset_name", "vae", "tokenizer", "base_model") if key in settings
    ]
    values = parse_config(config_class(stage), [*COMMON, *flags, *needed, "--max_train_steps", "2"]).to_dict()
    text = yaml.safe_dump({**values, **settings, "validation_epochs": 0, "preview_epochs": 0}, sort_keys=False)
    (folder / f"sweep/{name}.yaml").write_text(text)


def test_a_whole_sweep(cluster):
    folder = cluster.folder
    (folder / "sweep").mkdir()
    data = {"dataset_name": "data/sweep"}
    recipes = {
        "data/sweep": "data_scripts/make_posters.py --output_dir data/sweep --num_posters 40 --num_workers 1 "
        "--validation_fraction 0.1 --test_fraction 0.1",
        "data/tokenizer": "data_scripts/train_tokenizer.py --dataset_name data/sweep --output_dir data/tokenizer "
        "--model word_level",
    }
    made = {"data/sweep": recipes["data/sweep"]}
    write(
        folder,
        "autoencoder",
        "autoencoder",
        TINY_AUTOENCODER,
        **data,
        prepare=made,
        output_dir="runs/sweep/autoencoder",
    )
    inputs = {
        **data,
        "vae": "runs/sweep/autoencoder",
        "latent_cache": "data/sweep_latents",
        "tokenizer": "data/tokenizer",
    }
    for name, rate in (("narrow", 1e-3), ("other", 1e-4)):
        write(folder, "latent_diffusion", f"latent_diffusion_{name}", TINY_DIFFUSION, **inputs, prepare=recipes,
              learning_rate=rate, output_dir=f"runs/sweep/{name}")  # fmt: skip
    control = (*CONTROLNET, "--conditioning_image_column", "[text_mask, image_mask]")
    write(folder, "controlnet", "controlnet", control, **data, base_model="runs/sweep/narrow_sweep/seed_0",
          output_dir="runs/sweep/controlnet")  # fmt: skip
    (folder / "my_cluster.yaml").write_text(yaml.safe_dump(SITE))
    done = cluster.run("bash", "-e", "-c", sweep_of_the_docs().replace("--num_images 1000", "--num_images 8"))
    assert done.returncode == 0, done.stderr
    names = ["autoencoder", "latents", "diffusion-inputs", "diffusion", "controlnet", "evaluation", "comparison"]
    submitted = read_submitted(folder / "runs/hpc")
    assert list(dict.fromkeys(one.name for one in submitted)) == names
    assert done.stdout.count("pending") + done.stdout.count("running") + done.stdout.count("starting") >= len(names) - 1
    for one in submitted:
        number = one.job if one.task is None else f"{one.job}_{one.task}"
        assert cluster.slurm.wait(number, seconds=900)["JobState"] == "COMPLETED", cluster.output()
    runs = [one.run for one in submitted if one.run]
    assert len(runs) == 6
    assert {json.loads((folder / run / "record.json").read_text())["steps"] for run in runs} == {2}
    assert (folder / "runs/sweep/narrow_sweep/seed_0/evaluation.json").is_file()
    assert (folder / "runs/sweep/comparison.md").is_file()
    table = cluster.run("python", "training/hpc/submit.py", "--status").stdout.splitlines()
    assert sum(" complete " in line for line in table) == len(runs)

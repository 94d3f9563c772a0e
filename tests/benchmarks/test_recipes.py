"""The comparison of recipes: what it refuses, and one small study that is completed by the same command."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.tools.cli import UserError
from training.benchmarks.recipes import Recipe, Study, StudyConfig, main

BRIEF = """
autoencoder: {max_train_steps: 2, max_train_minutes: 0}
diffusion: {max_train_steps: STEPS, max_train_minutes: 0, num_previews: 2, preview_inference_steps: 2}
evaluation: {num_inference_steps: 2, extractor_resolution: 32}
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    (tmp_path / "pics").mkdir()
    for i in range(24):
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "pics" / f"{i}.png")
    return tmp_path / "pics"


def test_a_recipe_has_known_parts_only(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("autoencoders: {}", encoding="utf-8")
    with pytest.raises(UserError, match="unknown autoencoders; the parts of a recipe are autoencoder, diffusion"):
        Recipe.read(str(file))
    file.write_text("diffusion: {learning_rate: 0.5}", encoding="utf-8")
    words = Recipe.read(str(file)).words("diffusion", {"learning_rate": 1, "seed": 3})
    assert words == ["--learning_rate", "0.5", "--seed", "3"]


def test_collections_and_recipes_must_exist(images: Path) -> None:
    with pytest.raises(UserError, match="--collections is missing"):
        main([])
    with pytest.raises(UserError, match="nowhere does not exist"):
        main(["--collections", f"[{images},nowhere]"])


def test_a_table_that_an_earlier_version_began_gets_the_new_columns(images: Path, tmp_path: Path) -> None:
    study = Study(StudyConfig(collections=[str(images)], recipes=[], work_dir=str(tmp_path)))
    study.results.write_text("collection,recipe,seed,minutes,kid\npics,base,0,10,0.5\n", encoding="utf-8")
    study._append({"collection": "pics", "recipe": "other", "kid": 0.25, "second_kid": 0.125})
    assert [(row["recipe"], row["kid"], row["second_kid"]) for row in study.rows()] == [
        ("base", "0.5", ""), ("other", "0.25", "0.125"),
    ]  # fmt: skip


@pytest.mark.long
def test_a_study_measures_every_recipe_once(images: Path, tmp_path: Path) -> None:
    for name, steps in (("two", 2), ("three", 3)):
        (tmp_path / f"{name}.yaml").write_text(BRIEF.replace("STEPS", str(steps)), encoding="utf-8")
    words = ["--collections", f"[{images}]", "--work_dir", str(tmp_path / "study"), "--num_images", "8"]
    words += ["--resolution", "16", "--second_extractor", "efficientnet-lite0", "--recipes"]
    assert main([*words, f"[{tmp_path / 'two.yaml'}]"]) == 0
    assert main([*words, f"[{tmp_path / 'two.yaml'},{tmp_path / 'three.yaml'}]"]) == 0
    with (tmp_path / "study" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [(row["recipe"], row["autoencoder_steps"], row["diffusion_steps"]) for row in rows]
    assert found == [("two", "2", "2"), ("three", "2", "3")]
    assert all(float(row["kid"]) > 0 and float(row["kid_error"]) > 0 for row in rows)
    # The second network is the same one at its usual resolution, so that it sees the same images in another size.
    assert all(row["second_kid"] not in ("", row["kid"]) and row["second_floor"] for row in rows)
    assert len(list((tmp_path / "study" / "pics").glob("autoencoder_*"))) == 1

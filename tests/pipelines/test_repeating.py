"""How an image was generated is read from its PNG file, as sample.py and the studio write it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines import sample
from pipelines.common.design_brief import NUMBERS, DesignBrief
from pipelines.common.poster_domain import STYLES
from pipelines.tools.cli import UserError
from pipelines.tools.generated import save_image
from pipelines.tools.repeating import Recipe, brief_of, brief_text, read_recipe, sampler_of
from tests.support.tiny_models import tiny_pipeline

FLAGS = ("--num_images", "2", "--num_inference_steps", "3", "--seed", "7")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_an_image_of_sample_can_be_generated_again_from_its_file(model, tmp_path):
    words = ("--prompt", "a red poster", "--negative_prompt", "blue", "--guidance_scale", "3.5", "--scheduler", "ddim")
    sample.main(["--model", str(model), *FLAGS, *words, "--output", f"{tmp_path}/images/"])
    file = sorted((tmp_path / "images").glob("*.png"))[1]
    recipe = read_recipe(file)
    assert (recipe.batch(16), recipe.place, recipe.size) == ((7, 2), 1, None)
    pipeline = tiny_pipeline()
    pipeline.set_scheduler(sampler_of(recipe, type(pipeline.scheduler).__name__))
    again = pipeline(
        [recipe.texts["prompt"]] * 2,
        negative_prompt=recipe.texts["negative_prompt"],
        guidance_scale=recipe.number("guidance_scale"),
        num_inference_steps=int(recipe.number("num_inference_steps")),
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
    ).images[1]
    with Image.open(file) as written:
        assert written.tobytes() == again.tobytes()


def test_a_file_names_the_batch_of_its_image_but_not_one_of_several_rows(model, tmp_path):
    words = ("--model", str(model), *FLAGS, "--num_images", "3", "--batch_size", "2")
    sample.main([*words, "--prompt", "a red poster", "--output", f"{tmp_path}/one/"])
    files = sorted((tmp_path / "one").glob("*.png"))
    assert [read_recipe(file).batch(16) for file in files] == [(7, 2), (7, 2), (9, 1)]
    assert [read_recipe(file).place for file in files] == [0, 1, 0]
    sample.main([*words, "--prompt", "a red poster", "a blue poster", "--output", f"{tmp_path}/two/"])
    files = sorted((tmp_path / "two").glob("*.png"))
    assert [read_recipe(file).batch(16) for file in files] == [(seed, 1) for seed in (7, 8, 9)] * 2


@pytest.mark.parametrize(
    ("together", "batch"),
    [
        ("3, 4, 5, 6", (3, 4)),
        ("5", (5, 1)),
        ("4, 5, 7", (5, 1)),
        ("6, 7", (5, 1)),
        ("none", (5, 1)),
        (", ".join(map(str, range(17))), (5, 12)),
    ],
    ids=["batch", "alone", "with a gap", "of others", "no numbers", "too large"],
)
def test_the_batch_is_what_the_file_says_if_it_can_be(tmp_path, together, batch):
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"seed": "5", "batch_seeds": together})
    recipe = read_recipe(tmp_path / "a.png")
    assert recipe.batch(16) == batch
    assert recipe.seed + recipe.place == 5
    assert "batch_seeds" not in recipe.texts


def test_a_grid_gives_its_first_row_and_no_size(model, tmp_path):
    grid = tmp_path / "grid.png"
    sample.main(["--model", str(model), *FLAGS, "--prompt", "a red poster", "a blue poster", "--output", str(grid)])
    recipe = read_recipe(grid)
    assert recipe == Recipe(7, 2, recipe.texts, None)
    assert recipe.texts["prompt"] == "a red poster"
    assert sampler_of(recipe, recipe.texts["scheduler"]) is None


def test_a_prompt_of_several_lines_and_a_given_size_are_kept(tmp_path):
    settings = {"prompt": "one\ntwo", "seed": "3", "height": "16", "width": "24", "guidance_scale": "x"}
    save_image(Image.new("RGB", (48, 32)), tmp_path / "a.png", settings)
    recipe = read_recipe(tmp_path / "a.png")
    assert (recipe.texts["prompt"], recipe.size) == ("one\ntwo", (16, 24))
    assert recipe.number("guidance_scale") is None


@pytest.mark.parametrize(
    ("used", "own", "sampler"),
    [
        ({"scheduler": "DDIMScheduler"}, "DPMSolverMultistepScheduler", "ddim"),
        ({"scheduler": "DDIMScheduler"}, "DDIMScheduler", None),
        ({"scheduler": "DPMSolverMultistepScheduler", "sampler": "dpm_sde"}, "DPMSolverMultistepScheduler", "dpm_sde"),
        ({"scheduler": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler", "heun"),
        ({"scheduler": "Unknown"}, "DDIMScheduler", None),
        ({}, "DDIMScheduler", None),
    ],
)
def test_the_sampler_is_known_by_name_or_by_class(used, own, sampler):
    assert sampler_of(Recipe(0, 1, used), own) == sampler


@given(
    style=st.none() | st.sampled_from(STYLES),
    palette=st.none() | st.lists(st.from_regex(r"\A#[0-9a-f]{6}\Z"), min_size=1, max_size=5),
    count=st.none() | st.integers(0, 3),
    number=st.none() | st.floats(0, 1),
)
def test_every_brief_survives_its_text(style, palette, count, number):
    brief = DesignBrief(style=style, palette=palette, pictures=count, **dict.fromkeys(NUMBERS, number))
    assert brief_of(brief_text(brief)) == dataclasses.replace(brief)


@pytest.mark.parametrize("text", ["style", "energy much", "energy 2", "colour red", "text_blocks 1.5"])
def test_a_damaged_brief_is_named(text):
    with pytest.raises(UserError, match="in the metadata cannot be read"):
        brief_of(text)


def test_files_without_a_seed_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="has no seed in its metadata"):
        read_recipe(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_recipe(tmp_path / "text.png")
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_recipe(tmp_path / "missing.png")

"""The examples of each tab of the studio suit what the tab takes."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from pipelines.studio.examples import Examples
from pipelines.studio.image_parts import Controls, _class_ids, _colors
from pipelines.studio.models import Model
from pipelines.tools.generated import Generated
from pipelines.tools.grids import enlarged, plain_grid
from pipelines.tools.repeating import read_recipe
from tests.support.tiny_controlnets import CLASSES, MASKS, PICTURE, controlled, tiny_net
from tests.support.tiny_models import tiny_pipeline


def pixels(file: str) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_masks_are_white_on_black_and_those_of_text_differ_from_areas(tmp_path):
    examples = Examples(tmp_path)
    for files in (examples.masks, examples.of_control("masks", "text mask", []), examples.of_control("masks", "x", [])):
        assert len(files) == 3
        for file in files:
            assert set(np.unique(pixels(file))) == {0, 255}
            assert 0.05 < (pixels(file) == 255).mean() < 0.6
    assert examples.of_control("masks", "image mask (ControlNet 2)", []) == examples.masks
    assert not set(examples.masks) & set(examples.of_control("masks", "text mask", []))


def test_posters_are_not_drawings_of_other_things(tmp_path):
    examples = Examples(tmp_path)
    assert [Path(file).stem for file in examples.posters] == ["poster", "concert_poster", "exhibition_poster"]
    assert len({pixels(file).tobytes() for file in examples.posters}) == 3


@pytest.mark.parametrize("control", [MASKS, CLASSES, PICTURE], ids=lambda control: control["control_kind"])
def test_an_example_of_each_controlnet_steers_it(control, tmp_path):
    base = tiny_pipeline()
    model = Model("model", controlled(base, tiny_net(base, control=control)))
    with gr.Blocks():
        part = Controls(model, Examples(tmp_path))
    names = control["control_names"] if control is MASKS else ("",)
    files = [
        Examples(tmp_path).of_control(control["control_kind"], name, _colors(part.nets[0].config)) for name in names
    ]
    assert len(files) == part.canvases
    for chosen in zip(*files):
        drawn = [part._shown(control["control_kind"], Image.open(file).convert("RGB")) for file in chosen]
        made = part.made([*drawn, 1, 0, 1], 2)
        assert made.arguments["control_image"].std() > 0.05, chosen  # lines are faint in a model of 8 pixels
    if control is CLASSES:
        for (file,) in zip(*files):
            used = np.unique(np.asarray(_class_ids(Image.open(file), _colors(part.nets[0].config))))
            assert used.tolist() == [0, 1, 2]


def test_the_grid_is_that_of_sample_with_the_metadata_of_all_images(tmp_path):
    from pipelines.studio.generating import Files

    images = [Image.effect_noise((16, 16), 90).convert("RGB") for _ in range(3)]
    generated = Generated([images], [[4, 5, 6]], [{"prompt": "a red poster"}], {"model": "m"}, [[4, 5, 6]])
    paths, files = Files(tmp_path).save(generated)
    assert [Path(file).name for file in files] == [
        *(f"a-red-poster_seed{seed}.png" for seed in (4, 5, 6)),
        "a-red-poster_grid.png",
    ]
    assert files[:3] == paths
    sheet = plain_grid([[enlarged(image) for image in images]], ["a red poster"])
    assert pixels(files[3]).tobytes() == np.asarray(sheet).tobytes()
    assert (read_recipe(files[3]).seed, read_recipe(files[3]).num_images) == (4, 3)
    alone, files = Files(tmp_path).save(Generated([images[:1]], [[4]], [{}], {}))
    assert len(alone) == len(files) == 1

"""The studio generates the images of each tab again from their files, and says what it cannot repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from pipelines.studio.app import Studio
from pipelines.studio.models import Model
from pipelines.studio.parts import KEPT
from pipelines.tools.cli import UserError
from pipelines.tools.control_files import STEERING
from pipelines.tools.generated import save_image
from pipelines.tools.guides import GUIDANCE_OPTIONS
from pipelines.tools.image_files import IMAGE_OPTIONS
from pipelines.tools.repeating import FILES, NOT_REPEATED, SETTINGS, Recipe, read_recipe
from tests.support.tiny_published import PUBLISHED

KINDS = ("captioned_and_labelled", "unconditional", "two_controlnets", "poster_decoder", "image_caption")
# What a visitor sets, by the label of the control; everything else stays as it is when the page opens.
CHOSEN: dict[str, Any] = {
    "Prompt": "a red poster", "Negative prompt": "blue", "Class": "kind 1", "Number of images": 3, "Number of pairs": 3,
    "Seed": 5, "Steps": 3, "Guidance scale": 3.5, "Scheduler": "heun", "Strength": 0.4, "Repetitions of each step": 2,
    "Keep all other pixels exactly": False, "Strength of ControlNet 1": 0.5, "Strength of ControlNet 2": 1.5,
    "Starts at this share of the steps": 0.1, "Ends at this share of the steps": 0.7, "Text blocks": 2,
    "Caption to draw": "a red circle",
}  # fmt: skip


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def chosen(component: Any, values: dict[str, Any]) -> Any:
    """Return the value of a control as it arrives from the page of somebody who has chosen `values` and images."""
    layer = Image.new("RGBA", (64, 64))
    layer.paste((255, 255, 255, 255), (0, 0, 32, 64))
    if isinstance(component, gr.ImageEditor):
        return {"background": noise(1), "layers": [layer]}
    if isinstance(component, gr.Image):
        return None if "Mask" in component.label else noise(2)
    value = values.get(component.label, component.value)
    is_offered = not isinstance(component, gr.Dropdown) or value in [choice for _, choice in component.choices]
    return value if is_offered else component.value


def generated(tab: Any, values: dict[str, Any]) -> list[str]:
    """Return the files of the images that a tab generates."""
    inputs = [chosen(component, values) for component in tab.inputs]
    if hasattr(tab, "_generate"):
        *_, (_, files, _) = tab._generate(*inputs)
    else:
        _, files, _ = tab._draw(*inputs) if hasattr(tab, "_draw") else tab._invent(*inputs)
    return files


def studio_of(folder: Path, recipe: Recipe | None = None, **models: Any) -> Studio:
    studio = Studio([Model(name, pipeline) for name, pipeline in models.items()], None, folder, recipe)
    studio.build()
    return studio


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_each_tab_opens_this_tab_of_its_model_and_gives_the_same_image(kind, tmp_path):
    pipeline = PUBLISHED[kind]()
    models = {"other": pipeline, "mine": pipeline}  # the first of them could do it as well
    for opened in studio_of(tmp_path, **models).opened:
        if opened.tab.model.name == "other":
            continue
        *images, grid = generated(opened.tab, CHOSEN)
        assert len(images) == 3, opened.title
        again = studio_of(tmp_path, read_recipe(images[1]), **models)
        assert again.outer is not None
        assert (again.outer.selected, [one.inner.selected for one in again.opened if one.inner.selected]) == (
            "model-1", [opened.title] * sum(one.outer == "model-1" for one in again.opened)
        )  # fmt: skip
        tab = next(one.tab for one in again.opened if (one.outer, one.title) == ("model-1", opened.title))
        text, is_warning = tab.report(read_recipe(images[1]))
        assert (is_warning, "3 images are generated together" in text) == (False, True), (opened.title, text)
        assert "has the seed 6" in text
        for file, repeated in zip(images, generated(tab, {}), strict=False):
            assert Path(file).read_bytes() == Path(repeated).read_bytes(), (opened.title, file)
        tab.report(read_recipe(grid))


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"guidance_interval": "0.1 to 0.8"}, "guidance interval (0.1 to 0.8)"),
        ({"guide": "step-00001000", "autoguidance_scale": "2"}, "guide (step-00001000), autoguidance scale (2)"),
        ({"checkpoint": "best"}, "checkpoint (best)"),
        ({"lora": "a", "lora_scale": "0.5"}, "lora (a), lora scale (0.5)"),
        ({"guidance_scale": "30"}, "guidance scale (30)"),
        ({"num_inference_steps": "500"}, "num inference steps (500)"),
        ({"scheduler": "Unknown"}, "scheduler (Unknown)"),
        ({"class_label": "kind 7"}, "class label (kind 7)"),
        ({"brief": "text_blocks 2"}, "brief (text_blocks 2)"),
    ],
)
def test_settings_that_a_tab_cannot_set_are_named(settings, left_out, tmp_path):
    tab = studio_of(tmp_path, model=PUBLISHED["captioned_and_labelled"]()).opened[0].tab
    texts = {"model": "runs/model", "prompt": "a red poster", "num_inference_steps": "3", "guidance_scale": "2"}
    assert tab.report(Recipe(0, 1, texts)) == ("The settings of the file are set.", False)
    text, is_warning = tab.report(Recipe(0, 1, texts | settings))
    assert is_warning
    assert f"cannot set these settings of the file: {left_out}." in text


def test_another_model_another_tab_and_another_size_are_named(tmp_path):
    tabs = {one.title: one.tab for one in studio_of(tmp_path, mine=PUBLISHED["captioned_and_labelled"]()).opened}
    texts = {"model": "yours", "prompt": "a", "num_inference_steps": "3", "jump_n_sample": "2"}
    text, _ = tabs["Text to image"].report(Recipe(0, 1, texts, (32, 48)))
    assert "was generated by inpainting, which this tab does not do" in text
    assert "cannot set these settings of the file: jump n sample (2)." in text
    assert "was generated by the model yours, and this one is mine" in text
    height, width = tabs["Inpainting"].model.size()
    text, _ = tabs["Inpainting"].report(Recipe(0, 1, texts, (height, 2 * width)))
    assert "The image and its mask are not part of the file" in text
    assert f"cannot set these settings of the file: width ({2 * width})." in text


def test_settings_of_each_controlnet_are_set_if_the_tab_has_them(tmp_path):
    opened = studio_of(tmp_path, mine=PUBLISHED["two_controlnets"]()).opened
    tab = next(one.tab for one in opened if one.title == "Control")

    def steering(**texts: str) -> tuple[list[Any], str]:
        recipe = Recipe(0, 1, {"model": "mine", "control_image": "a.png", **texts})
        values = [value for value in tab.repeated(recipe)[:7] if value is not KEPT]
        return values, tab.report(recipe)[0].partition("of the file: ")[2]

    assert steering() == ([1, 1, 0, 1], "draw or upload them again.")
    assert steering(controlnet_conditioning_scale="0.5")[0] == [0.5, 0.5, 0, 1]
    values, text = steering(controlnet_conditioning_scale="0.5, 1.5", control_guidance_start="0.1, 0.2")
    assert values == [0.5, 1.5, 0.1, 1]
    assert "control guidance start (0.1, 0.2)." in text
    assert "scale (1, 1, 1)" in steering(controlnet_conditioning_scale="1, 1, 1")[1]
    with pytest.raises(UserError, match="strength of the control must be from 0 to 2; it is 3"):
        steering(controlnet_conditioning_scale="3, 1")


def test_a_file_that_no_tab_can_generate_again_is_refused(tmp_path):
    texts = {"model": "theirs", "prompt": "a", "num_inference_steps": "3", "control_image": "a.png"}
    with pytest.raises(UserError, match="none of the models takes, or in a way .* generated it .theirs. as --model"):
        studio_of(tmp_path, Recipe(0, 1, texts), mine=PUBLISHED["captioned_and_labelled"]())
    with pytest.raises(UserError, match="none of the models takes"):
        studio_of(tmp_path, Recipe(0, 1, {"brief": "text_blocks 2"}), mine=PUBLISHED["labelled"]())


def test_every_setting_of_sample_is_known():
    """Each is set, named as left out, or the name of a file; a new option must be added to one of these."""
    options = {"negative_prompt", "guidance_scale", *STEERING, *GUIDANCE_OPTIONS, *IMAGE_OPTIONS, "control_image"}
    assert options <= {*SETTINGS, *FILES}
    assert set(NOT_REPEATED) <= set(SETTINGS)


def test_a_size_follows_from_what_is_written_and_not_from_an_enlarged_image(tmp_path):
    for written, size in [({}, None), ({"width": "24"}, (16, 24)), ({"height": "8", "width": "0"}, (8, 12))]:
        save_image(Image.new("RGB", (96, 64)), tmp_path / "a.png", {"seed": "1", **written})
        assert read_recipe(tmp_path / "a.png").size == size

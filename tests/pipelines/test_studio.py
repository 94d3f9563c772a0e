"""The studio as a person uses it, in a real browser: every tab, wrong inputs, several people at once.

Two studios are open for all tests: one with a tiny model of each kind and training runs, and one with a single larger
model, which opens with the settings of an image and whose folder is deleted. Each test has a page of its own.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect

from pipelines import sample
from pipelines.tools.generated import save_image
from tests.support.browser import DOWNLOADS, SECONDS, Visitor, chromium, needs_chromium, studio
from tests.support.tiny_models import larger_pipeline
from tests.support.tiny_published import PUBLISHED
from tests.support.toy_runs import run_of
from training.core.locks import FolderLock

PNG_FILE = "PNG file of the studio or of sample.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_chromium]

TABS = {
    "captioned_and_labelled": ["Text to image", "Image to image", "Inpainting"],
    "labelled": ["Class to image", "Image to image", "Inpainting"],
    "distilled": ["Text to image", "Image to image", "Inpainting"],
    "two_controlnets": ["Text to image", "Control", "Image to image", "Inpainting"],
    "poster_decoder": ["Brief to poster", "Image to image", "Inpainting"],
    "image_caption": ["Caption", "Draw", "Invent"],
    "layout_analysis": ["Analyse"],
}
TEXT = "captioned_and_labelled"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model of each kind and two training runs."""
    folder = run_of(tmp_path_factory, ()).parent
    shutil.copytree(folder / "run", folder / "other")
    place = folder.parent / "place"
    place.mkdir()
    shutil.move(folder, place / "runs")
    for name in TABS:
        PUBLISHED[name]().save_pretrained(place / name)
    for name, color in {"epoch_0001": "red", "epoch_0002": "blue"}.items():
        Image.new("RGB", (16, 16), color).save(place / "runs/run/samples" / f"{name}.png")
    return place


@pytest.fixture(scope="module")
def address(place) -> Iterator[str]:
    with studio("--model", *TABS, "--runs", "runs", cwd=place) as address:
        yield address


@pytest.fixture(scope="module")
def repeated(tmp_path_factory) -> Iterator[tuple[str, Any]]:
    """A studio with one larger model that opens with the settings of an image of sample.py, and this image. The folder
    of the model is deleted as soon as the studio is open."""
    folder = tmp_path_factory.mktemp("one")
    larger_pipeline().save_pretrained(folder / "model")
    words = ("--prompt", "a red poster", "--seed", "3", "--num_inference_steps", "3", "--width", "48")
    with contextlib.chdir(folder):
        sample.main(["--model", "model", *words, "--device", "cpu", "--output", "images/"])
    with studio("--model", "model", "--from_png", "images/1_a-red-poster_seed5.png", cwd=folder) as address:
        shutil.rmtree(folder / "model")
        with Image.open(folder / "images/1_a-red-poster_seed5.png") as image:
            image.load()
        yield address, image


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visitor(browser, address) -> Iterator[Visitor]:
    """A page of the studio with all models. In the end, every control that is visible must have a name."""
    visitor = Visitor(browser, address)
    yield visitor
    visitor.wait_for_names()
    visitor.close()
    assert visitor.problems == []


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """An image with another aspect ratio than the models, of noise, so that each of its pixels is recognised."""
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((180, 120), Image.Resampling.NEAREST).save(path)
    return path


def pipeline_of(kind: str) -> Any:
    return PUBLISHED[kind]()


def seeds(first: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def test_each_model_has_its_tabs(visitor):
    for model, titles in TABS.items():
        visitor.open(model)
        shown = visitor.page.locator("[role=tab]:visible").all_inner_texts()
        assert [title for title in shown if title not in (*TABS, "Training runs")] == titles


def test_text_and_class_give_the_images_of_the_pipeline_with_their_settings(visitor):
    visitor.open(TEXT, "Text to image")
    visitor.write("Prompt", "a red poster")
    visitor.write("Negative prompt", "blue")
    visitor.set_slider("Number of images", 2)
    visitor.set_number("Seed", 5)
    visitor.press("Generate")
    visitor.wait_for_status("2 images in")
    image = visitor.download(1)
    assert image.text.items() >= {
        "prompt": "a red poster", "negative_prompt": "blue", "seed": "6", "guidance_scale": "2.5",
        "num_inference_steps": "25", "model": TEXT, "scheduler": "FlowMatchEulerDiscreteScheduler",
        "height": str(image.height), "width": str(image.width),
    }.items()  # fmt: skip
    expected = pipeline_of(TEXT)(
        ["a red poster"] * 2, negative_prompt="blue", guidance_scale=2.5, generator=seeds(5, 2)
    ).images
    assert image.tobytes() == expected[1].tobytes()
    assert image.tobytes() != expected[0].tobytes()


def test_examples_fill_the_controls_and_a_class_is_enough(visitor):
    visitor.open("labelled", "Class to image")
    visitor.page.get_by_role("button", name="kind 1").first.click()
    expect(visitor.field("Class")).to_have_value("kind 1", timeout=1000 * SECONDS)
    visitor.press("Generate")
    visitor.wait_for_status("4 images in")
    image = visitor.download()
    assert image.text["class_label"] == "kind 1"
    expected = pipeline_of("labelled")(class_labels=1, guidance_scale=2.5, generator=seeds(0, 1)).images[0]
    assert image.tobytes() == expected.tobytes()


def test_images_appear_while_they_are_denoised_and_stop_ends_it(browser, repeated):
    visitor = Visitor(browser, repeated[0])
    visitor.set_slider("Number of images", 16)
    visitor.unfold("Sampling")
    visitor.set_slider("Steps", 200)
    visitor.press("Generate")
    status = visitor.wait_for_status(r"Step \d+ of 200")
    assert 0 < int(re.findall(r"\d+", status)[0]) < 200
    expect(visitor.group("Text to image: images").locator("img")).to_have_count(16, timeout=1000 * SECONDS)
    visitor.press("Stop")
    visitor.wait_for_status("Stopped")
    assert visitor.group(DOWNLOADS).get_by_role("link").count() == 0
    visitor.set_slider("Number of images", 1)
    visitor.set_slider("Steps", 2)
    visitor.press("Generate")
    visitor.wait_for_status("1 images in")
    visitor.close()
    assert visitor.problems == []


def test_the_keyboard_is_enough_and_a_distilled_model_takes_its_steps(visitor):
    visitor.open("distilled", "Text to image")
    visitor.control("textbox", "Prompt").focus()
    visitor.page.keyboard.type("a blue poster")
    for _ in range(40):
        visitor.page.keyboard.press("Tab")
        if visitor.page.evaluate("document.activeElement.innerText") == "Generate":
            break
    visitor.page.keyboard.press("Enter")
    visitor.wait_for_status("4 images in")
    assert visitor.download().text.items() >= {"prompt": "a blue poster", "num_inference_steps": "3"}.items()


def test_an_image_is_changed(visitor, picture):
    visitor.open(TEXT, "Image to image")
    visitor.press("Generate")
    visitor.wait_for_message("no image is chosen")
    visitor.upload_image("Image to change", picture)
    visitor.set_slider("Strength", 0.4)
    visitor.set_slider("Number of images", 2)
    visitor.press("Generate")
    visitor.wait_for_status("2 images in")
    image = visitor.download(1)
    assert image.text["strength"] == "0.4"
    with Image.open(picture) as start:
        expected = pipeline_of(TEXT)(
            image=start.convert("RGB"), strength=0.4, generator=seeds(0, 2), guidance_scale=2.5, num_images_per_prompt=2
        ).images[1]
    assert image.tobytes() == expected.tobytes()


def test_the_painted_part_of_an_image_is_filled_and_the_rest_is_kept(visitor, picture):
    visitor.open("poster_decoder", "Inpainting")
    visitor.upload_to_canvas("Image to fill", picture)
    visitor.set_slider("Number of images", 1)
    visitor.press("Generate")
    visitor.wait_for_message("nothing is painted")
    visitor.paint("Paint the part to fill")
    visitor.press("Generate")
    visitor.wait_for_status("1 images in")
    filled = np.asarray(visitor.download()).astype(int)
    with Image.open(picture) as start:
        side = min(start.size)
        left = (start.width - side) // 2
        middle = start.convert("RGB").crop((left, 0, left + side, side))
    kept = middle.resize(filled.shape[1::-1], Image.Resampling.LANCZOS)
    difference = np.abs(filled - np.asarray(kept).astype(int)).max(axis=-1)
    height, width = difference.shape
    assert difference[height // 2 - 1 : height // 2 + 1, width // 2].max() > 40
    # The canvas is an enlarged copy, so kept pixels differ by little from the image in the size of the model.
    assert np.median(difference[: height // 4]) < np.median(difference[height // 2])


def test_controls_are_drawn_for_each_controlnet(visitor, picture):
    visitor.open("two_controlnets", "Control")
    visitor.set_slider("Number of images", 2)
    visitor.press("Generate")
    visitor.wait_for_message("every canvas is empty")
    visitor.paint("Draw: text mask (ControlNet 1)")
    visitor.press("Generate")
    visitor.wait_for_status("2 images in")
    drawn = visitor.download(1)
    assert drawn.text["controlnet_conditioning_scale"] == "1, 1"
    visitor.unfold("Upload instead of drawing: control image")
    visitor.upload_to_canvas("Upload: control image (ControlNet 2)", picture)
    visitor.generate_others()
    assert visitor.download(1).tobytes() != drawn.tobytes()
    visitor.unfold("Strength of the control")
    visitor.control("slider", "range slider for Ends at").scroll_into_view_if_needed()
    # The canvases are far above, and the button stays beside what is seen.
    expect(visitor.page.get_by_role("button", name="Generate", exact=True).first).to_be_in_viewport(ratio=1)
    for number in (1, 2):
        visitor.set_slider(f"Strength of ControlNet {number}", 0)
    visitor.generate_others()
    plain = pipeline_of("two_controlnets")(num_images_per_prompt=2, generator=seeds(0, 2), guidance_scale=2.5).images
    assert visitor.download(1).tobytes() == plain[1].tobytes()


def test_a_brief_is_set_by_hand_by_an_example_and_at_random(visitor):
    visitor.open("poster_decoder", "Brief to poster")
    visitor.set_slider("Text blocks", 2)
    visitor.set_slider("Number of images", 1)
    visitor.press("Generate")
    visitor.wait_for_status("1 images in")
    image = visitor.download()
    assert image.text["brief"] == "text_blocks 2"
    expected = pipeline_of("poster_decoder")(
        {"text_blocks": 2}, num_inference_steps=25, guidance_scale=2.5, generator=seeds(0, 1)
    ).images[0]
    assert image.tobytes() == expected.tobytes()
    briefs = set()
    for name in ("Random brief", "Random brief", "swiss"):
        visitor.press_and_wait_for_settings(name)
        visitor.generate_others()
        briefs.add(visitor.download().text["brief"])
    assert len(briefs) == 3
    assert all("palette #" in brief for brief in briefs)


def test_captions_drawings_and_inventions(visitor, picture):
    visitor.open("image_caption", "Caption")
    visitor.press("Caption")
    visitor.wait_for_message("no image is chosen")
    visitor.upload_image("Image to caption", picture)
    visitor.set_slider("Beams", 4)
    visitor.press("Caption")
    pipeline = pipeline_of("image_caption")
    with Image.open(picture) as image:
        expected = pipeline.caption([image.convert("RGB")], num_beams=4)[0]
    assert expected
    result = visitor.page.get_by_role("textbox", name="Caption", exact=True)
    expect(result).to_have_value(expected, timeout=1000 * SECONDS)
    visitor.wait_for_names()
    visitor.open("Draw")
    visitor.press("Draw")
    visitor.wait_for_message("the caption is empty")
    visitor.write("Caption to draw", "a red circle")
    visitor.press("Draw")
    visitor.wait_for_status("4 images")
    drawn = pipeline.draw(["a red circle"] * 4, generator=seeds(0, 4)).images
    assert visitor.download(3).tobytes() == drawn[3].tobytes()
    visitor.wait_for_names()
    visitor.open("Invent")
    visitor.press("Invent")
    pairs = pipeline.sample(4, generator=seeds(0, 4), num_inference_steps=50)
    image = visitor.download(2)
    assert image.tobytes() == pairs.images[2].tobytes()
    assert image.text["caption"] == pairs.captions[2]


def test_a_poster_is_analysed(visitor, picture):
    visitor.open("layout_analysis", "Analyse")
    visitor.press("Analyse")
    visitor.wait_for_message("no image is chosen")
    visitor.page.get_by_role("button", name="Poster", exact=True).first.click()
    visitor.group("Poster to analyse").locator("img").first.wait_for()
    visitor.press("Analyse")
    visitor.group("Report").locator("img").first.wait_for()
    visitor.page.get_by_text("grammar symmetry").first.wait_for()
    visitor.page.get_by_text("colour role shares ink").first.wait_for()


def test_runs_are_compared_followed_and_may_disappear(visitor, place):
    visitor.open("Training runs")
    visitor.wait_for_status("other: complete")
    visitor.choose("Run", "run")
    visitor.wait_for_status("run: complete")
    visitor.choose("Compare with", "other")
    visitor.wait_for_status("other: complete")
    visitor.page.get_by_text("run: epoch 2").first.wait_for()
    slider = visitor.page.get_by_role("slider", name=re.compile("Samples")).first
    slider.focus()
    slider.press("Home")
    visitor.page.get_by_text("run: epoch 1").first.wait_for()
    visitor.page.get_by_text("Epoch 1 (1 of 2)").first.wait_for()
    slider.press("End")
    visitor.page.get_by_text("run: epoch 2").first.wait_for()
    with FolderLock(place / "runs/run/.lock", "another test is training"):
        visitor.wait_for_status("run: is training now")
        with (place / "runs/run/metrics.csv").open("a", encoding="utf-8") as table:
            table.write("4321,5\n")
        visitor.wait_for_status("step: 4,321")
        Image.new("RGB", (16, 16), "green").save(place / "runs/run/samples/epoch_0003.png")
        visitor.page.get_by_text("run: epoch 3").first.wait_for()
    shutil.rmtree(place / "runs/other")
    visitor.choose("Compare with", "no second run")
    visitor.choose("Run", "other")
    visitor.wait_for_message("the run other is no longer there")
    visitor.press("Refresh the list of runs")
    visitor.wait_for_status("run: (complete|was training)")


def text_file(path: Path) -> None:
    path.write_text("this is a text\n" * 100, encoding="utf-8")


def damaged_file(path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue()[:9000])


def huge_file(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


def test_wrong_uploads_are_messages_and_the_studio_goes_on(browser, address, tmp_path):
    """Chromium cannot show these files either, which may be an error in the page; what counts is the message."""
    visitor = Visitor(browser, address)
    for model, tab, label, button, write, message in [
        (TEXT, "Image to image", "Image to change", "Generate", text_file, "cannot be read as an image"),
        ("poster_decoder", "Inpainting", "Image to fill", None, damaged_file, "cannot be read as an image"),
        ("layout_analysis", "Analyse", "Poster to analyse", "Analyse", huge_file, "far too many pixels|, and at most"),
    ]:
        file = tmp_path / f"{write.__name__}.png"
        write(file)
        visitor.open(model, tab)
        visitor.upload_image(label, file)
        if button is not None:
            visitor.press(button)
        visitor.wait_for_message(message)
    visitor.close()
    visitor = Visitor(browser, address)
    visitor.open("labelled", "Class to image")
    visitor.press("Generate")
    visitor.wait_for_status("4 images in")
    visitor.close()


def test_wrong_settings_and_a_foreign_png_are_messages(visitor, picture):
    visitor.open(TEXT, "Text to image")
    visitor.write("Negative prompt", "blue")
    visitor.unfold("Sampling")
    visitor.set_slider("Guidance scale", 1)
    visitor.press("Generate")
    visitor.wait_for_message("'Negative prompt' needs a 'Guidance scale' above 1")
    visitor.write("Negative prompt", "")
    visitor.set_number("Height in pixels", 17)
    visitor.press("Generate")
    visitor.wait_for_message("'Height in pixels' must be a multiple of")
    visitor.set_number("Height in pixels", 100_000)
    visitor.press("Generate")
    visitor.wait_for_message("height must be from 1 to")
    visitor.unfold("Repeat an image")
    visitor.press("Use its settings")
    visitor.wait_for_message("no PNG file is chosen")
    visitor.upload_file(PNG_FILE, picture)
    visitor.press("Use its settings")
    visitor.wait_for_message("has no seed in its metadata")


def test_two_people_at_once_get_their_own_images(browser, address):
    visitors = [Visitor(browser, address) for _ in range(2)]
    for number, visitor in enumerate(visitors):
        visitor.open("poster_decoder", "Brief to poster")
        visitor.set_slider("Number of images", 8)
        visitor.set_number("Seed", 100 * number)
    for visitor in visitors:
        visitor.press("Generate")
    for number, visitor in enumerate(visitors):
        visitor.wait_for_status("8 images in")
        assert visitor.download().text["seed"] == str(100 * number)
        visitor.close()


def test_an_image_is_repeated_from_its_file_in_the_page(browser, address, visitor, tmp_path):
    first = Visitor(browser, address)
    first.open(TEXT, "Text to image")
    first.write("Prompt", "a red poster")
    first.set_number("Seed", 3)
    first.unfold("Sampling")
    first.set_slider("Steps", 7)
    first.set_number("Width in pixels", 48)
    first.press("Generate")
    first.wait_for_status("4 images in")
    image = first.download(2)
    first.close()
    assert (image.text["seed"], image.text["batch_seeds"]) == ("5", "3, 4, 5, 6")
    save_image(image, tmp_path / "mine.png", image.text)
    visitor.open(TEXT, "Text to image")
    visitor.set_slider("Number of images", 1)
    visitor.unfold("Repeat an image")
    visitor.upload_file(PNG_FILE, tmp_path / "mine.png")
    visitor.press_and_wait_for_settings("Use its settings")
    assert_repeated(visitor, image)


def test_the_studio_opens_with_the_settings_of_an_image_and_its_model_may_be_deleted(browser, repeated):
    address, image = repeated
    visitor = Visitor(browser, address)
    assert_repeated(visitor, image)
    visitor.close()
    assert visitor.problems == []


def test_the_studio_opens_with_the_tab_and_the_model_of_an_image(browser, place, tmp_path):
    steering = {"controlnet_conditioning_scale": "0.5, 1.5", "guidance_interval": "0.1 to 0.8"}
    settings = {
        "model": "two_controlnets",
        "prompt": "a red poster",
        "seed": "3",
        "num_inference_steps": "3",
        **steering,
    }
    save_image(Image.new("RGB", (16, 16)), tmp_path / "mine.png", settings)
    models = [str(place / name) for name in (TEXT, "two_controlnets")]
    with studio("--model", *models, "--from_png", "mine.png", cwd=tmp_path) as address:
        visitor = Visitor(browser, address)
        visitor.wait_for_message("draw or upload them again.*cannot set.*guidance interval")
        for title in ("two_controlnets", "Control"):
            expect(visitor.page.get_by_role("tab", name=title, exact=True)).to_have_attribute("aria-selected", "true")
        expect(visitor.control("textbox", "Prompt")).to_have_value("a red poster")
        visitor.unfold("Strength of the control")
        slider = visitor.control("slider", "range slider for Strength of ControlNet 2")
        expect(slider).to_have_value("1.5")
        visitor.close()
    assert visitor.problems == []


def assert_repeated(visitor: Visitor, image: Any) -> None:
    """Generate with the settings of the page; the third image must have the pixels and the metadata of `image`."""
    visitor.press("Generate")
    visitor.wait_for_status("4 images in")
    again = visitor.download(2)
    assert again.size == (48, image.height)
    assert again.text.items() >= image.text.items()
    assert again.tobytes() == image.tobytes()

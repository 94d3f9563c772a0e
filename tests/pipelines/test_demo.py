"""The command of the studio: its flags, and what a browser may send."""

from __future__ import annotations

import errno
import io
import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from PIL import Image

from pipelines import demo
from pipelines.common.design_brief import DesignBrief
from pipelines.studio.app import Studio
from pipelines.studio.bounds import (
    LABELS,
    MOST_PROMPT_CHARACTERS,
    in_range,
    message_of,
    plainly,
    text_of,
    upload,
    whole,
)
from pipelines.studio.brief_part import Brief
from pipelines.studio.components import on_canvas, painted, strokes
from pipelines.studio.generating import Files, GeneratingTab
from pipelines.studio.models import Model, load_models
from pipelines.studio.parts import Sampling
from pipelines.studio.running import generate
from pipelines.tools.cli import UserError
from pipelines.tools.repeating import GENERATION, Recipe, read_recipe
from tests.support.runs import ROOT, environment
from tests.support.tiny_published import PUBLISHED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("autoencoder", "labelled"):
        PUBLISHED[name]().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs something to show; add --model, --runs, or both"),
        (["--runs", "missing"], "--runs missing is not a folder"),
        (["--model", "x", "--port", "70000"], "--port must be from 0 to 65535, but is 70000"),
        (["--runs", ".", "--from_png", "x.png"], "--from_png has no effect without --model"),
        (["--model", "x", "--from_png", "missing.png"], "missing.png cannot be read as an image"),
        (["--modle", "x"], "did you mean 'model'"),
    ],
)
def test_wrong_flags_are_named(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        demo.main(words)


def test_it_listens_on_this_machine_only_by_default():
    assert demo.parse_arguments(["--model", "x"]).host == "127.0.0.1"


def test_models_without_a_tab_and_missing_ones_are_named(folder):
    with pytest.raises(UserError, match="is a AutoencoderPipeline, for which the studio has no tab"):
        load_models([str(folder / "autoencoder")], "cpu")
    with pytest.raises(UserError, match="found no pipeline, run or checkpoint"):
        load_models([str(folder / "missing")], "cpu")


def test_two_models_of_the_same_name_are_told_apart(folder):
    names = [model.name for model in load_models([str(folder / "labelled")] * 2, "cpu")]
    assert len(set(names)) == 2


@pytest.mark.slow
def test_a_port_in_use_is_a_user_error(folder):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = str(used.getsockname()[1])
        done = subprocess.run(
            [sys.executable, str(ROOT / "pipelines/demo.py"), "--model", str(folder / "labelled"), "--port", port],
            env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
        )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr[-2000:]
    assert f"--port {port} on 127.0.0.1 cannot be used" in done.stderr


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "3", True, -1, 17])
def test_numbers_out_of_range_are_refused(value):
    with pytest.raises(UserError, match="the number of images must be"):
        whole("the number of images", value, 0, 16)
    with pytest.raises(UserError):
        in_range("the number of images", value, 0, 16)


def test_numbers_and_texts_in_range_are_kept():
    assert (whole("steps", 3.0, 1, 5), in_range("scale", 2.5, 1, 5), text_of("the prompt", " a ")) == (3, 2.5, "a")
    with pytest.raises(UserError, match="must be a whole number; it is 2.5"):
        whole("the seed", 2.5, 0, 5)
    with pytest.raises(UserError, match="the prompt has 1,001 characters"):
        text_of("the prompt", "x" * (MOST_PROMPT_CHARACTERS + 1))


def test_an_upload_is_upright_and_in_rgb(tmp_path):
    image = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    read = upload(tmp_path / "a.png")
    assert (read.mode, read.size, read.getpixel((0, 0))) == ("RGB", (10, 20), (255, 255, 255))


@pytest.mark.parametrize("kind", ["text", "cut", "huge", "missing", "eps"])
def test_wrong_uploads_are_refused_in_plain_words(kind, tmp_path):
    file = tmp_path / "a.png"
    if kind == "text":
        file.write_text("text")
    elif kind == "cut":
        buffer = io.BytesIO()
        Image.effect_noise((100, 100), 90).save(buffer, "PNG")
        file.write_bytes(buffer.getvalue()[:3000])
    elif kind == "huge":
        Image.new("1", (20_000, 20_000)).save(file)
    elif kind == "eps":
        Image.new("RGB", (8, 8)).save(file, "EPS")
    message = "too many pixels" if kind == "huge" else "cannot be read as an image"
    with pytest.raises(UserError, match=message):
        upload(file)
    with pytest.raises(UserError, match="no image is chosen"):
        upload(None)


def full_disk() -> UserError:
    """What `save_image` raises, in the words of the command line."""
    error = UserError("--output /srv/images/1.png cannot be written (No space left on device); free space")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/srv/images/1.png")
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("--model x is wrong"), "--model x is wrong"),
        (MemoryError(), "There is not enough memory for this"),
        (RuntimeError("CUDA out of memory. Tried"), "There is not enough memory for this"),
        (FileNotFoundError(2, "No such file or directory", "x"), "A file cannot be read or written (No such file"),
        (KeyError("x"), "Something went wrong ('x')"),
        (
            ValueError("`negative_prompt` needs a `guidance_scale` above 1"),
            "'Negative prompt' needs a 'Guidance scale'",
        ),
        (ValueError("`mask_image` is empty: no pixel of it is white"), "Mask image is empty: no pixel of it is white"),
        (UserError("run `pip install scipy`"), "Run `pip install scipy`"),
        (full_disk(), "A file cannot be read or written (No space left on device)"),
    ],
)
def test_errors_become_messages(error, text):
    assert str(message_of(error).message).startswith(text)

    def fails():
        raise error

    def fails_later():
        yield 1
        raise error

    with pytest.raises(gr.Error):
        plainly(fails)()
    results = plainly(fails_later)()
    assert next(results) == 1
    with pytest.raises(gr.Error):
        next(results)


def test_what_is_painted_covers_the_background():
    background, layer = Image.new("RGB", (40, 20), "blue"), Image.new("RGBA", (40, 20))
    assert strokes(None) is None
    assert strokes({"background": background, "layers": [layer, None]}) is None
    layer.paste((255, 255, 255, 255), (0, 0, 20, 20))
    value = {"background": background, "layers": [layer]}
    assert strokes(value).getbbox() == (0, 0, 20, 20)
    image = painted(value, (10, 20))
    assert (image.getpixel((5, 5)), image.getpixel((30, 5))) == ((255, 255, 255), (0, 0, 255))
    assert painted({"background": None, "layers": []}, (10, 20)).getcolors(1)[0][1] == (0, 0, 0)
    assert on_canvas(Image.new("RGB", (300, 100)), (64, 32)).size == (256, 512)


@pytest.mark.parametrize("seed", range(5))
def test_a_brief_survives_its_controls(seed):
    with gr.Blocks():
        part = Brief()
    brief = DesignBrief.random(seed)
    assert part.brief(part.values_of(brief)) == brief
    assert part.brief(part.values_of(DesignBrief())) == DesignBrief()
    values = part.values_of(DesignBrief(palette=["#102030"]))
    values[2] = "rgba(16.4, 31.9, 48, 1)"  # as a colour picker writes it
    assert part.brief(values).palette == ("#102030",)
    values[2] = "no colour"
    with pytest.raises(UserError, match="the brief cannot be used: .*is not a colour"):
        part.brief(values)
    values = part.values_of(DesignBrief())
    values[part.components.index(part.counts[0])] = 999
    with pytest.raises(UserError, match="the brief cannot be used: 'Text blocks' must be a whole number from 0 to"):
        part.brief(values)


def test_a_generation_that_nobody_waits_for_ends(folder):
    (model,) = load_models([str(folder / "labelled")], "cpu")
    arguments = {"num_inference_steps": 1000, "num_images_per_prompt": 16}
    own = model.pipeline.scheduler
    shown = generate(model, arguments, "ddim")
    first = next(shown)
    assert first.step < 1000
    assert len(first.images) == 16
    shown.close()
    with model.used() as pipeline:  # waits for the end of its current step
        assert pipeline.scheduler is own
        assert pipeline.num_timesteps == 1000
        assert pipeline.interrupt
    *_, last = generate(model, {**arguments, "num_inference_steps": 2})
    assert (last.done, len(last.images)) == (True, 16)
    with pytest.raises(ValueError, match="num_inference_steps"):
        list(generate(model, {"num_inference_steps": 0}))


def test_arguments_in_messages_have_the_labels_of_the_page(tmp_path):
    """Every label that a message can name is one that the page shows, and what the pipelines refuse is named by it."""
    labels = set()
    for kind in ("captioned_and_labelled", "two_controlnets", "image_caption"):
        page = Studio([Model(kind, PUBLISHED[kind]())], None, tmp_path).build()
        labels |= {getattr(block, "label", None) for block in page.blocks.values()}
    assert set(LABELS.values()) <= labels
    with gr.Blocks():
        tab = GeneratingTab("x", GENERATION, Model("m", PUBLISHED["captioned"]()), [], Files(tmp_path))
    values = {component.label: value_of(component) for component in tab.inputs}
    with pytest.raises(gr.Error, match="'Height in pixels' must be a multiple of 2"):
        list(plainly(tab._generate)(*(values | {"Height in pixels": 3}).values()))
    control = Studio([Model("m", PUBLISHED["controlnet"]())], None, tmp_path)
    with gr.Blocks():
        tab = control._tabs(control.models[0])["Control"]()
    values = {component.label: value_of(component) for component in tab.inputs}
    start, end = "Starts at this share of the steps", "Ends at this share of the steps"
    with pytest.raises(gr.Error, match=f"'{start}' must be below '{end}'"):
        list(plainly(tab._generate)(*(values | {start: 0.5, end: 0.2}).values()))


def test_uploaded_files_are_named_without_the_folder_of_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    file = tmp_path / ("a" * 64) / "my image.png"
    file.parent.mkdir()
    Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(gr.Error) as error:
        plainly(read_recipe)(file)
    assert str(error.value.message).startswith("My image.png has no seed in its metadata")


GENERATING = (
    "captioned", "labelled", "distilled", "unconditional", "controlnet", "two_controlnets", "poster_decoder",
    "poster_controlnet",
)  # fmt: skip


@pytest.mark.parametrize("kind", GENERATING)
def test_every_tab_generates_the_number_of_images_that_is_set(kind, tmp_path):
    """With the settings that the page opens with: no prompt, no class, an empty brief."""
    model = Model(kind, PUBLISHED[kind]())
    studio = Studio([model], None, tmp_path)
    for title, make in studio._tabs(model).items():
        with gr.Blocks():
            tab = make()
        values = [value_of(component) for component in tab.inputs]
        *_, (images, files, text) = tab._generate(*values)
        assert (len(images), len(files)) == (3, 4), title
        assert text.startswith("3 images in")
        assert [path for path, _ in images] == files[:3]
        assert len({Path(file).read_bytes() for file in files}) == 4


def test_a_distilled_model_opens_with_its_steps_and_without_guidance(tmp_path):
    model = Model("m", PUBLISHED["distilled"]())
    assert model.distilled
    for title, make in Studio([model], None, tmp_path)._tabs(model).items():
        with gr.Blocks():
            tab = make()
        shown = {component.label: component for component in tab.inputs}
        assert "Negative prompt" not in shown, title
        assert (shown["Steps"].value, shown["Guidance scale"].visible) == (3, False)
        values = {label: value_of(component) for label, component in shown.items()} | {"Steps": 3}
        # A page that was opened before, or a request that is written by hand, may send another scale.
        *_, (_, files, _) = tab._generate(*(values | {"Guidance scale": 7.0}).values())
        assert Image.open(files[0]).text["guidance_scale"] == "1"
    recipe = Recipe(0, texts={"guidance_scale": "2.5"})
    assert tab.sampling.repeated(recipe)[2:4] == [3, 1.0]
    others = Model("m", PUBLISHED["captioned"]())
    with gr.Blocks():
        usual = Sampling(others)
    assert not others.distilled
    assert usual.repeated(recipe)[2:4] == usual.repeated(Recipe(0))[2:4] == [25, 2.5]


def test_a_distilled_model_gives_the_images_of_its_pipeline(tmp_path):
    model = Model("m", PUBLISHED["distilled"]())
    with gr.Blocks():
        tab = Studio([model], None, tmp_path)._tabs(model)["Text to image"]()
    values = {component.label: component.value for component in tab.inputs} | {"Prompt": "a red poster"}
    *_, (_, files, _) = tab._generate(*values.values())
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    expected = PUBLISHED["distilled"]()(["a red poster"] * 4, generator=generators).images
    *images, _ = files  # the last one is the grid
    assert [Image.open(file).tobytes() for file in images] == [image.tobytes() for image in expected]


def value_of(component: gr.components.Component) -> Any:
    """Return the value of a control as it arrives from the page, which has been opened, and where images are chosen."""
    layer = Image.new("RGBA", (64, 64))
    layer.paste((255, 255, 255, 255), (0, 0, 32, 64))
    if isinstance(component, gr.ImageEditor):
        return {"background": Image.new("RGB", (64, 64)), "layers": [layer]}
    if isinstance(component, gr.Image):
        return None if "Mask" in component.label else Image.effect_noise((64, 64), 90).convert("RGB")
    return {"Number of images": 3, "Steps": 2}.get(component.label, component.value)

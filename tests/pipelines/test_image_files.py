"""The options of sample.py that start from an image."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.sample import main
from pipelines.tools.cli import UserError
from tests.pipelines.test_from_an_image import noise_image, upper_half
from tests.support.runs import ROOT
from tests.support.tiny_captions import tiny_caption_pipeline
from tests.support.tiny_models import tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    tiny_pipeline("flow_prediction").save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    noise_image().save("photo.png")
    upper_half().save("mask.png")
    upper_half(16).save("large.png")
    Image.new("L", (8, 8)).save("empty.png")
    noise_image(16).resize((16, 8)).save("wide.png")
    Path("words.png").write_text("hello", encoding="utf-8")
    return tmp_path


def sampled(model: Path, *options: str) -> tuple[np.ndarray, dict[str, str]]:
    """Return the image of one prompt, and its metadata."""
    common = ("--model", str(model), "--prompt", "a red poster", "--num_images", "1", "--num_inference_steps", "4")
    main([*common, "--scale", "1", "--no_titles", "--output", "images/", *options])
    newest = max(Path("images").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with Image.open(newest) as image:
        return np.asarray(image), dict(image.text)


def test_an_image_with_a_strength_and_with_a_mask(model, files):
    given = np.asarray(Image.open("photo.png"))
    plain, text = sampled(model)
    assert not {"image", "strength", "mask_image"} & text.keys()
    changed, text = sampled(model, "--image", "photo.png", "--strength", "0.5")
    assert (text["image"], text["strength"]) == ("photo.png", "0.5")
    assert not np.array_equal(changed, plain)
    whole, _ = sampled(model, "--image", "photo.png", "--strength", "1")
    assert np.array_equal(whole, plain)
    masked = ("--image", str(files / "photo.png"), "--mask_image", str(files / "mask.png"), "--jump_n_sample", "2")
    filled, text = sampled(model, *masked, "--paste_back", "true")
    assert np.array_equal(filled[4:], given[4:])
    assert not np.array_equal(filled[:4], given[:4])
    facts = {name: text[name] for name in ("image", "mask_image", "jump_n_sample", "paste_back")}
    assert facts == {"image": "photo.png", "mask_image": "mask.png", "jump_n_sample": "2", "paste_back": "true"}
    assert not np.array_equal(sampled(model, *masked)[0][4:], given[4:])


def test_an_image_of_other_proportions_is_stretched_with_a_message(model, files, capsys):
    sampled(model, "--image", "wide.png", "--strength", "0.5")
    assert "--image wide.png is 16×8 pixels and is stretched to 8×8" in capsys.readouterr().out
    sampled(model, "--image", "wide.png", "--strength", "0.5", "--width", "16")
    assert "stretched" not in capsys.readouterr().out


def test_posters_start_from_an_image_as_well(decoder, files):
    noise_image(16).save("poster.png")
    common = ["--model", str(decoder), "--style", "swiss", "--num_images", "1", "--num_inference_steps", "2"]
    masked = ["--image", "poster.png", "--mask_image", "large.png"]
    main([*common, *masked, "--scale", "1", "--output", "images/"])
    (written,) = Path("images").iterdir()
    assert np.array_equal(np.asarray(Image.open(written))[8:], np.asarray(Image.open("poster.png"))[8:])


BAD = [
    (["--image", "photo.png"], "`image` needs a `strength`, from 0"),
    (["--strength", "0.5"], "--strength has no effect without --image; add the image to start from"),
    (["--mask_image", "mask.png"], "--mask_image has no effect without --image"),
    (["--image", "photo.png", "--strength", "2"], "`strength` must be from 0 .* but is 2.0"),
    (["--image", "photo.png", "--mask_image", "large.png"], "`mask_image` must have the size of `image`, 8×8 pixels"),
    (["--image", "photo.png", "--mask_image", "empty.png"], "`mask_image` is empty"),
    (["--image", "none.png", "--strength", "0.5"], "--image none.png cannot be read as an image .No such file"),
    (["--image", "words.png", "--strength", "0.5"], "--image words.png.*cannot identify image file"),
    (["--image", "photo.png", "--mask_image", "words.png"], "--mask_image words.png.*cannot identify image file"),
    (["--image", "photo.png", "--strength", "half"], "--strength: invalid float value: 'half'"),
    (["--image", "photo.png", "--mask_image", "mask.png", "--paste_back", "1"], "give true or false, not '1'"),
    (["--image", "photo.png", "--strength", "0.5", "--height", "9"], "`height` must be a multiple of 2"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(model, files, arguments, message):
    with pytest.raises(UserError, match=message):
        sampled(model, *arguments)


def test_a_model_that_starts_from_a_vector_takes_no_image(files, tmp_path):
    tiny_caption_pipeline().save_pretrained(tmp_path / "captions")
    with pytest.raises(UserError, match="does not accept --image together with --prompt; leave it out"):
        sampled(tmp_path / "captions", "--image", "photo.png", "--strength", "0.5")


@pytest.mark.slow
def test_as_a_program_a_wrong_mask_is_one_line_and_status_2(model, files):
    command = [sys.executable, str(ROOT / "pipelines/sample.py"), "--model", str(model), "--image", "photo.png"]
    done = subprocess.run([*command, "--mask_image", "large.png"], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch("error: `mask_image` must have the size .*; resize the mask", done.stderr.strip())

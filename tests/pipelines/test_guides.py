"""The options of guidance of sample.py: an interval, and an earlier checkpoint that guides."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.sample import main
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from tests.support.tiny_models import tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    tiny_pipeline("flow_prediction", classes=2).save_pretrained(folder)
    return folder


def paint(decoder: Path, output: Path, *arguments: str) -> np.ndarray:
    main(["--model", str(decoder), "--num_images", "1", "--output", str(output), *arguments])
    return np.asarray(Image.open(output))


@pytest.fixture(scope="module")
def earlier_checkpoint(model, tmp_path_factory) -> Path:
    """A run's checkpoint whose network differs from that of `model`."""
    checkpoint = tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000007"
    pipeline = load_pipeline(model)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter += 0.05
    pipeline.save_pretrained(checkpoint / "pipeline")
    return checkpoint


def test_guidance_by_an_earlier_checkpoint_in_an_interval(model, earlier_checkpoint, tmp_path):
    def sampled(name: str, *options: str) -> tuple[bytes, dict]:
        output = tmp_path / f"{name}.png"
        words = ["--model", str(model), "--prompt", "a red poster", "--num_images", "1", "--num_inference_steps", "4"]
        main([*words, *options, "--output", str(output)])
        with Image.open(output) as image:
            return image.tobytes(), dict(image.text)

    guide = ("--guide", str(earlier_checkpoint))
    own, text = sampled("own", "--guidance_scale", "1")
    assert text["guidance_scale"] == "1"
    guided, text = sampled("guided", *guide)
    assert guided != own
    assert (text["guide"], text["autoguidance_scale"]) == ("step-00000007", "2")
    assert not {"guidance_scale", "guidance_interval"} & text.keys()
    assert sampled("off", *guide, "--autoguidance_scale", "1")[0] == own
    some, text = sampled("some", *guide, "--guidance_interval", "[0.3,0.8]")
    assert some not in (own, guided)
    assert text["guidance_interval"] == "0.3 to 0.8"
    assert sampled("plain", "--guidance_interval", "0.5,0.5")[0] == own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guide", "MODEL"], "MODEL has the same weights as the model, so it cannot guide it; give an earlier check"),
        (["--guide", "DECODER"], "--guide DECODER: `guidance_model` must be another version of the same model, but it"),
        (["--guide", "missing"], "found no pipeline, run or checkpoint at 'missing'"),
        (["--autoguidance_scale", "2"], "--autoguidance_scale has no effect without --guide"),
        (["--guidance_interval", "[0.8,0.1]"], "--guidance_interval: `guidance_interval` must be two noise levels"),
        (["--guidance_interval", "low"], "--guidance_interval: give two noise levels, such as '.0.1,0.8.', not 'low'"),
    ],
)
def test_guidance_that_cannot_be_used(model, decoder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    folders = {"MODEL": str(model), "DECODER": str(decoder)}
    for name, folder in folders.items():
        message = message.replace(name, re.escape(folder))
    with pytest.raises(UserError, match=message):
        main(["--model", str(model), "--num_inference_steps", "1", *(folders.get(word, word) for word in arguments)])


def test_a_poster_decoder_takes_an_interval_and_no_guide(decoder, tmp_path):
    common = ["--style", "pop", "--num_inference_steps", "4"]
    plain = paint(decoder, tmp_path / "1.png", *common)
    assert not np.array_equal(plain, paint(decoder, tmp_path / "2.png", *common, "--guidance_interval", "[0.3,0.8]"))
    with pytest.raises(UserError, match="PosterDecoderPipeline does not accept --guide"):
        paint(decoder, tmp_path / "3.png", "--guide", str(decoder))

"""ImageCaptionPipeline: determinism, independence of the batch, loading without Halftone, and its two commands."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pipelines import caption as caption_script
from pipelines import sample as sample_script
from pipelines.image_caption import GumbelNoise, ImageCaptionPipeline, consensus, fitted
from pipelines.models.latent_prior import LatentPriorModel
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from tests.conftest import ROOT
from tests.support.tiny_captions import (
    MODEL,
    RESOLUTION,
    caption,
    draw_folder,
    picture,
    tiny_caption_model,
    tiny_caption_pipeline,
    tiny_caption_tokenizer,
)
from tests.support.tiny_models import tiny_pipeline, tiny_tokenizer
from training.core.draws import SampleKey
from training.data.captions import CaptionDataConfig, CaptionedImages
from training.data.images import load_split


@pytest.fixture(scope="module")
def pipeline() -> ImageCaptionPipeline:
    return tiny_caption_pipeline()


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    pipeline.save_pretrained(folder)
    return folder


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_captions_do_not_depend_on_the_batch(pipeline):
    images = [picture(i) for i in range(3)]
    for options in ({}, {"num_beams": 3}, {"top_p": 0.9, "temperature": 2.0}):
        draws = [{"generator": generators(*seeds)} if "top_p" in options else {} for seeds in ((0, 1, 2), (1,))]
        together = pipeline.caption(images, **options, **draws[0])
        assert len(together) == 3
        assert together[1] == pipeline.caption(images[1], **options, **draws[1])[0]


def test_sampled_captions_differ_between_seeds_and_repeat_with_one(pipeline):
    options = {"top_p": 1.0, "temperature": 3.0}
    captions = [pipeline.caption(picture(0), **options, generator=generators(seed))[0] for seed in (0, 1, 0)]
    assert captions[0] == captions[2] != captions[1]


def test_gumbel_noise_samples_from_the_softmax():
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    scores = probabilities.log().expand(4000, -1)
    drawn = GumbelNoise(generators(*range(4000)))(torch.zeros(4000, 1), scores).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, probabilities, atol=0.03)


def test_the_consensus_is_the_caption_most_similar_to_all():
    """It is not the most frequent caption."""
    captions = ["odd one", "odd one", "a red ball on grass", "a red ball on sand", "a blue ball on grass"]
    assert consensus(captions) == "a red ball on grass"
    assert consensus(["x"]) == "x"
    assert consensus(["a", "b", "b"]) == "b"
    # With recall and precision weighted equally (F1), the shortest caption would win.
    assert consensus(["a dog", "a dog on wet grass", "a dog in thick mud"]) == "a dog on wet grass"


def test_candidates_do_not_depend_on_the_batch(pipeline):
    options = {"num_candidates": 5, "temperature": 3.0}
    together = pipeline.caption([picture(0), picture(1)], generator=generators(3, 4), **options)
    assert together[1] == pipeline.caption(picture(1), generator=generators(4), **options)[0]
    assert together != pipeline.caption([picture(0), picture(1)], generator=generators(5, 6), **options)


def test_a_low_top_p_is_greedy_search(pipeline):
    """The nucleus then contains one token only."""
    drawn = pipeline.caption([picture(i) for i in range(3)], top_p=1e-6, generator=generators(7, 8, 9))
    assert drawn == pipeline.caption([picture(i) for i in range(3)])


def test_drawings(pipeline):
    one = pipeline.draw(["a red circle", "a blue square"], output_type="np").images
    assert one.shape == (2, RESOLUTION, RESOLUTION, 3)
    assert (one.min(), one.max()) >= (0, 0)
    assert one.max() <= 1
    assert np.allclose(one[:1], pipeline("a red circle", output_type="np").images, atol=1e-5)
    unseeded = pipeline.draw("a red circle", 2, output_type="np").images
    assert np.allclose(unseeded[0], one[0], atol=1e-5)
    assert not np.array_equal(*unseeded)
    several = pipeline.draw("a red circle", 2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert not np.array_equal(several[0], several[1])
    assert np.abs(several - one[0]).max() < 0.5  # the posterior is narrow
    assert pipeline.draw("a red circle").images[0].size == (RESOLUTION, RESOLUTION)


def test_pairs_do_not_depend_on_the_number_of_pairs(pipeline):
    three = pipeline.sample(3, generator=generators(0, 1, 2), num_inference_steps=3, output_type="pt")
    one = pipeline.sample(1, generator=generators(1), num_inference_steps=3, output_type="pt")
    assert torch.allclose(three.images[1], one.images[0], atol=1e-5)
    assert three.captions[1] == one.captions[0]
    assert not torch.allclose(three.images[0], three.images[1], atol=1e-3)
    pipeline.set_scheduler("heun")
    assert len(pipeline.sample(2, num_inference_steps=2).captions) == 2
    pipeline.set_scheduler("euler")


def test_image_and_caption_are_decoded_from_one_vector(pipeline, monkeypatch):
    latents = torch.randn(1, MODEL["latent_size"])
    monkeypatch.setattr(pipeline, "_sample_latents", lambda *arguments: latents)
    pair = pipeline.sample(1, output_type="pt")
    assert torch.equal(pair.images, pipeline.decode_latents(latents, "pt"))
    assert pair.captions == pipeline._captions(latents, 1, None, 1.0, None, None)


def test_similarity_is_the_cosine_of_latents(pipeline):
    similarities = pipeline.similarity([picture(0), picture(1)], ["a red circle", "a green circle", "a big square"])
    assert similarities.shape == (2, 3)
    one, other = pipeline.encode_images(picture(1))[0], pipeline.encode_captions("a big square")[0]
    assert torch.allclose(similarities[1, 2], torch.nn.functional.cosine_similarity(one, other, dim=0), atol=1e-5)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("size", [(32, 32), (61, 40), (40, 160)])
def test_images_are_preprocessed_as_in_training(tmp_path, fit, size):
    folder = draw_folder(tmp_path / "pictures", 3, size)
    config = CaptionDataConfig(train_data_dir=str(folder), resolution=RESOLUTION, image_fit=fit, validation_fraction=0)
    data = CaptionedImages(load_split(config, "train", 0), config)
    pixels = data[SampleKey(1, 0)]["pixel_values"]
    assert torch.equal(fitted(Image.open(folder / "001.png"), RESOLUTION, fit), pixels)


@pytest.mark.parametrize("mode", ["I;16", "F", "LA", "P", "CMYK"])
def test_modes_of_images(mode):
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    if mode == "I;16":
        image = Image.fromarray((ramp * 257).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray((ramp / 255).astype(np.float32))
    else:
        image = Image.fromarray(ramp.astype(np.uint8)).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    assert image.mode == mode
    expected = fitted(Image.fromarray(ramp.astype(np.uint8)), 32, "crop")
    assert (fitted(image, 32, "crop") - expected).abs().max() < 0.03


def test_images_as_arrays_and_sequences(pipeline):
    images = [picture(i, (RESOLUTION, RESOLUTION)) for i in range(2)]
    expected = pipeline.encode_images(images)
    array = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
    assert torch.allclose(pipeline.encode_images(array), expected, atol=1e-5)
    assert torch.allclose(pipeline.encode_images(iter(images)), expected)


def test_truncated_and_unknown_captions_are_logged(pipeline, caplog):
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        pipeline.draw(["a red circle", "a red circle, " * 9, "quux plugh"])
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert "1 of 3 captions have more than 12 tokens" in logged
    assert "the model does not know the words 'quux', 'plugh' of the prompt 'quux plugh'" in logged


def test_generated_images_have_the_aspect_ratio_of_stretched_ones(tmp_path):
    folder = draw_folder(tmp_path / "pictures", 3, (128, 32))
    config = CaptionDataConfig(train_data_dir=str(folder), resolution=RESOLUTION, image_fit="stretch")
    ratio = CaptionedImages(load_split(config, "train", 0), config).aspect_ratio()
    assert ratio == 4
    drawn = tiny_caption_pipeline(image_fit="stretch", aspect_ratio=ratio).draw("a red circle").images[0]
    assert drawn.size == (128, 32)


def test_transparency_becomes_white():
    empty = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert torch.equal(fitted(empty, 32, "crop"), torch.ones(3, 32, 32))


@pytest.mark.slow
def test_it_loads_without_halftone(saved):
    """Captions, images and pairs are the same in a process that does not import this project."""
    code = (
        "import sys, torch; from diffusers import DiffusionPipeline; from PIL import Image\n"
        f"p = DiffusionPipeline.from_pretrained({str(saved)!r}, trust_remote_code=True)\n"
        "p.set_progress_bar_config(disable=True)\n"
        f"image = Image.new('RGB', (32, 32), 'red')\n"
        "pair = p.sample(1, generator=torch.Generator().manual_seed(3), num_inference_steps=2, output_type='pt')\n"
        "print(p.caption(image)[0]); print(pair.captions[0]); print(float(pair.images.double().sum()))\n"
        "assert not any(name.split('.')[0] in ('pipelines', 'training') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=saved.parent, env=_bare())
    assert done.returncode == 0, done.stderr[-2000:]
    ours = load_pipeline(saved)
    ours.set_progress_bar_config(disable=True)
    pair = ours.sample(1, generator=generators(3)[0], num_inference_steps=2, output_type="pt")
    captioned, sampled, total = done.stdout.splitlines()[-3:]
    assert captioned == ours.caption(Image.new("RGB", (32, 32), "red"))[0]
    assert sampled == pair.captions[0]
    assert float(total) == pytest.approx(float(pair.images.double().sum()), abs=1e-3)


def _bare() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_loaded_from_its_own_code_and_saved_again_it_still_loads(saved, tmp_path):
    theirs = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    theirs.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.allclose(*(p.draw("a red circle", output_type="pt").images for p in (theirs, again)), atol=1e-6)
    assert again.tokenizer("a red circle").input_ids == theirs.tokenizer("a red circle").input_ids


def test_half_precision(saved):
    half = ImageCaptionPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.model.dtype == torch.bfloat16
    assert half.sample(1, num_inference_steps=2).images[0].size == (RESOLUTION, RESOLUTION)
    assert isinstance(half.caption(picture(0))[0], str)


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.caption([]), "must be a PIL image"),
        (lambda p: p.caption("photo.jpg"), "must be a PIL image"),
        (lambda p: p.caption(torch.zeros(1, 3, 8, 8)), "must have shape"),
        (lambda p: p.caption(picture(0), num_beams=0), "positive integer"),
        (lambda p: p.caption(picture(0), top_p=0.9, num_beams=2), "choose one"),
        (lambda p: p.caption(picture(0), top_p=1.5), "must lie in"),
        (lambda p: p.caption(picture(0), top_p=0.5, temperature=0), "above 0"),
        (lambda p: p.caption(picture(0), num_candidates=0), "positive integer"),
        (lambda p: p.caption(picture(0), num_candidates=2, num_beams=2), "choose one"),
        (lambda p: p.caption(picture(0), temperature=2.0), "no effect without sampling"),
        (lambda p: p.caption(np.zeros((1, 8, 8, 3))), "must be floats of shape"),
        (lambda p: p.caption(np.zeros((1, 32, 32, 3), dtype=np.uint8)), "must be floats of shape"),
        (lambda p: p.caption(picture(0), max_length=99), "from 2 to 12"),
        (lambda p: p.draw(""), "must be non-empty"),
        (lambda p: p.draw(["a red circle", "  "]), "must be non-empty"),
        (lambda p: p.draw("a", output_type="jpg"), "must be one of"),
        (lambda p: p.sample(0), "positive integer"),
        (lambda p: p.similarity(picture(0), []), "must be non-empty"),
    ],
)
def test_invalid_arguments_raise(pipeline, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipeline)


def test_a_tokenizer_that_does_not_fit(pipeline):
    parts = {"model": pipeline.model, "scheduler": pipeline.scheduler}
    larger = tiny_caption_tokenizer()
    larger.add_tokens([f"word{i}" for i in range(9)])
    with pytest.raises(ValueError, match="tokens, but the model's vocabulary has"):
        ImageCaptionPipeline(tokenizer=larger, **parts)
    other = tiny_tokenizer()
    other.bos_token = "a"
    with pytest.raises(ValueError, match="for padding, start and end"):
        ImageCaptionPipeline(tokenizer=other, **parts)
    with pytest.raises(ValueError, match="vectors of 8 numbers"):
        ImageCaptionPipeline(tokenizer=pipeline.tokenizer, prior=LatentPriorModel(8, 8, 1), **parts)


# --- commands


def test_caption_command(saved, tmp_path, capsys):
    files = []
    for i in range(3):
        picture(i, (40, 50)).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    caption_script.main(
        [*files, "--model", str(saved), "--output", str(tmp_path / "captions.jsonl"), "--batch_size", "2"]
    )
    lines = capsys.readouterr().out.splitlines()
    written = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in written] == ["0.png", "1.png", "2.png"]
    assert lines[:3] == [f"{file}: {row['text']}" for file, row in zip(files, written, strict=True)]


def test_pairs_command(saved, tmp_path, capsys):
    words = ["--model", str(saved), "--pairs", "3", "--num_inference_steps", "2"]
    sample_script.main([*words, "--output", str(tmp_path / "pairs.png"), "--device", "cpu"])
    out = capsys.readouterr().out.splitlines()
    assert "3 pairs" in out[-1]
    assert len(out) == 4
    sheet = Image.open(tmp_path / "pairs.png")
    assert sheet.width > 3 * RESOLUTION
    assert sheet.height > 160


def test_prompts_are_drawn(saved, tmp_path, capsys):
    words = ["--model", str(saved), "--device", "cpu", "--output", str(tmp_path / "grid.png")]
    sample_script.main([*words, "--prompt", "a red circle", "a blue square", "--num_images", "3"])
    assert "2 x 3 images" in capsys.readouterr().out
    assert Image.open(tmp_path / "grid.png").width > 3 * RESOLUTION


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--pairs 8 to generate"),
        (["--prompt", "a", "--pairs", "2"], "--pairs 8 to generate"),
        (["--prompt", "a", "--class_label", "3"], "does not accept --class_label together with --prompt"),
        (["--pairs", "2", "--height", "64"], "does not accept --height together with --pairs"),
        (["--pairs", "2", "--num_images", "9"], "does not accept --num_images"),
        (["--pairs", "0"], "--pairs must be at least 1"),
    ],
)
def test_sample_options_that_it_does_not_accept(saved, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        sample_script.main(["--model", str(saved), "--output", str(tmp_path / "x.png"), *words])


def test_captions_written_next_to_the_images_make_an_imagefolder(saved, tmp_path, capsys):
    (tmp_path / "scans").mkdir()
    picture(0).save(tmp_path / "scans/0.png")
    output = tmp_path / "scans/metadata.jsonl"
    words = [str(tmp_path / "scans/0.png"), "--model", str(saved), "--output", str(output)]
    caption_script.main(words)
    assert json.loads(output.read_text())["file_name"] == "0.png"
    output.write_text("by hand")
    with pytest.raises(UserError, match="already exists"):
        caption_script.main(words)
    assert output.read_text() == "by hand"
    caption_script.main([*words, "--overwrite"])
    assert json.loads(output.read_text())["file_name"] == "0.png"


def test_a_truncated_image_does_not_lose_earlier_captions(saved, tmp_path, capsys):
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        Image.effect_noise((64, 64), 90).convert("RGB").save(files[-1])
    files[2].write_bytes(files[2].read_bytes()[:2000])
    words = [*map(str, files), "--model", str(saved), "--output", str(tmp_path / "c.jsonl"), "--batch_size", "2"]
    with pytest.raises(UserError, match="2.png cannot be read as an image"):
        caption_script.main(words)
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.png", "--model", "MODEL"], "nowhere.png cannot be read as an image .No such file"),
        (["README.md", "--model", "MODEL"], "README.md cannot be read as an image .cannot identify"),
        (["PICTURE", "--model", "nowhere"], "no pipeline, run or checkpoint"),
        (["PICTURE", "--model", "MODEL", "--num_beams", "0"], "at least 1"),
        (["PICTURE", "--model", "MODEL", "--max_length", "99"], "from 2 to 12"),
        (["PICTURE", "--modl", "MODEL"], "did you mean|required"),
        (["PICTURE", "--model", "OTHER"], "does not caption images"),
    ],
)
def test_caption_command_bad_input(saved, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    picture(0).save(tmp_path / "0.png")
    if "OTHER" in words:
        tiny_pipeline().save_pretrained(tmp_path / "other")
    places = {"MODEL": str(saved), "PICTURE": str(tmp_path / "0.png"), "OTHER": str(tmp_path / "other")}
    with pytest.raises(UserError, match=message):
        caption_script.main([places.get(word, word) for word in words])


def test_pairs_of_a_model_without_captions(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "other")
    words = ["--model", str(tmp_path / "other"), "--pairs", "2", "--output", str(tmp_path / "x.png")]
    with pytest.raises(UserError, match="does not accept --pairs; use an image–caption model"):
        sample_script.main(words)


def test_captions_consist_of_words_of_the_tokenizer(pipeline):
    assert tiny_caption_model().config.vocab_size == len(pipeline.tokenizer)
    known = set(pipeline.tokenizer.get_vocab())
    for text in pipeline.caption([picture(i) for i in range(4)], top_p=1.0, temperature=5.0):
        assert set(text.replace(",", " ,").split()) <= known
    assert caption(0) == "a red circle"

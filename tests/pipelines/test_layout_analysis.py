"""LayoutAnalysisPipeline and pipelines/analyze.py, with posters of any size."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import analyze
from pipelines.common.layout_pictures import IMAGE_COLOR, TEXT_COLOR, draw_errors, draw_overlay
from pipelines.common.poster_domain import COUNTS, GRAMMAR
from pipelines.layout_analysis import LayoutAnalysisPipeline, feature_channels
from pipelines.models.grammar_abstractor import GrammarAbstractorModel
from pipelines.models.layout_encoder import LayoutEncoderModel
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from tests.support.environments import environment_without_halftone


def tiny_pipeline(abstractor: bool = True) -> LayoutAnalysisPipeline:
    torch.manual_seed(0)
    encoder = LayoutEncoderModel(block_out_channels=(8, 16), patch_size=2, sample_size=32).eval()
    reader = GrammarAbstractorModel(block_out_channels=(8, 8), hidden_size=16, sample_size=16).eval()
    return LayoutAnalysisPipeline(encoder=encoder, abstractor=reader if abstractor else None)


def random_poster(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "layout"
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_posters_of_any_size_give_features_of_their_size():
    posters = [random_poster(64, 64), random_poster(301, 173), random_poster(20, 45)]
    reading = tiny_pipeline()(posters)
    for image, features, overlay in zip(posters, reading.features, reading.overlays, strict=True):
        assert features.shape == (4, image.height, image.width)
        assert overlay.size == image.size
        assert set(np.unique(features[:2])) <= {0.0, 1.0}
        assert features[3].min() >= 0
        assert features[3].max() <= 1
    assert all(tuple(numbers) == GRAMMAR for numbers in reading.grammar)
    assert all(tuple(counts) == COUNTS for counts in reading.counts)


def test_features_do_not_depend_on_the_batch_or_the_exif_orientation():
    pipeline, first = tiny_pipeline(), random_poster(50, 40)
    alone = pipeline(first).features[0]
    assert np.array_equal(alone, pipeline([random_poster(64, 64), first]).features[1])
    turned = first.copy()
    turned.getexif()[0x0112] = 1
    assert np.array_equal(alone, pipeline(turned).features[0])


def test_abstract_takes_features():
    pipeline = tiny_pipeline()
    features = np.zeros((4, 30, 40), dtype=np.float32)
    features[0, 5:10, 5:20], features[2, 5:10, 5:20], features[3, 5:10, 5:20] = 1, 5, 0.8
    grammar, counts = pipeline.abstract([features, features])
    assert grammar[0] == pytest.approx(grammar[1])
    assert counts[0] == counts[1]
    with pytest.raises(ValueError, match="4 × H × W"):
        pipeline.abstract([features[0]])


def test_feature_channels_are_one_hot():
    features = torch.zeros(1, 4, 2, 2)
    features[0, 2] = torch.tensor([[0.0, 5.0], [2.0, 1.0]])
    channels = feature_channels(features)
    assert channels.shape == (1, 9, 2, 2)
    assert torch.equal(channels[:, 2:8].argmax(1), features[:, 2].long())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p([]), "empty"),
        (lambda p: p("poster.png"), "PIL images"),
        (lambda p: p(random_poster(32, 32), reading_size=4), "at least 16"),
        (lambda p: LayoutAnalysisPipeline(abstractor=p.abstractor)(random_poster(32, 32)), "no encoder"),
        (lambda p: LayoutAnalysisPipeline(encoder=p.encoder).abstract([]), "no abstractor"),
    ],
)
def test_invalid_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_pipeline())


OUTSIDE = """
import sys
import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

folder, here = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert type(pipeline).__module__.startswith("diffusers_modules")
reading = pipeline(Image.open(f"{here}/poster.png"))
np.savez(f"{here}/read.npz", features=reading.features[0], grammar=list(reading.grammar[0].values()))
"""


@pytest.mark.slow
def test_a_saved_pipeline_loads_without_halftone(saved, tmp_path):
    """Its predictions in an environment without Halftone are the same."""
    image = random_poster(48, 32)
    image.save(tmp_path / "poster.png")
    (tmp_path / "outside.py").write_text(OUTSIDE)
    python = environment_without_halftone(tmp_path / "venv")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [python, str(tmp_path / "outside.py"), str(saved), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, there = load_pipeline(saved)(image), np.load(tmp_path / "read.npz")
    assert np.array_equal(there["features"], here.features[0])
    assert there["grammar"].tolist() == list(here.grammar[0].values())


def test_overlays_mark_text_red_and_pictures_green():
    features = np.zeros((4, 40, 40), dtype=np.float32)
    features[0, 4:10, 4:30], features[1, 20:36, 8:30] = 1, 1
    pixels = np.asarray(draw_overlay(Image.new("RGB", (40, 40), "white"), features))
    assert tuple(pixels[4, 15]) == TEXT_COLOR
    assert tuple(pixels[20, 15]) == IMAGE_COLOR
    assert tuple(pixels[15, 35]) == (255, 255, 255)
    other = features.copy()
    other[2, :4] = 3
    assert draw_errors(other, features)[1] == pytest.approx(0.1)


def test_analyze_writes_a_report(saved, tmp_path, capsys):
    files = [tmp_path / "one.png", tmp_path / "sub" / "one.jpg"]
    files[1].parent.mkdir()
    for number, file in enumerate(files):
        random_poster(120 + 30 * number, 160, number).save(file)
    out = tmp_path / "report"
    assert analyze.main([*map(str, files), "--model", str(saved), "--output_dir", str(out)]) is None
    report = json.loads((out / "report.json").read_text())
    assert [Path(entry["report"]).name for entry in report] == ["one_layout.png", "one_2_layout.png"]
    for entry in report:
        assert set(entry["grammar"]) == set(GRAMMAR)
        assert 0 <= entry["text_share"] <= 1
        assert sum(entry["color_role_shares"].values()) == pytest.approx(1, abs=1e-3)
        with Image.open(entry["report"]) as sheet:
            assert sheet.width > 800
    assert "text block" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.png", "--model", "{saved}"], "nothing.png cannot be read as an image .No such file"),
        (["{text}", "--model", "{saved}"], "notes.txt cannot be read as an image .cannot identify"),
        (["{text}", "--modle", "{saved}"], "--model"),
        (["{picture}", "--model", "{saved}", "--reading_size", "3"], "at least 16"),
    ],
)
def test_analyze_names_what_is_wrong(saved, tmp_path, words, message):
    (tmp_path / "notes.txt").write_text("not an image")
    random_poster(32, 32).save(tmp_path / "p.png")
    places = {"saved": saved, "text": tmp_path / "notes.txt", "picture": tmp_path / "p.png"}
    with pytest.raises(UserError, match=message):
        analyze.main([word.format(**places) for word in words])

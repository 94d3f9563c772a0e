"""What sample.py writes: titles, single files with their metadata, and nothing after an error."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.common.words import unknown_words
from pipelines.sample import main
from pipelines.tools.cli import UserError
from pipelines.tools.generated import slug
from tests.conftest import ROOT
from tests.support.logs import collected
from tests.support.tiny_captions import tiny_caption_pipeline
from tests.support.tiny_models import tiny_pipeline, tiny_tokenizer
from training.data.tokenization import train_tokenizer

QUICK = ["--num_inference_steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("somewhere") / "my_model"
    tiny_pipeline("flow_prediction", classes=2).save_pretrained(folder / "pipeline")
    return folder


def run(folder: Path, model: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "pipelines" / "sample.py", "--model", model, *QUICK, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, **options)


def test_a_folder_gets_a_file_for_each_image_with_its_settings(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(model), *QUICK, "--prompt", "a red poster", "Blue, blue!", "--num_images", "2"]
    words += ["--seed", "7", "--guidance_scale", "3", "--negative_prompt", "red"]
    main([*words, "--output", "new/images/"])
    names = ["1_a-red-poster_seed7", "1_a-red-poster_seed8", "2_blue-blue_seed7", "2_blue-blue_seed8"]
    assert sorted(path.name for path in Path("new/images").iterdir()) == [f"{name}.png" for name in names]
    with Image.open(f"new/images/{names[3]}.png") as image:
        assert image.size == (8, 8), "a single file has the pixels of the model"
        assert image.text == {
            "prompt": "Blue, blue!", "seed": "8", "model": "my_model", "guidance_scale": "3",
            "negative_prompt": "red", "num_inference_steps": "2", "scheduler": "FlowMatchEulerDiscreteScheduler",
        }  # fmt: skip
        single = np.asarray(image)
    main([*words, "--output", "grid.png", "--no_titles"])
    with Image.open("grid.png") as grid:
        assert np.array_equal(np.asarray(grid)[136:264:16, 136:264:16], single)
        assert grid.text["prompt"].splitlines() == ["a red poster", "Blue, blue!"]
        assert grid.text["seed"] == "7, 8"
    main([*words, "--output", "new/images"])
    assert len(list(Path("new/images").iterdir())) == 8, "no file of the first time is replaced"


@pytest.mark.slow
def test_no_folder_of_this_machine_is_in_the_metadata(model, tmp_path):
    (tmp_path / "private").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "private" / "a.png")
    result = run(
        tmp_path,
        model,
        "--prompt",
        f"{tmp_path}/x",
        "--output",
        f"{tmp_path}/o/",
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    for path in (tmp_path / "o").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
        with Image.open(path) as image:
            assert image.text["prompt"] == "~/x"


def test_pairs_as_single_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_caption_pipeline().save_pretrained("model")
    main(["--model", "model", "--pairs", "2", "--seed", "3", *QUICK, "--output", "pairs/"])
    first, second = sorted(Path("pairs").iterdir())
    assert first.name.endswith("seed3.png")
    with Image.open(second) as image:
        assert image.text["seed"] == "4"
        assert {"caption", "model", "num_inference_steps"} <= image.text.keys()


@pytest.mark.parametrize(("scale", "side"), [([], 128), (["--scale", "1"], 8), (["--scale", "3"], 24)])
def test_the_scale_of_a_grid(model, tmp_path, scale, side):
    output = tmp_path / "grid.png"
    main(["--model", str(model), *QUICK, "--num_images", "1", *scale, "--no_titles", "--output", str(output)])
    with Image.open(output) as grid:
        assert grid.size == (side + 8, side + 8)


def test_the_scale_of_single_files_and_its_limits(model, tmp_path):
    words = ["--model", str(model), *QUICK, "--num_images", "1", "--output", f"{tmp_path}/"]
    main([*words, "--scale", "2"])
    with Image.open(tmp_path / "1_seed0.png") as image:
        assert image.size == (16, 16)
    for wrong in ("0", "65", "-1"):
        with pytest.raises(UserError, match=f"--scale must be from 1 to 64, but is {wrong}"):
            main([*words, "--scale", wrong])


@pytest.mark.parametrize("output", ["grid.png", "new/grid.png", "images/", "new/images"])
@pytest.mark.parametrize("arguments", [["--class_label", "cat"], ["--height", "9"], ["--scheduler", "none"]])
def test_an_error_leaves_no_file_and_no_folder(model, tmp_path, monkeypatch, output, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        main(["--model", str(model), *QUICK, *arguments, "--output", output])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(model, tmp_path):
    (tmp_path / "grid.png").write_bytes(b"the old grid")

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    result = run(tmp_path, model, "--output", "grid.png", preexec_fn=full)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: --output grid.png cannot be written (File too large)")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert (tmp_path / "grid.png").read_bytes() == b"the old grid"


def test_an_output_through_a_link_is_written_where_the_link_leads(model, tmp_path):
    (tmp_path / "grid.png").symlink_to(tmp_path / "target.png")
    main(["--model", str(model), *QUICK, "--num_images", "1", "--output", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").is_symlink()
    assert (tmp_path / "target.png").stat().st_size > 100


# --- words that the tokenizer does not know


@pytest.mark.slow
def test_unknown_words_are_named_once_for_each_prompt_and_before_sampling(model, tmp_path):
    words = ["--prompt", "a zebra, a red quagga", "a red poster", "--negative_prompt", "zebra"]
    result = run(tmp_path, model, *words, "--batch_size", "1", "--num_images", "2")
    assert result.returncode == 0, result.stderr
    named = [line for line in result.stderr.splitlines() if "does not know" in line]
    assert [line.removeprefix("warning: ") for line in named] == [
        "the model does not know the words 'zebra', 'quagga' of the prompt 'a zebra, a red quagga'; use other words",
        "the model does not know the word 'zebra' of the prompt 'zebra'; use other words",
    ]


def test_the_pipeline_names_unknown_words():
    with collected("pipelines.common.words") as messages:
        pipeline = tiny_pipeline()
        for _ in range(2):
            pipeline("a blue okapi", num_inference_steps=1)
    assert messages == [
        ("WARNING", "the model does not know the word 'okapi' of the prompt 'a blue okapi'; use other words")
    ]


def test_a_tokenizer_with_pieces_of_bytes_knows_all_words():
    assert unknown_words(tiny_tokenizer(), "a quagga, RED quagga!") == ["quagga", "RED"]
    bpe = train_tokenizer(["a red poster", "a blue poster"], vocab_size=300, model="bpe")
    assert unknown_words(bpe, "a quagga \u4e2d\u6587") == []


def test_file_names_are_short_and_safe():
    assert slug("A red/blue.. poster: 'x'\x1b") == "a-red-blue-poster-x"
    assert slug("\u4e2d\u6587 caf\u00e9") == "\u4e2d\u6587-caf\u00e9"
    assert slug("../../etc") == "etc"
    assert len(slug("word " * 100)) <= 40

"""A config file for another script, and paths in messages."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from data_scripts.import_captions import main as import_captions
from pipelines.caption import main as caption
from pipelines.sample import main as sample
from pipelines.tools.cli import UserError, located
from tests.support.runs import launch
from training import evaluate, train_autoencoder, train_decoder, train_latent_diffusion
from training.core.parsing import parse_config

LATENT_DIFFUSION = "configs/experiments/latent_diffusion/emoji_64.yaml"


@pytest.mark.parametrize(
    ("script", "file", "owner"),
    [
        (train_autoencoder.Config, LATENT_DIFFUSION, "train_latent_diffusion"),
        (train_latent_diffusion.Config, "configs/experiments/autoencoder/emoji_64.yaml", "train_autoencoder"),
        (train_decoder.Config, "encoder_64", "train_encoder"),
        (evaluate.EvaluationConfig, "configs/experiments/image_caption/tiny.yaml", "train_image_caption"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_a_config_file_of_another_script_names_that_script(script, file, owner, joined):
    file = file if "/" in file else f"configs/experiments/posters/{file}.yaml"
    words = [f"--config={file}"] if joined else ["--seed", "1", "--config", file]
    with pytest.raises(UserError) as caught:
        parse_config(script, words)
    assert str(caught.value).startswith(f"{file} is for {owner}.py; run `")
    assert f"training/{owner}.py --config {file}`" in str(caught.value)


def test_a_key_that_no_script_knows_is_named(tmp_path):
    (tmp_path / "typo.yaml").write_text("resolutoin: 64\n")
    with pytest.raises(UserError, match="unknown key 'resolutoin' in the YAML file; did you mean 'resolution'"):
        parse_config(train_autoencoder.Config, ["--config", str(tmp_path / "typo.yaml")])
    (tmp_path / "mixed.yaml").write_text("caption_prior: true\nresolutoin: 64\n")
    with pytest.raises(UserError, match="unknown key 'caption_prior'"):
        parse_config(train_autoencoder.Config, ["--config", str(tmp_path / "mixed.yaml")])


def test_a_wrong_value_in_a_file_of_this_script_is_named(tmp_path):
    (tmp_path / "own.yaml").write_text("resolution: many\n")
    with pytest.raises(UserError, match="--resolution: expected a whole number, and got many"):
        parse_config(train_autoencoder.Config, ["--config", str(tmp_path / "own.yaml")])


def test_a_path_is_shown_as_given_and_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert located("a/b") == f"'a/b' ({tmp_path}/a/b)"
    assert located("~/b") == f"'~/b' ({tmp_path}/home/b)"
    assert located(Path("/a/b")) == "'/a/b'"


DATA = ["--dataset_name", "none/pics.csv", "--output_dir", "run"]
MISSING = {
    "dataset": (train_autoencoder.main, DATA, "none/pics.csv"),
    "images": (train_autoencoder.main, ["--train_data_dir", "none/pics", "--output_dir", "run"], "none/pics"),
    "config": (train_autoencoder.main, ["--config", "none.yaml"], "none.yaml"),
    "model": (sample, ["--model", "none/a/b"], "none/a/b"),
    "control": (sample, ["--model", "none", "--control_image", "none.png"], "none.png"),
    "image": (caption, ["none.png", "--model", "none"], "none.png"),
    "generated images": (evaluate.main, ["--images", "none", "--dataset_name", "none.csv"], "none"),
    "captions": (import_captions, ["none.csv", "--image_dir", ".", "--output_dir", "made"], "none.csv"),
}


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_path_is_absolute_in_the_message(what, tmp_path, monkeypatch):
    main, words, path = MISSING[what]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(words)
    assert os.path.join(tmp_path, path) in str(caught.value)


LOADING = """
import atexit, time, warnings
from torch.utils.data import DataLoader
from pipelines.tools.cli import entry_point

def main():
    global batches
    warnings.simplefilter("ignore")  # there may be fewer cores than loader processes
    batches = iter(DataLoader(range(100), num_workers=2))
    next(batches)
    atexit.register(time.sleep, 1)  # the death of the loader processes is noticed while Python code runs

if __name__ == "__main__":
    entry_point(main)
"""


@pytest.mark.slow
def test_loader_processes_end_without_a_traceback(tmp_path):
    """PyTorch raises an error when a loader process is killed, as those that are still at work are in the end."""
    (tmp_path / "loading.py").write_text(LOADING)
    done = launch(tmp_path / "loading.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


WRAPPED = """
import os, signal
from pipelines.tools.cli import entry_point

def main():
    def stop(number, frame):
        raise SystemExit(75)
    if {number} == signal.SIGTERM:
        signal.signal({number}, stop)
    try:
        os.kill(os.getpid(), {number})
        signal.sigtimedwait([], 1)
    except BaseException as stopped:  # as libraries with pybind11 do while they are imported
        raise ImportError("initialization failed") from stopped

entry_point(main)
"""


@pytest.mark.parametrize(
    ("number", "ended"), [(signal.SIGTERM, (75, "")), (signal.SIGINT, (130, "stopped\n"))], ids=["SIGTERM", "SIGINT"]
)
def test_a_stop_during_the_import_of_a_compiled_library_is_a_stop(tmp_path, number, ended):
    (tmp_path / "wrapped.py").write_text(WRAPPED.format(number=int(number)))
    done = launch(tmp_path / "wrapped.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == ended

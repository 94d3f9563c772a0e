"""A made folder is complete if all that its script wrote is there; that it exists says nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_scripts import make_posters, train_tokenizer
from tests.support.tiny_models import tiny_pipeline
from training.core.made_folders import incomplete, lock_of


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def deleted(file: Path) -> None:
    file.unlink()


@pytest.fixture
def posters(tmp_path: Path) -> Path:
    make_posters.main(["--output_dir", str(tmp_path / "posters"), "--num_posters", "8", "--num_workers", "1"])
    return tmp_path / "posters"


@pytest.fixture
def tokenizer(posters: Path) -> Path:
    folder = posters.with_name("tokenizer")
    train_tokenizer.main(["--dataset_name", str(posters), "--output_dir", str(folder), "--validation_fraction", "0.2"])
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_pipeline().save_pretrained(tmp_path / "run/pipeline")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["nothing", "self"])
def test_what_is_missing_or_a_link_to_itself(tmp_path, name):
    os.symlink("self", tmp_path / "self")
    assert incomplete(tmp_path / name, "data_scripts/make_posters.py") == "is missing"


@pytest.mark.parametrize(
    ("damage", "file", "problem"),
    [
        (cut, "data/train-00000-of-00001.parquet", "bytes instead of"),
        (deleted, "data/train-00000-of-00001.parquet", "lacks the file data/train"),
        (emptied, "manifest.json", "has a damaged manifest.json"),
        (cut, "manifest.json", None),  # its last line break
    ],
)
def test_datasets(posters, damage, file, problem):
    script = "data_scripts/make_posters.py"
    assert incomplete(posters, script) is None
    assert incomplete(posters / "manifest.json", script) is None
    damage(posters / file)
    found = incomplete(posters, script)
    assert found is None if problem is None else problem in found


def test_datasets_of_earlier_versions_have_no_manifest(posters):
    (posters / "manifest.json").unlink()
    assert incomplete(posters, "data_scripts/make_emoji.py") is None
    cut(posters / "data/train-00000-of-00001.parquet")
    assert "damaged file train-00000" in str(incomplete(posters, "data_scripts/make_emoji.py"))


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        '"text"',
        "{}",
        '{"settings": [], "files": {}}',
        '{"settings": {}, "files": {"a": "b"}}',
        "[" * 100_000,
    ],
)
def test_manifests_of_another_shape(posters, content):
    (posters / "manifest.json").write_text(content)
    assert incomplete(posters, "data_scripts/make_posters.py") == "has a damaged manifest.json"


@pytest.mark.parametrize("damage", [emptied, deleted, cut])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(tokenizer, damage, name):
    script = "data_scripts/train_tokenizer.py"
    assert incomplete(tokenizer, script) is None
    if damage is cut:
        (tokenizer / name).write_text(json.dumps([1]))
    else:
        damage(tokenizer / name)
    assert name in str(incomplete(tokenizer, script))


@pytest.mark.parametrize("damage", [emptied, deleted, cut])
@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_pipelines(run, damage, name):
    script = "training/train_latent_diffusion.py"
    assert incomplete(run, script) is None
    assert incomplete(run / "pipeline", script) is None
    file = run / "pipeline" / name
    if damage is cut:
        file.write_bytes(file.read_bytes()[:-3])
    else:
        damage(file)
    if damage is deleted and "unet" in name:
        for other in file.parent.iterdir():
            other.unlink()
    assert incomplete(run, script) is not None


@pytest.mark.parametrize("words", ["data/x", "data/x/", "./data/x", "data/../data/x"])
def test_every_spelling_of_a_folder_has_the_same_lock(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert lock_of(words).file == tmp_path / "data/.x.lock"
    assert lock_of(tmp_path / "data/x").file == tmp_path / "data/.x.lock"

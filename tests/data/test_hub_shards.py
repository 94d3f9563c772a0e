"""Dataset repositories on the Hub that are streamed: splits, the commit that is read, and where a token is sent."""

from __future__ import annotations

import io
import re
import shlex

import pyarrow
import pyarrow.parquet
import pytest
import torch

from data_scripts import make_controls
from pipelines.tools.cli import UserError
from tests.conftest import forget_accelerate
from tests.data.test_remote_shards import rows
from tests.data.test_shards import MAKERS, ROWS, SHARDS, config_of, image_bytes, opened
from tests.scripts.test_streaming import FLAGS, train
from tests.support.hub_server import HubServer, Request, hub
from tests.support.runs import ROOT, assert_same_state, launch, sigterm_in_step
from training import train_controlnet, train_latent_diffusion
from training.core.batches import fetch
from training.core.draws import SampleKey
from training.core.parsing import parse_config
from training.data import source
from training.data.images import DataConfig, load_split
from training.data.shards import places, remote, sources, tables
from training.evaluation.data import EvaluationDataConfig, open_evaluation_data
from training.recipes.completion import complete_controlnet, complete_latent_diffusion
from training.run.folder import RunFolder

__all__ = ["hub"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, hub):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        "datasets.config.HUB_DATASETS_URL", hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"
    )
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote, "PAUSES", (0.01,) * 4)
    monkeypatch.setattr(remote, "PAUSES_AT_START", (0.01,) * 3)
    restart()


def restart() -> None:
    """Forget what this process knows, as a new one."""
    source._open_source.cache_clear()
    sources._newest_commit.cache_clear()
    places.forget()


def upload(hub: HubServer, folder, prefix: str = "data/", **options) -> str:
    return hub.add_dataset("ada/emoji", {f"{prefix}{f.name}": f.read_bytes() for f in folder.iterdir()}, **options)


def table_of_keys() -> bytes:
    """Return a Parquet file as img2dataset writes it beside each tar file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"key": ["000000"], "status": ["success"]}), file)
    return file.getvalue()


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_of_a_hub_dataset_equal_local_ones(tmp_path, hub, kind):
    """A private one: the token is for the Hub, and not for the storage, which refuses it here."""
    folder = MAKERS[kind](tmp_path / "shards")
    commit = upload(hub, folder, private=True)
    config = config_of("ada/emoji")
    assert len(load_split(config, "train", 0)) == SHARDS * ROWS
    assert (config.pinned(), config.dataset_revision) == ({"dataset_revision": commit}, "auto")
    for one, other in zip(rows(opened("ada/emoji")), rows(opened(folder)), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert (one["caption"], one["label"]) == (other["caption"], other["label"])
    assert {r.status for r in hub.requests if r.path.startswith("/storage")} == {206}
    written = [file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    written += [file.read_bytes() for file in (tmp_path / "hf_home").rglob("*") if file.is_file()]
    assert not any(b"\x89PNG" in content for content in written)


def test_a_pinned_commit_is_read_after_the_dataset_has_changed(tmp_path, hub):
    folder = MAKERS["tar"](tmp_path / "shards")
    first = upload(hub, folder)
    config = config_of("ada/emoji")
    load_split(config, "train", 0)
    kept = config.pinned()
    hub.put("ada/emoji", "data/00002.tar", None)
    restart()
    hub.requests.clear()
    assert len(load_split(config_of("ada/emoji"), "train", 0)) == 20
    assert not [request for request in hub.requests if request.path.startswith("/storage")]  # no shard has changed
    newest = load_split(config_of("ada/emoji"), "train", 0).data.column("image")[0].as_py()["path"]
    assert first not in newest
    data = opened("ada/emoji", **kept)
    assert len(data) == 30
    assert fetch(data, [SampleKey(29, 0)])["caption"] == ["number 29"]
    assert len(opened(f"hf://datasets/ada/emoji@{first}/data/*.tar")) == 30
    assert len(opened("hf://datasets/ada/emoji/data/{00000..00000}.tar")) == 10
    assert len(opened("hf://datasets/ada/emoji/data")) == 20


def test_splits_and_configurations_are_those_of_the_card(tmp_path, hub):
    folder = MAKERS["parquet"](tmp_path / "shards")
    files = {
        f"part{i}/{name}": f.read_bytes() for i, f in enumerate(sorted(folder.iterdir())) for name in ["x.parquet"]
    }
    card = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: part0/*.parquet}
  - {split: odd_one, path: part1/*.parquet}
- config_name: large
  data_files: [{split: train, path: part*/*.parquet}]
---
"""
    hub.add_dataset("ada/emoji", {**files, "README.md": card.encode()})
    assert len(opened("ada/emoji", dataset_config_name="large")) == 30
    assert len(opened("ada/emoji", dataset_config_name="small")) == 10
    assert len(load_split(config_of("ada/emoji", dataset_config_name="small"), "odd_one", 0)) == 10
    with pytest.raises(UserError, match="choose one of its configurations with --dataset_config_name"):
        opened("ada/emoji")


def test_tar_files_that_the_card_does_not_name_are_not_read(tmp_path, hub):
    folder = MAKERS["tar"](tmp_path / "shards")
    names = ("train/0.tar", "train/1.tar", "raw/backup.tar")
    files = dict(zip(names, (f.read_bytes() for f in sorted(folder.glob("*.tar"))), strict=True))
    card = b"---\nconfigs:\n- config_name: default\n  data_files: train/*.tar\n---\n"
    hub.add_dataset("ada/named", {**files, "README.md": card})
    assert len(opened("ada/named")) == 20
    beside = {name.replace(".tar", ".parquet"): table_of_keys() for name in names}
    hub.add_dataset("ada/img2dataset", {**files, **beside})
    assert len(opened("ada/img2dataset")) == 30


def test_ranges_of_files_and_folders_are_read_as_a_whole_or_refused(tmp_path, hub):
    folder = MAKERS["tar"](tmp_path / "shards")
    names = ("train/0.tar", "train/1.tar", "val/2.tar")
    hub.add_dataset("ada/emoji", dict(zip(names, (f.read_bytes() for f in sorted(folder.glob("*.tar"))), strict=True)))
    at = "hf://datasets/ada/emoji"
    splits = source.load_all_splits(config_of(f"{at}/{{train,val}}"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "validation": 10}
    assert len(opened(f"{at}/train/{{0..1}}.tar")) == len(opened(f"{at}/{{train,t*}}/[01].tar")) == 20
    for name, missing in {
        "train/{0..3}.tar": "train/2.tar",
        "{train,test}": "test",
        "train/{0,x*}.tar": r"train/x\*.tar",
    }.items():
        with pytest.raises(UserError, match=f"there is nothing at {missing}, which is part of "):
            opened(f"{at}/{name}")


def test_what_is_not_there_is_named(hub, monkeypatch):
    hub.add_dataset("ada/images", {"0.png": image_bytes(0)})
    with pytest.raises(UserError, match="ada/images has none"):
        opened("ada/images")
    with pytest.raises(UserError, match="'ada/nothing' is not a local folder and cannot be read on the Hub"):
        opened("ada/nothing")
    with pytest.raises(UserError, match="--dataset_revision"):
        opened("ada/images", dataset_revision="v2")


def test_a_folder_is_not_looked_for_on_the_hub(hub):
    for name, message in {
        "shards": "'shards' .* does not exist; check the path given by --train_data_dir",
        "ada/emoji": "'ada/emoji' .* does not exist; check the path given by --train_data_dir",
        "hf://datasets/ada/emoji": "is a URL; give it with --dataset_name",
        "https://example.org/0.tar": "is a URL; give it with --dataset_name",
    }.items():
        config = DataConfig(train_data_dir=name, streaming=True)
        assert "dataset_revision" not in config.pinned()
        with pytest.raises(UserError, match=message):
            source.load_all_splits(config)
    assert not hub.requests


def test_a_commit_is_read_instead_of_a_branch_in_the_name_and_two_revisions_are_refused(hub):
    first = hub.add_dataset("ada/emoji", {"0.tar": b"0"})
    hub.put("ada/emoji", "0.tar", b"1")
    newest, name = hub.repos["ada/emoji"].commits[1][0], "hf://datasets/ada/emoji@{}/0.tar"
    assert sources.commit_of(name.format("main"), "auto") == newest
    assert sources.commit_of(name.format("main"), first) == first
    assert sources.commit_of(name.format(first), "auto") == first
    assert sources.commit_of(name.format(first), first) == first
    for own, given in ((first, newest), ("main", "v2"), (first, "main")):
        with pytest.raises(UserError, match=f"has the revision {own}, and --dataset_revision is {given}; give one"):
            sources.commit_of(name.format(own), given)


@pytest.mark.parametrize("name", ["ada/emoji", "hf://datasets/ada/emoji@main/data/*.tar"])
@pytest.mark.parametrize("recipe", ["none", "auto"])
@pytest.mark.slow
def test_a_resumed_run_reads_the_commit_that_it_was_started_on(tmp_path, hub, monkeypatch, name, recipe):
    monkeypatch.setattr(tables, "BLOCK_ROWS", 4)
    folder = MAKERS["tar"](tmp_path / "shards")
    steps = ("--validation_fraction", "0", "--max_train_steps", "10", "--preview_epochs", "0", "--recipe", recipe)
    near = train(tmp_path / "near", *steps, "--dataset_name", str(folder))
    commit = upload(hub, folder)
    far = [*FLAGS, "--output_dir", str(tmp_path / "far"), *steps, "--dataset_name", name]
    with sigterm_in_step(2, train_latent_diffusion.LatentDiffusionPhase, monkeypatch):
        forget_accelerate()
        assert train_latent_diffusion.main(far) == 75
    assert commit in (tmp_path / "far/config.yaml").read_text()
    hub.put("ada/emoji", "data/00002.tar", None)
    restart()
    assert_same_state(train(tmp_path / "far", *steps, "--dataset_name", name), near)


@pytest.mark.slow
def test_processes_read_one_commit_although_the_dataset_changes_while_they_start(tmp_path, hub):
    folder = MAKERS["tar"](tmp_path / "shards")
    commit = upload(hub, folder)

    def push(request: Request) -> None:
        if request.path.startswith("/api/datasets/ada/emoji") and len(hub.repos["ada/emoji"].commits) == 1:
            hub.put("ada/emoji", "data/00002.tar", None)

    hub.after = push
    flags = [*FLAGS, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "2", "--dataset_name", "ada/emoji"]
    done = launch(ROOT / "training/train_latent_diffusion.py", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert len(hub.repos["ada/emoji"].commits) == 2
    listed = {found[1] for request in hub.requests if (found := re.search(r"/tree/(\w+)", request.path))}
    assert listed == {commit}


def test_inputs_that_are_made_first_read_the_commit_of_the_run(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = upload(hub, MAKERS["tar"](tmp_path / "shards"))
    words = ("--dataset_name", "ada/emoji", "--streaming", "true", "--denoiser", "unet", "--output_dir", "own")

    def commits() -> tuple[set[str], str]:
        """Return the commits in the commands for the inputs, and what is said about the images."""
        restart()
        config = parse_config(train_latent_diffusion.Config, words, complete=complete_latent_diffusion)
        assert len(config.prepare) == 3
        read = {re.findall(r"--dataset_revision (\w+)", line)[0] for line in config.prepare.values()}
        return read, str(config.announcements)

    whole = "ada/emoji: 28 images to train on"
    assert commits()[0] == {first}
    assert whole in commits()[1]
    hub.put("ada/emoji", "data/00002.tar", None)
    assert commits()[0] == {hub.repos["ada/emoji"].commits[1][0]}
    assert whole not in commits()[1]
    (tmp_path / "own").mkdir()
    RunFolder("own").save_config({"dataset_name": "ada/emoji", "dataset_revision": first, "output_dir": "own"})
    assert commits()[0] == {first}
    assert whole in commits()[1]


def test_another_dataset_is_evaluated_at_a_commit_of_its_own(tmp_path, hub):
    folder = MAKERS["tar"](tmp_path / "shards")
    files = {f.name: f.read_bytes() for f in folder.glob("*.tar")}
    first = hub.add_dataset("ada/emoji", files)
    hub.add_dataset("ada/other", {"00000.tar": files["00000.tar"]})
    hub.put("ada/emoji", "00002.tar", None)
    settings = {"dataset_name": "ada/emoji", "dataset_revision": first, "streaming": True, "resolution": 16}

    def images(**flags: str) -> int:
        data = open_evaluation_data(EvaluationDataConfig(split="train", **flags), settings, None)
        return len(data.conditions) + len(data.held_out)

    assert (images(), images(dataset_name="ada/emoji"), images(dataset_revision="main")) == (30, 30, 20)
    assert images(dataset_name="ada/other") == images(dataset_name="ada/other", dataset_revision="main") == 10


def test_controls_are_drawn_from_the_commit_of_the_run(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = upload(hub, MAKERS["parquet"](tmp_path / "shards"))
    hub.put("ada/emoji", "data/train-00002.parquet", None)
    words = ("--dataset_name", "ada/emoji", "--dataset_revision", first, "--streaming", "true", "--resolution", "16")
    config = parse_config(train_controlnet.Config, words, complete=complete_controlnet)
    flags = shlex.split(next(line for line in config.prepare.values() if "make_controls" in line))[1:]
    assert make_controls.main(flags) == 0
    assert len(load_split(DataConfig(dataset_name=config.dataset_name), "train", 0)) == 28


def test_the_commit_of_another_dataset_is_not_kept():
    saved = {"dataset_name": "ada/emoji", "dataset_revision": "f" * 40}
    for name, kept in (("ada/emoji", "f" * 40), ("ada/copy", "auto"), ("hf://datasets/ada/emoji", "auto")):
        config = config_of(name)
        config.keep(saved)
        assert config.dataset_revision == kept

"""Shards that are neither unpacked nor copied: rows equal those of unpacked data, damage is named, order is exact."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from pipelines.tools.cli import UserError
from training.core.batches import fetch
from training.core.draws import SampleKey
from training.core.layout import BatchLayout
from training.data import source
from training.data.checks import scan
from training.data.fingerprints import dataset_fingerprint
from training.data.images import BadRow, DataConfig, ImageDataset, load_label_map, load_split
from training.data.shards import places, tables
from training.data.shards.threads import map_in_threads
from training.engine.balance import BalanceConfig, balanced_strata
from training.engine.loading import MicroBatches

SHARDS, ROWS = 3, 10  # of each


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def image_bytes(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def tar_shard(file: Path, numbers: range, captions: str = "txt") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for number in numbers:
            text = f"number {number}"
            content = text if captions == "txt" else json.dumps({"caption": text, "width": 16})
            parts = {"png": image_bytes(number), captions: content.encode(), "cls": str(number % 3).encode()}
            for suffix, content in parts.items():
                info = tarfile.TarInfo(f"./{number:06d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def tars(folder: Path, captions: str = "txt") -> Path:
    for number in range(SHARDS):
        tar_shard(folder / f"{number:05d}.tar", range(number * ROWS, (number + 1) * ROWS), captions)
        (folder / f"{number:05d}_stats.json").write_text('{"count": 10}')
    return folder


def parquets(folder: Path) -> Path:
    """Write shards with row groups of four rows."""
    folder.mkdir(parents=True)
    for number in range(SHARDS):
        numbers = range(number * ROWS, (number + 1) * ROWS)
        features = {"image": datasets.Image(), "text": datasets.Value("string")}
        features |= {"label": datasets.ClassLabel(names=["0", "1", "2"])}
        rows = {
            "image": [{"bytes": image_bytes(i), "path": None} for i in numbers],
            "text": [f"number {i}" for i in numbers],
            "label": [i % 3 for i in numbers],
        }
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features)).data.table
        pyarrow.parquet.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=4)
    return folder


MAKERS = {"tar": tars, "parquet": parquets}


def config_of(source: Path, **settings: object) -> DataConfig:
    given = {"dataset_name": str(source), "resolution": 16, "streaming": True, "validation_fraction": 0, **settings}
    return DataConfig(**given)  # type: ignore[arg-type]


def opened(source: Path, split: str = "train", **settings: object) -> ImageDataset:
    config = config_of(source, **settings)
    return ImageDataset(load_split(config, split, 0), config, labels=True, label_map=load_label_map(config))


@pytest.mark.parametrize("kind", MAKERS)
def test_streamed_rows_equal_those_of_the_unpacked_data(tmp_path, kind):
    folder = MAKERS[kind](tmp_path / "shards")
    streamed, whole = opened(folder), opened(folder, streaming=False)
    assert len(streamed) == len(whole) == SHARDS * ROWS
    assert streamed.id2label == whole.id2label
    keys = [SampleKey(i, i) for i in range(len(whole))]
    for one, other in zip(streamed.__getitems__(keys), whole.__getitems__(keys), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert (one["caption"], one["label"]) == (other["caption"], other["label"])
    assert dataset_fingerprint(streamed) == dataset_fingerprint(whole)


@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_is_unpacked_or_copied(tmp_path, kind):
    """The cache has a table with captions and places, which is smaller than the images, and no image."""
    folder = MAKERS[kind](tmp_path / "shards")
    data = opened(folder)
    fetch(data, [SampleKey(i, 0) for i in range(len(data))])
    contents = [file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert contents
    assert not any(b"\x89PNG" in content for content in contents)


def test_captions_in_json_and_other_images_of_a_sample(tmp_path):
    assert load_split(config_of(tars(tmp_path / "shards", "json")), "train", 0)["text"][29] == "number 29"
    with tarfile.open(tmp_path / "masks.tar", "w") as archive:
        for name, number in (("a.png", 1), ("a.mask.png", 2), ("a.txt", None), ("__MACOSX/a.png", 3)):
            content = b" a  caption\n" if number is None else image_bytes(number)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    rows = load_split(config_of(tmp_path / "masks.tar"), "train", 0)
    assert rows.column_names == ["image", "mask", "text", tables.BLOCK_COLUMN]
    assert rows["text"][:] == ["a caption"]
    assert places.read_place(rows.data.column("mask")[0].as_py()["path"]) == image_bytes(2)


def test_splits_by_the_names_of_shards_and_one_shard_alone(tmp_path):
    for number, name in enumerate(("my-train-0000.tar", "my-train-0001.tar", "my-val-0000.tar")):
        tar_shard(tmp_path / "shards" / name, range(number * 4, number * 4 + 4))
    assert len(opened(tmp_path / "shards")) == 8
    assert len(load_split(config_of(tmp_path / "shards"), "validation", 0)) == 4
    assert len(opened(tmp_path / "shards/my-train-0001.tar")) == 4
    assert len(opened(tmp_path / "shards/*-train-*.tar")) == 8


def test_few_blocks_are_held_out_and_no_row_is_in_both(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_ROWS", 5)
    config = config_of(tars(tmp_path / "shards"), validation_fraction=0.2)
    train, held_out = (load_split(config, split, 0) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (24, 6)
    assert sorted([*train["text"], *held_out["text"]]) == sorted(f"number {i}" for i in range(30))
    assert len(set(held_out[tables.BLOCK_COLUMN])) == 2


def test_a_changed_shard_is_read_again_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    folder = tars(tmp_path / "shards")
    assert len(opened(folder)) == 30
    read = []
    original = tarfile.open

    def counted(name, *arguments, **options):
        read.append(Path(name).name)
        return original(name, *arguments, **options)

    tar_shard(folder / "00001.tar", range(100, 107))
    source._open_source.cache_clear()  # as a new process
    monkeypatch.setattr(tarfile, "open", counted)
    assert len(opened(folder)) == 27
    assert read == ["00001.tar"]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("end", [0.5, 0.51])  # of a tar file: between two files, and within one
def test_a_truncated_shard_is_named(tmp_path, kind, end):
    folder = MAKERS[kind](tmp_path / "shards")
    shard = sorted(folder.glob(f"*.{kind}"))[1]
    os.truncate(shard, int(end * shard.stat().st_size))
    with pytest.raises(UserError, match=f"the shard {shard} cannot be read .* is damaged or incomplete"):
        opened(folder)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_shard_that_disappears_or_shrinks_during_a_run_is_named(tmp_path, kind):
    folder = MAKERS[kind](tmp_path / "shards")
    data = opened(folder)
    shard = sorted(folder.glob(f"*.{kind}"))[2]
    os.truncate(shard, 100)
    with pytest.raises(BadRow, match=f"{shard.name}.*(truncated|cannot be read)"):
        data[SampleKey(29, 0)]
    assert scan(data).problems[0].where.startswith("row 20 (")
    shard.unlink()
    places._opened.cache_clear()
    places._parquet.cache_clear()
    with pytest.raises(BadRow, match="No such file"):
        data[SampleKey(29, 0)]


def test_what_cannot_be_streamed_is_refused(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "1.png").write_bytes(image_bytes(1))
    with pytest.raises(UserError, match="reads shards .* has none"):
        opened(folder)
    with pytest.raises(UserError, match="does not exist; check the path"):
        opened(Path("missing.tar"))
    with pytest.raises(UserError, match="cannot be read on the Hub"):  # the tests run offline
        opened(Path("somebody/on_the_hub"))
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as archive:
        archive.add(folder / "1.png", "1.png")
    with pytest.raises(UserError, match="or compressed"):
        opened(tmp_path / "zipped.tar")
    with pytest.raises(UserError, match="--aspect_buckets true cannot be combined"):
        config_of(tars(tmp_path / "shards"), aspect_buckets=True).validate()
    with pytest.raises(UserError, match="--balance_by label and --streaming"):
        balanced_strata(opened(tmp_path / "shards"), BalanceConfig(balance_by="label"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "texts.parquet")
    with pytest.raises(UserError, match="has no column of encoded images"):
        opened(tmp_path / "texts.parquet")
    with tarfile.open(tmp_path / "texts.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(UserError, match="has no images that can be read"):
        opened(tmp_path / "texts.tar")


def test_a_row_group_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_BYTES_OF_GROUP", 100)
    with pytest.raises(UserError, match="row_group_size=100"):
        opened(parquets(tmp_path / "shards"))


def test_row_groups_are_kept_up_to_a_size(tmp_path, monkeypatch):
    data = opened(parquets(tmp_path / "shards"))
    monkeypatch.setattr(places, "KEPT_BYTES", 8000)
    places.forget()
    fetch(data, [SampleKey(i, 0) for i in range(len(data))])
    groups = places._KEPT
    assert 0 < sum(column.nbytes for column, _ in groups._values.values()) == groups.nbytes <= 8000


def micro_batches(data: ImageDataset, layout: BatchLayout, workers: int = 0) -> MicroBatches:
    device = torch.device("cpu")
    return MicroBatches(data, layout, seed=5, strata=None, num_workers=workers, device=device)


@pytest.mark.parametrize("kind", MAKERS)
def test_order_is_exact_for_any_start_split_and_number_of_workers(tmp_path, monkeypatch, kind):
    """Each row is seen once per epoch; batches are the same from a later step on, with two processes and workers."""
    monkeypatch.setattr(tables, "BLOCK_ROWS", 4)
    data = opened(MAKERS[kind](tmp_path / "shards"), shuffle_buffer=10)
    whole = [step[0] for step in micro_batches(data, BatchLayout(5)).steps(0, 12)]
    for epoch in (whole[:6], whole[6:]):
        assert sorted(torch.cat([batch["index"] for batch in epoch]).tolist()) == list(range(30))
    assert [batch["caption"] for batch in whole[:6]] != [batch["caption"] for batch in whole[6:]]
    resumed = [step[0] for step in micro_batches(data, BatchLayout(5), workers=2).steps(7, 12)]
    for one, other in zip(resumed, whole[7:], strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert one["caption"] == other["caption"]
    four = [step[0] for step in micro_batches(data, BatchLayout(4)).steps(0, 7)]
    halves = [[s[0] for s in micro_batches(data, BatchLayout(2, 2, rank=rank)).steps(0, 7)] for rank in range(2)]
    for one, first, second in zip(four, *halves, strict=True):
        assert torch.equal(one["pixel_values"], torch.cat([first["pixel_values"], second["pixel_values"]]))


def test_the_first_error_of_several_threads_is_raised_without_waiting_for_the_others():
    begun, ended, may_end = [], [], threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise UserError("no shard")
        may_end.wait(20)
        ended.append(number)

    with pytest.raises(UserError, match="no shard"):
        map_in_threads(work, range(1000), 2, "work")
    assert not ended
    assert len(begun) <= 3
    may_end.set()

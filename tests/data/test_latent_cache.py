"""The latent cache: equal to encoding on the fly, resumed after a kill, shared by processes, refused for other runs."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from data_scripts import precompute_latents
from pipelines.common.latents import posterior_moments
from pipelines.latent_diffusion import tokenize_captions
from pipelines.tools.cli import UserError
from tests.conftest import ROOT
from tests.support.forks import Fork, warm_interpreter
from tests.support.loaders import read_to_the_end
from tests.support.runs import launch
from tests.support.tiny_models import tiny_tokenizer, tiny_vae
from training.core.batches import fetch
from training.core.draws import SampleKey
from training.core.made_folders import lock_of
from training.data.fingerprints import vae_fingerprint
from training.data.images import DataConfig, ImageDataset, load_split
from training.data.latent_cache.check import check_cache
from training.data.latent_cache.dataset import LatentCache
from training.data.latent_cache.format import captions_of_rows, read_shard, write_shard
from training.data.tokenization import CaptionTokens
from training.data.transforms import flips
from training.engine.balance import BalanceConfig, balanced_strata
from training.models.vae_loading import load_vae

ROWS, VALIDATION_ROWS, SHARD_ROWS = 62, 5, 4
LATENTS = (4, 8, 8)  # shape of the latents of tiny_vae at 16 px


def save_images(folder: Path, *, mask_seed: int | None = None) -> Path:
    """Save Parquet files with captions, classes, and images of the training size.

    With `mask_seed`, also save masks of four classes with some unlabelled pixels, and a second column of classes.
    """
    generator = np.random.default_rng(0)
    features: dict[str, Any] = {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["even", "odd"]),
    }
    for split, rows in (("train", ROWS), ("validation", VALIDATION_ROWS)):
        images = [Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(rows)]
        columns: dict[str, list] = {
            "image": images,
            "text": [f"{split} {i} – café" for i in range(rows)],
            "label": [i % 2 for i in range(rows)],
        }
        if mask_seed is not None:
            ids = np.random.default_rng(mask_seed).choice([0, 1, 2, 3, 255], (rows, 16, 16)).astype(np.uint8)
            columns |= {"mask": [Image.fromarray(mask) for mask in ids]}
            columns |= {"source": ["rare" if i % 10 == 3 else "common" for i in range(rows)]}
            features |= {"mask": datasets.Image(), "source": datasets.Value("string")}
        dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


def flags(data: Path, vae: Path, output: Path, *more: str) -> list[str]:
    words = f"--dataset_name {data} --vae {vae} --output_dir {output} --resolution 16 --shard_rows {SHARD_ROWS}"
    return [*words.split(), "--encode_batch_size", "3", "--cpu_threads", "1", "--random_flip", "true", *more]


def precompute(*arguments: str) -> int | None:
    return precompute_latents.main(list(arguments))


@pytest.fixture(scope="module")
def cache_folder(data: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "latents"
    assert precompute(*flags(data, vae_folder, folder)) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def config_of(data: Path, **settings: object) -> DataConfig:
    return DataConfig(**{"dataset_name": str(data), "resolution": 16, "random_flip": True, **settings})  # type: ignore[arg-type]


# --- reading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cached_equals_encoding_on_the_fly(data: Path, vae_folder: Path, cache_folder: Path):
    torch.set_num_threads(1)
    vae = load_vae(str(vae_folder))
    cache = LatentCache(cache_folder)
    assert cache.splits == ["train", "validation"]
    assert cache.latent_shape == LATENTS
    assert cache.id2label == {0: "even", 1: "odd"}
    config = config_of(data)
    for split, augment in (("train", True), ("validation", False)):
        cached = cache.split(split, random_flip=augment)
        live = ImageDataset(load_split(config, split, 0), config, labels=True, augment=augment)
        assert len(cached) == len(live)
        keys = [SampleKey(i, 1000 + i) for i in range(len(live))]
        assert {flips(key.key) for key in keys} == {True, False}
        for one, other in zip(cached.__getitems__(keys), live.__getitems__(keys)):
            mean, logvar = posterior_moments(vae, other["pixel_values"][None])
            torch.testing.assert_close(one["mean"], mean[0], atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(one["logvar"], logvar[0], atol=2e-6, rtol=1e-5)
            assert (one["caption"], one["label"], one["index"]) == (other["caption"], other["label"], other["index"])


@pytest.mark.parametrize("storage_dtype", ["float32", "float16"])
def test_a_batch_has_the_stored_row_of_each_key(masked: Path, vae_folder: Path, tmp_path: Path, storage_dtype: str):
    """Rows of several shards, in any order and some of them twice, read one by one for comparison."""
    assert precompute(*flags(masked, vae_folder, tmp_path / "latents", "--storage_dtype", storage_dtype)) == 0
    dataset = LatentCache(tmp_path / "latents").split("train", random_flip=True, num_mask_classes=4)
    keys = [SampleKey(row, 7 * place) for place, row in enumerate((9, 2, 61, 2, 10, 60, 0, 2, 33))]
    batch = fetch(dataset, keys)
    assert list(batch) == ["mean", "logvar", "caption", "label", "mask", "index"]
    for place, key in enumerate(keys):
        file = tmp_path / f"latents/train/shard-{key.index // SHARD_ROWS:05d}.safetensors"
        shard, row, flipped = read_shard(file), key.index % SHARD_ROWS, flips(key.key)
        for name in ("mean", "logvar"):
            assert batch[name].dtype == torch.float32
            assert torch.equal(batch[name][place], shard[name][row, int(flipped)].float())
        mask = shard["mask"][row].long()
        assert torch.equal(batch["mask"][place], mask.flip(-1) if flipped else mask)
        assert batch["caption"][place] == f"train {key.index} – café"
        assert (batch["label"][place], batch["index"][place]) == (key.index % 2, key.index)
        assert torch.equal(dataset[key]["mean"], batch["mean"][place])
    assert {flips(key.key) for key in keys} == {True, False}
    one_by_one = dataset.collate([dataset[key] for key in keys])
    assert one_by_one.keys() == batch.keys()
    assert one_by_one["caption"] == batch["caption"]
    assert all(torch.equal(one_by_one[name], batch[name]) for name in batch if name != "caption")


def test_several_captions_of_a_row_are_read(tmp_path: Path):
    captions = ["one", ["two", "zwei – ü"], "", ["three", "four", "five"]]
    write_shard(tmp_path / "shard-00000.safetensors", {"row": torch.arange(4)}, captions, "request")
    shard = read_shard(tmp_path / "shard-00000.safetensors")
    assert captions_of_rows(shard, torch.tensor([3, 1, 0, 2, 1])) == [captions[i] for i in (3, 1, 0, 2, 1)]


def test_flips_of_cached_latents_are_not_frozen(cache_folder: Path):
    dataset = LatentCache(cache_folder).split("train", random_flip=True)
    means = [dataset[SampleKey(3, key)]["mean"] for key in range(30)]
    variants = {mean.numpy().tobytes() for mean in means}
    assert len(variants) == 2
    assert all(
        torch.equal(mean, means[[flips(k) for k in range(30)].index(flips(key))]) for key, mean in enumerate(means)
    )
    steady = LatentCache(cache_folder).split("train")
    assert len({steady[SampleKey(3, key)]["mean"].numpy().tobytes() for key in range(30)}) == 1


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("masked"), mask_seed=1)


@pytest.fixture(scope="module")
def masked_cache(masked: Path, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "masked"
    assert precompute(*flags(masked, vae_folder, folder)) == 0
    return folder


def test_masks_and_classes_are_those_of_the_images(masked: Path, masked_cache: Path, vae_folder: Path):
    cache, config = LatentCache(masked_cache), config_of(masked)
    assert cache.mask_column == "mask"
    cached = cache.split("train", random_flip=True, num_mask_classes=4)
    live = ImageDataset(load_split(config, "train", 0), config, labels=True, num_mask_classes=4)
    keys = [SampleKey(i, 1000 + i) for i in range(len(live))]
    for one, other in zip(cached.__getitems__(keys), live.__getitems__(keys)):
        assert one["mask"].dtype == other["mask"].dtype == torch.int64
        assert torch.equal(one["mask"], other["mask"])
        assert one["label"] == other["label"]
    assert {flips(key.key) for key in keys} == {True, False}
    assert cached.collate([cached[keys[0]], cached[keys[1]]])["mask"].shape == (2, 16, 16)
    assert "mask" not in cache.split("train")[keys[0]]
    # A run without masks need not name their column.
    for column in ("mask", "other"):
        check_cache(cache, load_vae(str(vae_folder)), str(vae_folder), config_of(masked, mask_column=column))
    with pytest.raises(UserError, match="those of column 'mask', but this run uses 'other'; set --mask_column mask"):
        cache.split("train", num_mask_classes=4, config=config_of(masked, mask_column="other"))


def test_missing_or_mismatched_masks_are_refused(
    data: Path, masked: Path, masked_cache: Path, cache_folder: Path, vae_folder: Path, tmp_path: Path
):
    with pytest.raises(UserError, match="no masks; make it again with --masks yes"):
        LatentCache(cache_folder).split("train", num_mask_classes=4)
    with pytest.raises(UserError, match=r"class id 3 of a mask in split 'train'.*beyond the 3 classes"):
        LatentCache(masked_cache).split("train", num_mask_classes=3)
    (tmp_path / "changed").mkdir()
    changed = save_images(tmp_path / "changed", mask_seed=2)
    with pytest.raises(UserError, match="dataset: split 'train'"):
        check_cache(LatentCache(masked_cache), load_vae(str(vae_folder)), "v", config_of(changed))
    copy = tmp_path / "copy"
    shutil.copytree(masked_cache, copy)
    with pytest.raises(UserError, match="mask_column mask there, None here"):
        precompute(*flags(masked, vae_folder, copy, "--masks", "no"))
    with pytest.raises(UserError, match="no column 'mask'.*--mask_column"):
        precompute(*flags(data, vae_folder, tmp_path / "new", "--masks", "yes"))


def test_a_cache_without_masks_has_the_same_files_as_before_masks(
    masked: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path
):
    """Caches from before masks were supported are still read, and the command that made one finds it complete."""
    assert precompute(*flags(masked, vae_folder, tmp_path / "latents", "--masks", "no")) == 0
    assert contents(tmp_path / "latents") == contents(cache_folder)
    assert set(LatentCache(cache_folder).manifest) & {"mask_column", "label_column"} == set()


def test_cached_rows_are_balanced_by_their_labels_or_by_any_column_of_the_dataset(masked: Path, masked_cache: Path):
    cache = LatentCache(masked_cache)
    alone, named = cache.split("train"), cache.split("train", config=config_of(masked))
    for dataset in (alone, named):
        strata = balanced_strata(dataset, BalanceConfig("label", 1.0))
        assert strata.group_of_row.tolist() == [i % 2 for i in range(ROWS)]
    strata = balanced_strata(named, BalanceConfig("source", 0.5))
    assert strata.group_of_row.tolist() == [int(i % 10 == 3) for i in range(ROWS)]
    assert float(strata.shares[1]) == pytest.approx(6**0.5 / (6**0.5 + 56**0.5))
    with pytest.raises(UserError, match="holds 'label'.*--dataset_name.*--label_column source"):
        balanced_strata(alone, BalanceConfig("source", 1.0))


def test_workers_read_the_same_batches(cache_folder: Path):
    tokens = CaptionTokens(tiny_tokenizer(), 8, "max_length")
    dataset = LatentCache(cache_folder).split("train", random_flip=True, caption_tokens=tokens)
    keys = [[SampleKey(i, i) for i in range(start, start + 5)] for start in (0, 5)]
    loaders = [DataLoader(dataset, batch_sampler=keys, collate_fn=dataset.collate, num_workers=n) for n in (0, 1)]
    for one, other in zip(*map(list, loaders)):
        assert one["mean"].shape == (5, *LATENTS)
        assert torch.equal(one["mean"], other["mean"])
        assert torch.equal(one["label"], other["label"])
        assert one["caption"] == other["caption"]
        assert torch.equal(one["input_ids"], tokenize_captions(tiny_tokenizer(), one["caption"], 8))
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_shards_are_mapped_and_not_loaded(tmp_path: Path):
    save_file({"mean": torch.zeros(25_000_000)}, tmp_path / "large.safetensors")
    process = psutil.Process()
    before = process.memory_info().rss
    shard = read_shard(tmp_path / "large.safetensors")
    assert float(shard["mean"][12345:12350].sum()) == 0
    assert process.memory_info().rss - before < 20e6


# --- matching a run --------------------------------------------------------------------------------------------------


def test_few_of_many_shards_are_open_at_once(cache_folder: Path, monkeypatch: pytest.MonkeyPatch):
    keys = [SampleKey(row, row) for row in torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()]
    expected = LatentCache(cache_folder).split("train")
    monkeypatch.setattr("training.data.latent_cache.dataset.MOST_OPEN_SHARDS", 2)
    dataset = LatentCache(cache_folder).split("train")
    for start in range(0, ROWS, 8):
        one, other = (fetch(data, keys[start : start + 8]) for data in (dataset, expected))
        assert one["caption"] == other["caption"]
        assert torch.equal(one["mean"], other["mean"])
    files = {mapped.path for mapped in psutil.Process().memory_maps() if str(cache_folder) in mapped.path}
    assert len(dataset._open) == 2
    assert len(files) >= 2  # those of `expected` are open as well


def test_the_right_vae_and_data_are_accepted(data: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path):
    shutil.copytree(data, tmp_path / "moved")
    cache = LatentCache(cache_folder)
    check_cache(cache, load_vae(str(vae_folder)), str(vae_folder))
    check_cache(cache, load_vae(str(vae_folder)), str(vae_folder), config_of(data))
    check_cache(cache, load_vae(str(vae_folder)), str(vae_folder), config_of(tmp_path / "moved", random_flip=False))


def test_a_cache_from_before_colour_profiles_is_used_with_a_warning(
    data: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path, caplog
):
    older = Path(shutil.copytree(cache_folder, tmp_path / "cache"))
    manifest = older / "cache.json"
    manifest.write_text(manifest.read_text().replace('"v2 16px', '"v1 16px'))
    vae = load_vae(str(vae_folder))
    check_cache(LatentCache(older), vae, "v", config_of(data))
    assert "did not convert embedded colour profiles" in caplog.text
    manifest.write_text(manifest.read_text().replace('"v1 16px', '"v0 16px'))
    with pytest.raises(UserError, match="transform: the cache has 'v0 16px"):
        check_cache(LatentCache(older), vae, "v", config_of(data))


def test_another_vae_transform_or_dataset_is_refused(data: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path):
    vae, cache = load_vae(str(vae_folder)), LatentCache(cache_folder)
    other = load_vae(str(vae_folder))
    with torch.no_grad():
        next(other.parameters()).flatten()[0] += 1e-3
    rescaled = load_vae(str(vae_folder))
    rescaled.register_to_config(scaling_factor=0.5)
    for changed in (other, rescaled):
        with pytest.raises(UserError, match="VAE: the cache was made with") as error:
            check_cache(cache, changed, "other/vae", config_of(data))
        assert vae_fingerprint(changed)[:12] in str(error.value)
        assert vae_fingerprint(vae)[:12] in str(error.value)
        assert "--vae other/vae" in str(error.value)
        assert "--overwrite true" in str(error.value)
    with pytest.raises(UserError, match="transform: the cache has 'v2 16px.*this run has 'v2 32px") as error:
        check_cache(cache, vae, "v", config_of(data, resolution=32))
    assert "--resolution 32" in str(error.value)
    changed_data = tmp_path / "changed"
    shutil.copytree(data, changed_data)
    rows = datasets.Dataset.from_parquet(str(changed_data / "train-00000-of-00001.parquet"))
    rows.map(lambda row, i: {"text": "other" if i == 7 else row["text"]}, with_indices=True).to_parquet(
        changed_data / "train-00000-of-00001.parquet"
    )
    with pytest.raises(UserError, match="dataset: split 'train'") as error:
        check_cache(cache, vae, "v", config_of(changed_data))
    assert "split 'validation'" not in str(error.value)


def test_flips_need_a_cache_with_mirrored_latents(data: Path, vae_folder: Path, tmp_path: Path):
    precompute(*flags(data, vae_folder, tmp_path / "plain", "--random_flip", "false", "--splits", "[validation]"))
    cache = LatentCache(tmp_path / "plain")
    with pytest.raises(UserError, match="no mirrored images"):
        cache.split("validation", random_flip=True)
    with pytest.raises(UserError, match="no mirrored images"):
        check_cache(cache, load_vae(str(vae_folder)), "v", config_of(data))
    with pytest.raises(UserError, match="no split 'train'"):
        cache.split("train")


def test_a_cache_that_is_absent_unfinished_or_damaged_is_refused(cache_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        LatentCache(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(cache_folder, copy)
    shard = copy / "train" / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{len(whole) - 1} bytes instead of {len(whole)}"):
        LatentCache(copy)
    shard.unlink()
    with pytest.raises(UserError, match="lacks the file train/shard-00001.safetensors"):
        LatentCache(copy)
    for torn in ('{"splits": {"train"', "[]", '{"splits": 3}', "\0\0", '{"splits": {"train": {"shards": [{}]}}}'):
        (copy / "cache.json").write_text(torn)
        with pytest.raises(UserError, match=r"has a damaged cache.json; make or complete it"):
            LatentCache(copy)
    (copy / "cache.json").unlink()
    with pytest.raises(UserError, match="has not been finished"):
        LatentCache(copy)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_in_a_shard_is_found_when_it_is_first_read(cache_folder: Path, tmp_path: Path, workers: int):
    copy = tmp_path / "copy"
    shutil.copytree(cache_folder, copy)
    shard = copy / "train" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    rows = LatentCache(copy).split("train")
    keys = [[SampleKey(row, 0)] for row in range(len(rows))]
    loader = DataLoader(rows, batch_sampler=keys, collate_fn=rows.collate, num_workers=workers)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^.*shard-00001.safetensors is damaged \(its SHA-256 .*to repair it$"):
        read_to_the_end(loader)
    assert rows[SampleKey(0, 0)]["index"] == 0  # the other shards can be read


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_made_again(data: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(cache_folder, copy)
    before = contents(copy)
    shard = copy / "train" / "shard-00002.safetensors"
    broken = bytearray(shard.read_bytes())
    broken[-1] ^= 1  # the same size
    shard.write_bytes(broken)
    # Files left by a killed process of this or an earlier version.
    (copy / "train" / "shard-00000.json").write_text('["not", "a note"]')
    (copy / ".writing-4711-cache.json").touch()
    for name in (".shard-00002.safetensors.tmp4711", "shard-00002.tmp", ".writing-4711-shard-00002.safetensors"):
        (copy / "train" / name).write_bytes(broken[:100])
    untouched = (copy / "train" / "shard-00001.safetensors").stat().st_mtime_ns
    assert precompute(*flags(data, vae_folder, copy)) == 0
    assert contents(copy) == before
    assert (copy / "train" / "shard-00001.safetensors").stat().st_mtime_ns == untouched


SCRIPT = ROOT / "data_scripts/precompute_latents.py"


def start(arguments: list[str]) -> Fork:
    return warm_interpreter().start(SCRIPT, *arguments)


def wait_for_shards(folder: Path, count: int, process: Fork) -> None:
    while len(list(folder.rglob("shard-*.json"))) < count:
        assert process.poll() is None, process.output
        time.sleep(0.002)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_interrupted_and_resumed_equals_uninterrupted(
    data: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path, number: signal.Signals
):
    folder = tmp_path / "latents"
    arguments = flags(data, vae_folder, folder)
    process = start(arguments)
    wait_for_shards(folder, 2, process)
    process.send_signal(number)
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGINT: 130}
    assert process.wait() == expected[number], process.output
    assert not (folder / "cache.json").exists()
    assert number == signal.SIGKILL or "run the same command again to resume" in process.output
    assert precompute(*arguments) == 0
    assert contents(folder) == contents(cache_folder)


def test_two_makers_of_a_cache_at_once(data: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path):
    processes = [start(flags(data, vae_folder, tmp_path / "latents")) for _ in range(2)]
    statuses = [process.wait() for process in processes]
    outputs = [process.output for process in processes]
    assert sorted(statuses) in ([0, 0], [0, 2]), outputs
    for output, status in zip(outputs, statuses):
        assert "Traceback" not in output
        assert status == 0 or "another process is making" in output
    assert contents(tmp_path / "latents") == contents(cache_folder)


def test_a_cache_that_is_being_made_is_refused_and_a_killed_maker_does_not_hold_it(
    data: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path
):
    folder = tmp_path / "latents"
    with lock_of(folder), pytest.raises(UserError, match="another process is making"):
        precompute(*flags(data, vae_folder, folder))
    process = start(flags(data, vae_folder, folder, "--dataloader_num_workers", "2"))
    wait_for_shards(folder, 2, process)
    process.kill()
    assert precompute(*flags(data, vae_folder, folder)) == 0
    assert contents(folder) == contents(cache_folder)


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(data: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path):
    folder = tmp_path / "latents"
    done = launch(SCRIPT, *flags(data, vae_folder, folder), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(folder) == contents(cache_folder)
    assert "Latents are in" in done.stdout


def test_independent_jobs_give_the_same_bytes_in_any_order(
    data: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Three jobs, one of which is killed and started again, and two of which run at the same time."""
    folder = tmp_path / "latents"
    shares = [flags(data, vae_folder, folder, "--num_jobs", "3", "--job_index", str(job)) for job in range(3)]
    killed = start(shares[1])
    wait_for_shards(folder, 1, killed)
    killed.kill()
    killed.wait()
    at_the_same_time = start(shares[2])
    assert precompute(*shares[0]) == 0
    assert "The share of job 0 is complete" in capsys.readouterr().out
    assert at_the_same_time.wait() == 0, at_the_same_time.output
    assert not (folder / "cache.json").exists()
    assert precompute(*shares[1]) == 0
    assert "Latents are in" in capsys.readouterr().out
    assert contents(folder) == contents(cache_folder)


def test_the_same_job_twice_is_refused(data: Path, vae_folder: Path, tmp_path: Path):
    with (
        lock_of(tmp_path / "latents.job-1-of-2"),
        pytest.raises(UserError, match="another process is making the share of job 1"),
    ):
        precompute(*flags(data, vae_folder, tmp_path / "latents", "--num_jobs", "2", "--job_index", "1"))


def test_a_cache_with_other_settings_is_not_overwritten(
    data: Path, vae_folder: Path, cache_folder: Path, tmp_path: Path
):
    copy = tmp_path / "copy"
    shutil.copytree(cache_folder, copy)
    before = contents(copy)
    other = flags(data, vae_folder, copy, "--storage_dtype", "float16")
    with pytest.raises(UserError, match="storage_dtype float32 there, float16 here"):
        precompute(*other)
    assert contents(copy) == before
    assert precompute(*other, "--overwrite", "true") == 0
    small, exact = LatentCache(copy).split("train"), LatentCache(cache_folder).split("train")
    mean = small[SampleKey(0, 0)]["mean"]
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, exact[SampleKey(0, 0)]["mean"], atol=1e-3, rtol=1e-3)
    assert (copy / "train" / "shard-00000.safetensors").stat().st_size < 0.6 * len(
        before["train/shard-00000.safetensors"]
    )


def test_a_vae_without_a_posterior_and_rows_without_captions(tmp_path: Path, data: Path):
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "pipeline" / "vae")
    arguments = flags(data, tmp_path / "pipeline", tmp_path / "latents", "--caption_column", "", "--labels", "no")
    assert precompute(*arguments, "--splits", "[validation]") == 0
    item = LatentCache(tmp_path / "latents").split("validation")[SampleKey(1, 0)]
    assert sorted(item) == ["index", "mean"]
    assert item["mean"].shape == LATENTS


def test_all_of_several_captions_are_kept(tmp_path: Path, vae_folder: Path, data: Path):
    rows = datasets.load_dataset(str(data), split="validation").remove_columns("text")
    rows = rows.add_column("text", [["one", "two", "three"]] * len(rows))
    rows.to_parquet(tmp_path / "train.parquet")
    arguments = flags(tmp_path / "train.parquet", vae_folder, tmp_path / "latents", "--splits", "[train]")
    assert precompute(*arguments, "--validation_fraction", "0") == 0
    dataset = LatentCache(tmp_path / "latents").split("train")
    assert {dataset[SampleKey(0, key)]["caption"] for key in range(50)} == {"one", "two", "three"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--center_crop", "false"], "--center_crop true"),
        (["--crop_scale", "0.5"], "crop_scale is 0.5, but each image is encoded only once"),
        (["--resolution", "17"], "--resolution"),
        (["--vae", "nowhere/at/all"], "check --vae"),
        (["--vae", "DATA"], "no VAE in"),
        (["--caption_column", "txt"], "did you mean 'text'"),
        (["--shard_rows", "0"], "--shard_rows"),
        (["--output_dir", "/proc/nothing"], "--output_dir"),
        (["--vea", "x"], "did you mean 'vae'"),
    ],
)
def test_mistakes_are_user_errors(data: Path, vae_folder: Path, tmp_path: Path, changed: list[str], message: str):
    words = [str(data) if word == "DATA" else word for word in changed]
    with pytest.raises(UserError, match=message):
        precompute(*flags(data, vae_folder, tmp_path / "latents", *words))


def test_broken_images_are_named_before_encoding_starts(tmp_path: Path, vae_folder: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (i, i, i)).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"broken")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "" if i == 1 else "a"}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    arguments = flags(folder, vae_folder, tmp_path / "latents", "--validation_fraction", "0")
    with pytest.raises(UserError, match="2 of 4 rows"):
        precompute(*arguments)
    assert precompute(*arguments, "--on_bad_sample", "skip") == 0
    dataset = LatentCache(tmp_path / "latents").split("train")
    torch.testing.assert_close(dataset[SampleKey(1, 0)]["mean"], dataset[SampleKey(3, 0)]["mean"])

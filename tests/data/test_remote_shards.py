"""Shards at URLs: the same rows as of local shards, few requests, nothing on the disk, and errors that name the URL."""

from __future__ import annotations

import gc
import io
import re
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from pipelines.tools.cli import UserError
from tests.data.test_shards import MAKERS, ROWS, SHARDS, config_of, image_bytes, micro_batches, opened, tar_shard
from tests.support.child import wait_until
from tests.support.shard_server import server
from training.core.batches import fetch
from training.core.draws import SampleKey
from training.core.layout import BatchLayout
from training.data import fingerprints, source
from training.data.checks import scan
from training.data.fingerprints import dataset_fingerprint
from training.data.images import ImageDataset, load_split
from training.data.shards import places, remote, sources, tables
from training.data.shards.remote import RemoteError
from training.data.shards.remote_file import RemoteFile

__all__ = ["server"]
PATTERNS = {"tar": "{00000..00002}.tar", "parquet": "train-{00000..00002}.parquet"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(remote, "PAUSES", (0.01,) * 4)
    monkeypatch.setattr(remote, "PAUSES_AT_START", (0.01,) * 3)
    restart()


def restart() -> None:
    """Forget what this process knows, as a new one."""
    source._open_source.cache_clear()
    places.forget()


def rows(data) -> list[dict]:
    return [data[SampleKey(i, 0)] for i in range(len(data))]


def parquet_shard(file: Path, numbers: range) -> None:
    """Write a shard with row groups of 40 rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": image_bytes(i), "path": None} for i in numbers]
    table = {"image": images, "text": [f"number {i}" for i in numbers], "label": [i % 3 for i in numbers]}
    pyarrow.parquet.write_table(pyarrow.table(table), file, row_group_size=40)


@pytest.mark.parametrize("kind", MAKERS)
def test_remote_rows_equal_local_ones(tmp_path, server, kind):
    folder = MAKERS[kind](tmp_path / "shards")
    far, near = opened(f"{server.url}/{PATTERNS[kind]}"), opened(folder)
    assert len(far) == SHARDS * ROWS
    for one, other in zip(rows(far), rows(near), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert (one["caption"], one["label"]) == (other["caption"], other["label"])
    assert dataset_fingerprint(far) == dataset_fingerprint(near)
    assert scan(far).complete


@pytest.mark.parametrize("kind", MAKERS)
def test_loader_processes_read_the_same_batches(tmp_path, server, monkeypatch, kind):
    """They are forked from a process that has connections, threads and images in memory."""
    monkeypatch.setattr(tables, "BLOCK_ROWS", 4)
    folder = MAKERS[kind](tmp_path / "shards")
    far, near = opened(f"{server.url}/{PATTERNS[kind]}", shuffle_buffer=10), opened(folder, shuffle_buffer=10)
    assert scan(far).complete
    there = list(micro_batches(far, BatchLayout(5), workers=2).steps(0, 7))
    for one, other in zip(there, micro_batches(near, BatchLayout(5)).steps(0, 7), strict=True):
        assert torch.equal(one[0]["pixel_values"], other[0]["pixel_values"])
        assert one[0]["caption"] == other[0]["caption"]


@pytest.mark.parametrize("kind", MAKERS)
def test_an_epoch_receives_each_byte_about_once(tmp_path, server, monkeypatch, kind):
    """Blocks of 40 rows are one range each, with a window of several blocks; no image is written."""
    monkeypatch.setattr(tables, "BLOCK_ROWS", 40)
    folder = tmp_path / "shards"
    for number in range(SHARDS):
        if kind == "tar":
            tar_shard(folder / f"{number:05d}.tar", range(number * 120, (number + 1) * 120))
        else:  # larger, since the last 64 KiB of each file are received for its index
            parquet_shard(folder / f"train-{number:05d}.parquet", range(number * 480, (number + 1) * 480))
    data = opened(f"{server.url}/{PATTERNS[kind]}", shuffle_buffer=100)
    data._kept = None  # decoded images are kept in memory as well, which would hide that they are received again
    places.forget()
    server.answers.clear()
    for _ in micro_batches(data, BatchLayout(8)).steps(0, len(data) // 8):
        pass
    whole = sum(file.stat().st_size for file in folder.glob(f"*.{kind}"))
    blocks = len(data.row_blocks.starts) - 1
    assert server.sent <= 1.2 * whole
    assert len(server.answers) == blocks if kind == "tar" else len(server.answers) <= blocks + 2 * SHARDS
    contents = [file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert contents
    assert not any(b"\x89PNG" in content for content in contents)


def test_a_window_larger_than_the_memory_requests_images_alone(tmp_path, server, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_ROWS", 5)
    folder = MAKERS["tar"](tmp_path / "shards")
    data = opened(f"{server.url}/{PATTERNS['tar']}", shuffle_buffer=12)
    data._kept = None
    monkeypatch.setattr(places, "KEPT_BYTES", 15_000)
    assert "each image is requested alone" in data.remote.problem(12)
    places.forget()
    server.answers.clear()
    images = [step[0]["pixel_values"] for step in micro_batches(data, BatchLayout(5)).steps(0, 6)]
    assert len(server.answers) == 30
    assert server.sent == sum(len(image_bytes(i)) for i in range(30))
    near = micro_batches(opened(folder, shuffle_buffer=12), BatchLayout(5)).steps(0, 6)
    assert all(torch.equal(one, step[0]["pixel_values"]) for one, step in zip(images, near, strict=True))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_start_with_many_remote_rows_receives_a_few_blocks(tmp_path, server, monkeypatch, kind):
    """Three images of two of the six blocks of five or four rows; of a Parquet file, these two row groups."""
    monkeypatch.setattr(tables, "BLOCK_ROWS", 5)
    monkeypatch.setattr(fingerprints, "SAMPLED_IMAGES", 20)
    monkeypatch.setattr(fingerprints, "SAMPLED_BLOCKS", 2)
    monkeypatch.setattr(fingerprints, "SAMPLED_IN_BLOCK", 3)
    monkeypatch.setattr(places, "KEPT_BYTES", 12_000)
    MAKERS[kind](tmp_path / "shards")
    data = opened(f"{server.url}/{PATTERNS[kind]}")
    server.answers.clear()
    assert len(dataset_fingerprint(data)) == 64
    assert len(server.answers) == (6 if kind == "tar" else 2 + 2 * 2)
    places.forget()
    server.answers.clear()
    reports = [scan(data, shard=(rank, 2)) for rank in range(2)]
    last = 2 if kind == "parquet" else 3  # the last row group has two rows
    assert sorted(report.images_checked for report in reports) == sorted([3, last])
    assert len(server.answers) == (6 if kind == "tar" else 2 + 2 * 2)


def test_row_groups_that_do_not_fit_into_memory_are_refused(tmp_path, server, monkeypatch):
    MAKERS["parquet"](tmp_path / "shards")
    data = opened(f"{server.url}/{PATTERNS['parquet']}")
    assert data.remote.problem(12) is None
    monkeypatch.setattr(places, "KEPT_BYTES", 12_000)
    with pytest.raises(UserError, match=r"each row group would be received many times; give --shuffle_buffer \d"):
        data.remote.problem(12)


def test_row_groups_of_one_file_are_received_at_the_same_time_and_the_file_is_not_kept_open(tmp_path, server):
    MAKERS["parquet"](tmp_path / "shards")
    data = opened(f"{server.url}/train-00000.parquet")
    data._kept = None
    gc.collect()
    server.seconds, server.most_at_once = 0.1, 0
    fetch(data, [SampleKey(i, 0) for i in (0, 4, 8)])
    assert server.most_at_once == 3
    # Arrow's threads let go of a file some moments after its rows are there.
    wait_until(lambda: not open_files(server.url))


def open_files(url: str) -> list[RemoteFile]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, RemoteFile) and thing._url.startswith(url)]


def test_only_headers_of_large_images_and_small_columns_are_received_at_the_start(tmp_path, server):
    """Images of 3 MB in a tar file, and of a megabyte in row groups of a Parquet file."""
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/large.tar", "w") as archive:
        for number in range(8):
            for name, content in ((f"{number}.png", bytes(3_000_000)), (f"{number}.txt", b"a")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    load_split(config_of(f"{server.url}/large.tar"), "train", 0)
    assert len(server.answers) < 20
    assert server.sent < 1_000_000
    server.answers.clear()
    noise = np.random.default_rng(0).bytes(1_000_000)
    table = pyarrow.table({"image": [{"bytes": noise, "path": None}] * 8, "text": [f"number {i}" for i in range(8)]})
    file = tmp_path / "shards/large.parquet"
    pyarrow.parquet.write_table(table, file, row_group_size=2, use_dictionary=False)
    assert load_split(config_of(f"{server.url}/large.parquet"), "train", 0)["text"][7] == "number 7"
    assert server.sent < 200_000 < file.stat().st_size / 10


def test_a_later_start_makes_one_request_per_shard_and_reads_a_changed_one_again(tmp_path, server):
    folder = MAKERS["tar"](tmp_path / "shards")
    name = f"{server.url}/{PATTERNS['tar']}"
    assert len(opened(name)) == 30
    restart()
    server.answers.clear()
    load_split(config_of(name), "train", 0)
    assert [answer.body_bytes for answer in server.answers] == [1, 1, 1]
    before = source._opened(config_of(name)).state
    tar_shard(folder / "00001.tar", range(100, 107))
    restart()
    server.answers.clear()
    assert len(load_split(config_of(name), "train", 0)) == 27
    assert source._opened(config_of(name)).state != before
    assert {answer.path for answer in server.answers if answer.body_bytes > 1} == {"/00001.tar"}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_shard_that_changes_during_a_run_is_named(tmp_path, server, kind):
    """Also with --on_bad_sample skip: an image that cannot be received is not a broken one."""
    folder = MAKERS[kind](tmp_path / "shards")
    data = opened(f"{server.url}/{PATTERNS[kind]}", on_bad_sample="skip")
    places.forget()
    shard = sorted(folder.glob(f"*.{kind}"))[2]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RemoteError, match=f"{shard.name} has changed since the training data were opened"):
        fetch(data, [SampleKey(29, 0)])


def test_a_flaky_server_is_asked_again(tmp_path, server, caplog):
    folder = MAKERS["tar"](tmp_path / "shards")
    server.flaky = True
    far = opened(f"{server.url}/{PATTERNS['tar']}")
    places.forget()
    for one, other in zip(rows(far), rows(opened(folder)), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
    for reason in ("the server answers with status 503", "the connection was cut"):
        assert f"{reason}; it is read again in" in caplog.text


def test_a_server_that_is_gone_is_named_after_a_few_tries(tmp_path, server, monkeypatch):
    MAKERS["tar"](tmp_path / "shards")
    data = opened(f"{server.url}/{PATTERNS['tar']}", on_bad_sample="skip")
    places.forget()
    server.stop()
    for workers in (0, 1):  # an error of a loader process has the same message
        with pytest.raises(RemoteError) as error:
            next(micro_batches(data, BatchLayout(4), workers=workers).steps(0, 2))
        assert str(error.value).startswith(f"{server.url}/0000")
        assert "5 times); check the network" in str(error.value)
        assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, "it does not exist .status 404.; check the URL"),
        (403, "access is refused .status 403.: check the URL, and give user and password for its host in ~/.netrc"),
        (401, "it needs a login"),
        (418, "the server answers with status 418"),
    ],
)
def test_a_shard_that_is_not_there_is_named_at_once(tmp_path, server, status, reason):
    MAKERS["tar"](tmp_path / "shards")
    server.statuses["/00001.tar"] = status
    with pytest.raises(UserError, match=f"{server.url}/00001.tar cannot be read: {reason}"):
        opened(f"{server.url}/{PATTERNS['tar']}")
    assert server.requests <= SHARDS


def test_servers_and_names_that_cannot_be_read(tmp_path, server):
    MAKERS["tar"](tmp_path / "shards")
    server.ranges = False
    with pytest.raises(UserError, match="does not send parts of files"):
        opened(f"{server.url}/00000.tar")
    secret = "hunter2-secret"
    for name, message in {
        f"http://ada:{secret}@127.0.0.1/a.tar": "write them into ~/.netrc",
        f"http://127.0.0.1/a.tar?token={secret}": "access keys in them",
        f"{server.url}/*.tar": "cannot list files",
        f"{server.url}/00000.zip": "is not a shard",
        f"{server.url}/{{a.tar,b.parquet}}": "tar files and Parquet files",
        f"{server.url}/{{9..1}}.tar": "not a range",
        f"{server.url}/{{0..9999}}{{0..9999}}.tar": "100,000,000 shards",
        "ftp://host/a.tar": "does not exist",
        f"file://{tmp_path}/shards/00000.tar": "does not exist",
        "hf://models/a/b/x.tar": "not a dataset on the Hub",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            opened(name)
        assert secret not in str(error.value)
    with pytest.raises(UserError, match="add --streaming true"):
        opened(f"{server.url}/00000.tar", streaming=False)


def test_ranges_of_names():
    assert sources.expanded("a/{008..011}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar", "a/011.tar"]
    assert sources.expanded("{8..10}-{a,b}") == [f"{i}-{letter}" for i in (8, 9, 10) for letter in "ab"]
    assert sources.expanded("plain") == ["plain"]


def test_redirects_stay_on_the_host(tmp_path, server):
    MAKERS["tar"](tmp_path / "shards")
    server.redirects["/moved/00000.tar"] = "/00000.tar"
    assert len(opened(f"{server.url}/moved/00000.tar")) == ROWS
    other = f"http://localhost:{server.port}/00000.tar"
    server.redirects["/away/00000.tar"] = other
    before = len(server.answers)
    with pytest.raises(UserError, match=r"redirects to another host \(localhost\); redirects to other hosts are not"):
        opened(f"{server.url}/away/00000.tar")
    assert [answer.path for answer in server.answers[before:]] == ["/away/00000.tar"]
    server.redirects["/loop.tar"] = "/loop.tar"
    with pytest.raises(UserError, match="redirects more than 5 times"):
        opened(f"{server.url}/loop.tar")
    server.redirects["/files.tar"] = f"ftp://127.0.0.1:{server.port}/00000.tar"
    with pytest.raises(UserError, match="redirects from http to ftp, which is not followed"):
        opened(f"{server.url}/files.tar")


def test_a_redirect_to_a_connection_without_encryption_is_not_followed():
    remote._require_same_host("a", "http://host/a.tar", "https://host/a.tar")
    remote._require_same_host("a", "https://host/a.tar", "https://host:8443/b.tar")
    for target in ("http://host/a.tar", "ftp://host/a.tar", "https://other/a.tar"):
        with pytest.raises(RemoteError, match="give "):
            remote._require_same_host("a", "https://host/a.tar", target)


def test_redirects_use_one_connection(tmp_path, server):
    MAKERS["tar"](tmp_path / "shards")
    server.redirects["/moved.tar"] = "/00000.tar"
    for start in range(5):
        assert len(remote.read_range(f"{server.url}/moved.tar", start, start + 9)) == 9
    assert (len(server.answers), len(server.connections)) == (10, 1)


def test_a_failed_encryption_is_named_without_the_url(server):
    """The server does not speak TLS."""
    with pytest.raises(RemoteError) as error:
        remote.state_of(f"https://127.0.0.1:{server.port}/a/b.tar")
    reason = str(error.value).partition("cannot be read (")[2]
    assert re.match(r"no secure connection: SSL\w*Error: .*SSL", reason)
    assert "b.tar" not in reason
    assert "Max retries" not in reason


def test_user_and_password_are_read_from_netrc(tmp_path, server, monkeypatch):
    MAKERS["tar"](tmp_path / "shards")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login ada password hunter2\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    opened(f"{server.url}/00000.tar")
    assert server.answers[-1].authorization == "Basic YWRhOmh1bnRlcjI="


@pytest.mark.parametrize(
    "path",
    [
        "/etc/hostname",
        "file:///etc/hostname.tar::a.png@0+8",
        "/etc/hosts.tar::a.png@0+8",
        "http://169.254.169.254/a.tar::a.png@0+8",
        "hf://datasets/ada/private@main/a.tar::a.png@0+8",
        "{url}/elsewhere/a.tar::a.png@0+8",
        "{url}/data/../elsewhere/a.tar::a.png@0+8",
        "{url}/data/%2e%2e/elsewhere/a.tar::a.png@0+8",
        "{url}/data/.%2E/elsewhere/a.tar::a.png@0+8",
        "{url}/data/..%5Celsewhere/a.tar::a.png@0+8",
        "{url}/data/a.png",
    ],
)
def test_paths_in_remote_tables_lead_nowhere_else(tmp_path, server, path):
    """A column of paths beside the images, which is asked for with --image_column."""
    (tmp_path / "shards/data").mkdir(parents=True)
    table = pyarrow.table(
        {"image": [{"bytes": image_bytes(0), "path": None}], "other": [path.format(url=server.url)], "text": ["a"]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "shards/data/a.parquet")
    config = config_of(f"{server.url}/data/a.parquet", image_column="other")
    with pytest.raises(UserError, match="names the file|has the URL"):
        source.undecoded_images(load_split(config, "train", 0), "other", "image_column", config)


def test_images_with_two_dots_in_their_names_are_read(tmp_path, server):
    (tmp_path / "shards/..data").mkdir(parents=True)
    with tarfile.open(tmp_path / "shards/..data/0..1.tar", "w") as archive:
        for number, name in enumerate(("my..images/a.png", "my%2e%2eimages/b.png")):
            info = tarfile.TarInfo(name)
            info.size = len(image_bytes(number))
            archive.addfile(info, io.BytesIO(image_bytes(number)))
    sources = (f"{server.url}/..data/0..1.tar", tmp_path / "shards/..data")
    configs = [config_of(source) for source in sources]
    far, near = (ImageDataset(load_split(config, "train", 0), config, captions=False) for config in configs)
    assert len(far) == 2
    for one, other in zip(rows(far), rows(near), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_only_what_differs_in_urls_names_their_splits(tmp_path, server):
    for folder, first in {"a": 0, "b": 10, "test": 20}.items():
        tar_shard(tmp_path / f"shards/val/{folder}/0.tar", range(first, first + 10))
    for at in (f"{server.url}/val", f"{server.url}//////val"):
        assert {len(split) for split in source.load_all_splits(config_of(f"{at}/{{a,b}}/0.tar")).values()} == {20}
        splits = source.load_all_splits(config_of(f"{at}/{{a,b,test}}/0.tar"))
        assert {name: len(split) for name, split in splits.items()} == {"train": 20, "test": 10}


def test_a_server_says_how_long_to_wait(tmp_path, server, monkeypatch):
    slept = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    MAKERS["tar"](tmp_path / "shards")
    server.statuses["/00000.tar"] = 429
    for name, value in (("Retry-After", "7"), ("RateLimit", '"resolvers";r=0;t=55')):
        server.headers = {name: value}
        with pytest.raises(UserError, match="status 429, 4 times"):
            opened(f"{server.url}/00000.tar")
    assert slept == [7] * 3 + [55] * 3


class InMemoryBucket(MemoryFileSystem):
    """A store that fsspec reads by a protocol, as s3fs and adlfs do.

    Attributes:
        errors: raised by the next reads.
    """

    protocol = ("s3", "abfs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    errors: ClassVar[list[Exception]] = []

    @classmethod
    def _strip_protocol(cls, path):
        account = re.match(r"abfs://(\w+)@[^/]+", path)
        path = path.replace(account[0], account[1]) if account else path
        return "/" + path.removeprefix("s3://").removeprefix("abfs://").strip("/")

    @staticmethod
    def _get_kwargs_from_urls(path):
        if path.startswith("abfs://") and "@ada.example" not in path:
            raise ValueError("the account is missing")
        return {}

    def cat_file(self, path, start=None, end=None, **options):
        if self.errors:
            raise self.errors.pop()
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> InMemoryBucket:
    """A store with the shards in tmp_path / "shards" in the folder bucket/data."""
    for protocol in InMemoryBucket.protocol:
        monkeypatch.setitem(_registry, protocol, InMemoryBucket)
    for name in ("store", "pseudo_dirs", "errors"):
        monkeypatch.setattr(InMemoryBucket, name, type(getattr(InMemoryBucket, name))())
    bucket = InMemoryBucket()
    for file in MAKERS["tar"](tmp_path / "shards").iterdir():
        bucket.pipe_file(f"bucket/data/{file.name}", file.read_bytes())
    return bucket


def test_a_store_without_its_package():
    with pytest.raises(UserError, match="s3:// needs the package s3fs; install it with `pip install s3fs`"):
        opened("s3://bucket/data/{00000..00002}.tar")


@pytest.mark.parametrize("at", ["s3://bucket/data", "abfs://bucket@ada.example/data"])
def test_shards_in_a_store_of_fsspec(tmp_path, bucket, at):
    for name in ("{00000..00002}.tar", "*.tar", "", "{00000..00002}*.tar", "*{0,1,2}.tar"):
        far = opened(f"{at}/{name}")
        for one, other in zip(rows(far), rows(opened(tmp_path / "shards")), strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
    places.forget()
    far._kept = None
    bucket.pipe_file("bucket/data/00002.tar", bytes(99))
    with pytest.raises(RemoteError, match=f"{at}/00002.tar has changed"):
        fetch(far, [SampleKey(29, 0)])
    with pytest.raises(UserError, match=f"{at}/1.tar cannot be read .FileNotFoundError"):
        opened(f"{at}/1.tar")
    with pytest.raises(UserError, match=f"there is nothing at {at}/1"):
        opened(f"{at}/{{0,1}}*.tar")


class NoCredentialsError(Exception):
    """The error of botocore, which is not an OSError."""


class ServerDisconnectedError(Exception):
    """The error of aiohttp, which is not an OSError."""


def test_errors_of_a_store_that_may_pass_are_tried_again(tmp_path, bucket):
    far, near = opened("s3://bucket/data/*.tar"), opened(tmp_path / "shards")
    places.forget()
    bucket.errors.extend([ServerDisconnectedError("gone"), ServerDisconnectedError("gone"), OSError(5, "busy")])
    assert torch.equal(far[SampleKey(29, 0)]["pixel_values"], near[SampleKey(29, 0)]["pixel_values"])
    assert not bucket.errors
    for error in (NoCredentialsError("no login"), ValueError("no"), PermissionError("not yours")):
        bucket.errors.extend([OSError("more"), error])
        with pytest.raises(RemoteError, match=f"{type(error).__name__}: {error}.; check the URL and the login"):
            far[SampleKey(0, 0)]
        assert len(bucket.errors) == 1
        bucket.errors.clear()

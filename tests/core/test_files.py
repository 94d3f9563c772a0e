"""Durable writing: after a kill or an error at any moment, a name has its complete old or its complete new content."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.support.child import Child, in_child, wait_until
from tests.support.runs import ROOT, environment
from training.core.files import (
    delete_leftovers,
    read_json_object,
    recover_folder,
    replacing,
    replacing_folder,
    write_atomically,
    write_json,
)

OLD, NEW = "old\n" * 100, "new\n" * 100_000


def write_forever(path) -> None:
    for number in range(1_000_000):
        write_atomically(path, f"{os.getpid()} {number}\n" * 1000)


def replace_forever(path) -> None:
    for number in range(1_000_000):
        with replacing_folder(path) as temporary:
            for name in ("a", "b", "c"):
                (temporary / name).write_text(f"{os.getpid()} {number}\n" * 1000)


def wait_for_change(file, before: str, child: Child) -> None:
    """Wait until a child, which may have to wait for a processor, has replaced a file once."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not child.has_ended():
        try:
            if file.read_text() != before:
                return
        except FileNotFoundError:  # between two renames
            return
        time.sleep(0.0005)
    raise AssertionError(child.output.read_text())


def test_a_file_is_whole_after_a_kill_at_any_moment(tmp_path):
    path, sizes = tmp_path / "file", set()
    write_atomically(path, "0\n" * 1000)
    for attempt in range(30):
        before = path.read_text()
        child = Child(lambda: write_forever(path), tmp_path / "output")
        if attempt:  # the first kill may come before anything is written
            wait_for_change(path, before, child)
        time.sleep(0.001 * attempt)
        assert child.kill() == -signal.SIGKILL
        lines = path.read_text().splitlines()
        assert len(lines) == 1000
        assert len(set(lines)) == 1
        sizes.add(lines[0])
        delete_leftovers(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} <= {"file", "output"}
    assert len(sizes) > 3


def test_a_folder_is_whole_after_a_kill_at_any_moment(tmp_path):
    path, seen, left = tmp_path / "folder", set(), set()
    path.mkdir()
    for name in ("a", "b", "c"):
        (path / name).write_text("0\n" * 1000)
    for attempt in range(60):
        before = (path / "a").read_text()
        child = Child(lambda: replace_forever(path), tmp_path / "output")
        if attempt:
            wait_for_change(path / "a", before, child)
        time.sleep(0.0005 * attempt)
        assert child.kill() == -signal.SIGKILL
        left |= {p.name for p in tmp_path.glob(".*")}
        recover_folder(path)
        texts = {name: (path / name).read_text().splitlines() for name in ("a", "b", "c")}
        assert {len(lines) for lines in texts.values()} == {1000}
        assert len({line for lines in texts.values() for line in lines}) == 1
        seen.add(texts["a"][0])
        assert not list(tmp_path.glob(".*"))
    assert len(seen) > 3
    assert left, "no kill came while a folder was written"


@pytest.mark.parametrize("killed", ["before the old one is renamed", "between the two renames", "before deleting"])
def test_every_phase_of_replacing_a_folder_is_recovered(tmp_path, killed):
    """The states that a kill can leave, made by hand, as the moments between two renames are short."""
    path, temporary, old = tmp_path / "f", tmp_path / ".writing-f", tmp_path / ".replaced-f"
    (path if killed != "between the two renames" else old).mkdir()
    if killed == "before deleting":
        old.mkdir()
        (old / "text").write_text(OLD)
        (path / "text").write_text(NEW)
    else:
        ((path if path.exists() else old) / "text").write_text(OLD)
        temporary.mkdir()
        (temporary / "text").write_text("new\n")
    recover_folder(path)
    assert (path / "text").read_text() == (NEW if killed == "before deleting" else OLD)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("library", ["Python", "safetensors", "tokenizers"])
def test_a_full_disk_leaves_the_old_content_and_is_an_os_error(tmp_path, library):
    """Libraries in Rust report a full disk by errors of their own, which are not OSErrors."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_atomically(file, OLD)
    with replacing_folder(folder) as temporary:
        (temporary / "a").write_text(OLD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def too_much(path) -> None:
        if library == "Python":
            path.write_text(NEW)
        elif library == "safetensors":
            from safetensors.torch import save_file

            save_file({"x": torch.zeros(10_000)}, path)
        else:
            from tokenizers import Tokenizer
            from tokenizers.models import WordLevel

            Tokenizer(WordLevel({f"word{i}": i for i in range(5000)}, unk_token="word0")).save(str(path))

    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError) as failure, replacing(file) as temporary:
            too_much(temporary)
        assert failure.value.errno == errno.EFBIG
        with pytest.raises(OSError) as failure, replacing_folder(folder) as temporary:
            too_much(temporary / "a")
        assert failure.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert file.read_text() == (folder / "a").read_text() == OLD
    assert not list(tmp_path.glob(".*"))


def test_errors_of_other_kinds_pass_through(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "f"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_the_folder_may_disappear_while_a_file_is_written(tmp_path):
    (tmp_path / "f").mkdir()

    def write_and_delete() -> None:
        with replacing(tmp_path / "f" / "x") as temporary:
            temporary.write_text("x")
            shutil.rmtree(tmp_path / "f")

    with pytest.raises(FileNotFoundError):
        write_and_delete()


def test_only_temporary_files_are_leftovers(tmp_path):
    (tmp_path / ".writing-1-folder").mkdir()
    kept = [".lock", ".tmp", ".notes.tmp", ".writing-mine", "writing-1-x", ".x.tmp1b", ".writing-1-folder"]
    for name in (*kept[:-1], ".writing-123-config.yaml", ".config.yaml.tmp123"):
        (tmp_path / name).write_text("")
    delete_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_a_leftover_of_a_killed_writer_is_recognized(tmp_path):
    def stall() -> None:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            time.sleep(60)

    child = Child(stall, tmp_path / "output")
    wait_until(lambda: any(tmp_path.glob(".writing-*")))
    child.kill()
    delete_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"x"', "\0" * 50, "[" * 100_000, b"\xff\xfe"])
def test_json_of_other_contents_is_none(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_json_object(path) is None
    assert read_json_object(tmp_path / "none.json") is None
    write_json(path, {"a": 1})
    assert read_json_object(path) == {"a": 1}


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_contents_are_flushed_before_names(tmp_path):
    """A file is flushed before it is renamed, and its folder after it: a power cut leaves no empty file there."""
    code = (
        "from pathlib import Path; from training.core.files import *\n"
        f"write_atomically({str(tmp_path / 'file')!r}, 'x')\n"
        f"for text in ('1', '2'):\n"
        f"    with replacing_folder({str(tmp_path / 'folder')!r}) as f:\n"
        "        (f / 'sub').mkdir(); (f / 'sub' / 'a').write_text(text)\n"
    )
    trace = tmp_path / "trace"
    subprocess.run(
        ["strace", "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", trace, sys.executable, "-c", code],
        check=True, cwd=ROOT, env=environment(PYTHONDONTWRITEBYTECODE="1"),
    )  # fmt: skip
    calls = [line for line in trace.read_text().splitlines() if str(tmp_path) in line]
    names = [re.sub(r".*?(fsync|rename)\w*\((.*)\)\s*=\s*0.*", r"\1 \2", call) for call in calls]
    short = [re.sub(rf"\d+<|>|\"|{tmp_path}/?|\.writing-\d+-", "", name) for name in names]
    folder = ["fsync .writing-folder/sub/a", "fsync .writing-folder/sub", "fsync .writing-folder"]
    assert short == [
        "fsync file", "rename file, file", "fsync ",
        *folder, "rename .writing-folder, folder", "fsync ",
        *folder, "rename folder, .replaced-folder", "rename .writing-folder, folder", "fsync ",
    ]  # fmt: skip


def test_a_child_reports_its_status(tmp_path):
    assert in_child(lambda: print("here") or 3, tmp_path / "output") == (3, "here\n")
    assert os.getpid() not in (0, 1)

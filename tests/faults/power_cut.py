"""Power cuts: copies of an ext4 file system in use, as a disk has it at that moment, mounted again.

The file system lies in an image file that is mounted with a loop device. What programs have written and not flushed is
in the memory of the kernel only, and so a copy of the image file does not have it. Mounting the copy replays its
journal, as after a power cut. The image is mounted with `noauto_da_alloc`: ext4 otherwise flushes files that replace
others, which other file systems do not.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.compare import differences
from tests.faults.lab import Command, Done, Lab, Worker, runs
from tests.faults.table import Row, error_line

MEBIBYTES = 96
CONTROL = "not-flushed"
# Without a flush, ext4 records the name of a file within 5 s and its contents within 30 s.
AFTER_THE_END = (0.1, 1.0, 3.0, 6.0, 8.0, 12.0)


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mount an image at `folder`; the test is skipped where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-o", "loop,noauto_da_alloc", str(image), str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs to mount a loop device ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def make_image(path: Path) -> Path:
    maker = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if os.geteuid() or maker is None:
        pytest.skip("needs the rights of root and mkfs.ext4 (e2fsprogs)")
    with path.open("wb") as file:
        file.truncate(MEBIBYTES * 2**20)
    subprocess.run([maker, "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(path)], check=True)
    return path


def cut(image: Path, copy: Path) -> None:
    """Copy an image in use. It is read again until it did not change meanwhile, so that the copy is of one moment."""
    before = image.read_bytes()
    while (after := image.read_bytes()) != before:
        before = after
    copy.write_bytes(before)


def power_cuts(lab: Lab, commands: Sequence[Command], during: Sequence[float]) -> Row:
    """Cut the power while the commands run and after they have ended; type them again on each copy.

    Args:
        during: moments in seconds after the start at which the power is cut.
    """
    for command in commands:
        lab.changes(command)
    row = Row(f"power cut while {', '.join(command.name for command in commands)} ran, and 0.1 s to 12 s after")

    def attempt(worker: Worker, _: None) -> None:
        image = make_image(worker.folder / "disk.img")
        with mounted(image, worker.folder / "disk") as disk:
            copies = _cut_often(worker, image, disk, commands, during)
        empty_controls = 0
        for copy in copies:
            with mounted(copy, worker.folder / "after") as disk:
                control = disk / CONTROL
                empty_controls += control.exists() and control.stat().st_size == 0
                problems = [f"{copy.stem}: {problem}" for problem in _type_again(lab, worker, disk, commands)]
                row.record(Done(-signal.SIGKILL, ""), problems)
            copy.unlink()
        if not empty_controls:
            row.wrong.append("no copy has lost the contents of a file that was not flushed: this test proves nothing")

    list(lab.map(attempt, [None]))
    return row


def _cut_often(
    worker: Worker, image: Path, disk: Path, commands: Sequence[Command], during: Sequence[float]
) -> list[Path]:
    copies = []

    def copy(name: str) -> None:
        copies.append(worker.folder / f"{name}.img")
        cut(image, copies[-1])

    for command in commands:
        process = worker.start(command, disk)
        started = time.monotonic()
        for moment in during:
            time.sleep(max(0.0, started + moment - time.monotonic()))
            if runs(process):
                copy(f"{command.folder}, {moment} s after its start")
        done = worker.end()
        assert done.status == 0, done.output
    ended = time.monotonic()
    (disk / CONTROL).write_text("these words are in the memory of the kernel only")
    for moment in AFTER_THE_END:
        time.sleep(max(0.0, ended + moment - time.monotonic()))
        copy(f"{moment} s after the end")
    return copies


def _type_again(lab: Lab, worker: Worker, disk: Path, commands: Sequence[Command]) -> Iterator[str]:
    for command in commands:
        files = [path for path in (disk / command.folder).rglob("[!.]*") if path.is_file()]
        empty = [str(path.relative_to(disk)) for path in files if not path.stat().st_size]
        hint = f" (empty after the cut: {', '.join(empty[:5])})" if empty else ""
        done = worker.type(command, disk)
        if done.status != 0 and "already" not in done.output:
            yield f"{command.name}: exit status {done.status} ({error_line(done.output)}){hint}"
            return
        for line in differences(disk / command.folder, lab.reference / command.folder):
            yield f"{command.name}: {line}{hint}"

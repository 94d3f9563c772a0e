"""Unusual machines: without a home, a cache, shared memory or file descriptors, a run works or says what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.runs import ROOT, TOY, assert_same_state, environment

pytestmark = pytest.mark.slow

MISSING = "/proc/none"  # cannot be made, not even by root
FLAGS = ("--train_batch_size", "4", "--num_samples", "16", "--num_train_epochs", "1", "--cpu_threads", "1",
         "--preview_epochs", "0", "--report_to", "none", "--dataloader_num_workers", "2")  # fmt: skip


def shell(
    script: str, *words: str, private_mounts: bool = False, **variables: str | None
) -> subprocess.CompletedProcess:
    """Run a shell script with arguments; a variable that is None is unset."""
    kept = {name: value for name, value in {**environment(), **variables}.items() if value is not None}
    before = ["unshare", "-m"] if private_mounts else []
    if (
        private_mounts
        and subprocess.run([*before, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount file systems")
    return subprocess.run(
        [*before, "bash", "-c", script, "bash", *words],
        env=kept, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def toy(folder: Path) -> list[str]:
    return [sys.executable, str(TOY), "--output_dir", str(folder), *FLAGS]


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("usual") / "run"
    done = shell('"$@"', *toy(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("script", "variables"),
    [
        ('"$@"', {"HOME": None}),
        ('"$@"', {"HOME": MISSING, "XDG_CACHE_HOME": MISSING, "HF_HOME": MISSING, "HF_DATASETS_CACHE": None}),
        ('"$@"', {"TMPDIR": MISSING}),
        ('umask 077; "$@"', {}),
        ('ulimit -n 64; "$@"', {}),
        ('python=$1; shift; "$python" -O "$@"', {}),
    ],
    ids=["no home", "no caches", "no temporary folder", "umask 077", "64 files", "python -O"],
)
def test_a_run_is_the_same_on_an_unusual_machine(tmp_path, usual, script, variables):
    done = shell(script, *toy(tmp_path / "run"), **variables)
    assert done.returncode == 0, done.stderr
    assert_same_state(tmp_path / "run", usual)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="needs mounts of its own")
@pytest.mark.parametrize(
    ("mount", "warns"),
    [
        ("mount -t tmpfs -o size=16k none /dev/shm", True),
        ("mount -t tmpfs -o size=64m none /dev/shm", False),
        ("mount -t tmpfs -o size=4k none /mnt && export TMPDIR=/mnt && ! head -c 9999 /dev/zero > /mnt/full", False),
        (f"mount --bind '{ROOT}' '{ROOT}' && mount -o remount,ro,bind '{ROOT}' && ! touch '{ROOT}/x'", False),
    ],
    ids=["tiny shared memory", "the shared memory of Docker", "full temporary folder", "read-only checkout"],
)  # fmt: skip
def test_a_run_is_the_same_with_unusual_file_systems(tmp_path, usual, mount, warns):
    done = shell(f'{mount} && "$@"', *toy(tmp_path / "run"), private_mounts=True, PYTHONDONTWRITEBYTECODE=None)
    assert done.returncode == 0, done.stderr
    assert ("loading in this process instead" in done.stdout) == warns
    assert_same_state(tmp_path / "run", usual)


def test_an_image_folder_without_a_cache_names_what_is_missing(tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    done = shell(
        '"$@"', sys.executable, "training/train_autoencoder.py", "--train_data_dir", str(tmp_path),
        "--output_dir", str(tmp_path / "run"), "--report_to", "none", HF_HOME=MISSING, HF_DATASETS_CACHE=None,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"the cache folder {MISSING}/datasets cannot be written" in done.stderr
    assert "HF_HOME" in done.stderr


def test_a_deleted_working_folder_is_named(tmp_path):
    (tmp_path / "gone").mkdir()
    done = shell(
        'cd "$1" && rmdir "$1" && "$2" -m halftone_trainer --version', str(tmp_path / "gone"), sys.executable,
        PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert done.returncode == 2
    assert "the working folder no longer exists" in done.stderr
    assert "Traceback" not in done.stderr

"""Data folders are made by one process at a time, completely or not at all; nothing that was there is lost."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_scripts import import_captions, make_controls, make_posters, train_tokenizer
from pipelines.tools.cli import UserError
from tests.support.runs import ROOT, environment
from tests.support.tiny_captions import caption, draw_folder
from training.core.made_folders import incomplete, lock_of
from training.engine.signals import STARTED_BY


def start(script: str, *flags: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=options.pop("env", environment()),
        **options,
    )


def posters(folder: Path, number: int = 40) -> list[str]:
    return ["--output_dir", str(folder), "--num_posters", str(number), "--num_workers", "1"]


def wait_until(condition, process: subprocess.Popen | None = None, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An imagefolder, and captions.json of its images."""
    folder = draw_folder(tmp_path / "images", 6)
    records = [{"file_name": file.name, "caption": caption(i)} for i, file in enumerate(sorted(folder.glob("*.png")))]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    return folder


def makers(images: Path, target: Path) -> dict[str, list[str]]:
    """The flags of every maker that works without a font or a VAE."""
    captions = images.with_name("captions.json")
    return {
        "data_scripts/make_posters.py": posters(target, 60),
        "data_scripts/make_controls.py": [*f"--train_data_dir {images} --kind palette --output_dir {target}".split()],
        "data_scripts/import_captions.py": [*f"{captions} --image_dir {images} --output_dir {target}".split()],
        "data_scripts/train_tokenizer.py": [*f"--train_data_dir {images} --output_dir {target}".split()],
    }


SLOWER = [pytest.param(script, marks=pytest.mark.slow) for script in ("make_controls", "train_tokenizer")]


@pytest.mark.parametrize("script", ["make_posters", "import_captions", *SLOWER])
def test_of_several_makers_of_a_folder_one_makes_it_and_the_others_are_refused(tmp_path, images, script):
    target = tmp_path / "made"
    flags = makers(images, target)[f"data_scripts/{script}.py"]
    processes = [start(f"data_scripts/{script}.py", *flags) for _ in range(3)]
    results = [(process.communicate()[0], process.returncode) for process in processes]
    assert sorted(status for _, status in results)[0] == 0, results
    assert incomplete(target, script) is None
    for output, status in results:
        assert status in (0, 2)
        assert "Traceback" not in output
        assert status == 0 or "another process is making" in output or "already holds" in output
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".writing", ".replaced"))]
    if script == "make_posters":
        names = [path.name.split("-")[0] for path in (target / "data").iterdir()]
        assert sorted(names) == ["test", "train", "validation"]


@pytest.mark.parametrize("script", ["make_posters", "make_controls", "import_captions", "train_tokenizer"])
def test_a_locked_folder_is_refused(tmp_path, images, script):
    target = tmp_path / "made"
    module = {m.__name__.rpartition(".")[2]: m for m in (make_posters, make_controls, import_captions, train_tokenizer)}
    with lock_of(target), pytest.raises(UserError, match=r"another process is making .*made; wait for it"):
        module[script].main(makers(images, target)[f"data_scripts/{script}.py"])
    assert not target.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_maker_leaves_nothing(tmp_path, number):
    process = start("data_scripts/make_posters.py", *posters(tmp_path / "made", 20_000))
    wait_until(lambda: (tmp_path / ".writing-made/data").is_dir(), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 75, output
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]


def test_what_a_killed_maker_left_is_deleted_by_the_next(tmp_path):
    process = start("data_scripts/make_posters.py", *posters(tmp_path / "made", 20_000))
    wait_until(lambda: (tmp_path / ".writing-made/data").is_dir(), process)
    process.kill()
    process.wait()
    (tmp_path / ".made.partial").mkdir()  # of an earlier version
    assert make_posters.main(posters(tmp_path / "made", 8)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.lock", "made"]


def test_a_maker_ends_when_the_run_that_started_it_was_killed(tmp_path):
    """The parent is a Python process that starts the maker as a training run does, and is then killed."""
    code = (
        "from training.engine.prepare import make_missing; import sys; "
        f"make_missing({{{str(tmp_path / 'made')!r}: sys.argv[1]}}, lambda: None)"
    )
    command = f"data_scripts/make_posters.py {' '.join(posters(tmp_path / 'made', 20_000))}"
    parent = subprocess.Popen([sys.executable, "-c", code, command], cwd=ROOT, env=environment())
    wait_until(lambda: (tmp_path / ".writing-made/data").is_dir(), parent)
    assert _is_held(tmp_path / "made")
    parent.kill()
    parent.wait()
    wait_until(lambda: not _is_held(tmp_path / "made"), seconds=10)
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]


def test_a_maker_whose_parent_ended_before_it_began_does_nothing(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    env = environment(**{STARTED_BY: str(gone.pid)})
    process = start("data_scripts/make_posters.py", *posters(tmp_path / "made", 20_000), env=env)
    assert process.wait(60) == 75
    assert not (tmp_path / "made").exists()


def _is_held(folder: Path) -> bool:
    try:
        with lock_of(folder):
            return False
    except UserError:
        return True


def test_only_what_was_made_here_is_set_aside(tmp_path, images):
    documents = tmp_path / "Documents"
    documents.mkdir()
    (documents / "letter.txt").write_text("keep")
    (documents / "data").mkdir()
    (documents / "data" / "accounts.parquet").write_text("keep")
    (documents / "metadata.jsonl").write_text("keep")
    before = sorted(documents.rglob("*"))
    for script, flags in makers(images, documents).items():
        process = start(script, *flags, "--overwrite", "true")
        output = process.communicate()[0]
        assert process.returncode == 2, output
        assert "Documents" in output
        assert "Traceback" not in output
    assert sorted(documents.rglob("*")) == before
    assert not list(tmp_path.glob("Documents_old*"))


def test_a_folder_of_another_maker_is_not_set_aside(tmp_path, images):
    make_posters.main(posters(tmp_path / "made", 8))
    with pytest.raises(UserError, match="is not empty and holds no controls made by make_controls.py"):
        make_controls.main([*makers(images, tmp_path / "made")["data_scripts/make_controls.py"], "--overwrite", "true"])


def test_an_incomplete_folder_is_renamed_and_made_again(tmp_path, capsys):
    made = tmp_path / "made"
    make_posters.main(posters(made, 8))
    (made / "mine.txt").write_text("keep")
    next((made / "data").glob("train-*")).write_bytes(b"")  # as after a power cut
    assert make_posters.main(posters(made, 8)) == 0
    assert "so it is made again" in capsys.readouterr().out
    assert (tmp_path / "made_old_1/mine.txt").read_text() == "keep"
    assert incomplete(made, "make_posters") is None
    (made / "manifest.json").write_bytes(b"")
    assert make_posters.main(posters(made, 8)) == 0
    (made / "manifest.json").unlink()
    (made / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is not empty and holds no posters made by make_posters.py"):
        make_posters.main(posters(made, 8))
    assert (made / "mine.txt").is_file()


def test_an_incomplete_tokenizer_is_made_again_and_other_files_are_left_alone(tmp_path, images, capsys):
    flags = ["--train_data_dir", str(images), "--output_dir", str(tmp_path / "tokenizer")]
    train_tokenizer.main(flags)
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    train_tokenizer.main(flags)
    assert "has no tokenizer.json, so it is made again" in capsys.readouterr().out
    assert incomplete(tmp_path / "tokenizer", "train_tokenizer") is None
    (tmp_path / "tokenizer/notes.txt").write_text("keep")
    with pytest.raises(UserError, match=r"holds notes.txt, which is not part of a tokenizer"):
        train_tokenizer.main([*flags, "--overwrite", "true"])
    with pytest.raises(UserError, match=r"002.png, which is not part of a tokenizer; choose .*images/tokenizer"):
        train_tokenizer.main(["--train_data_dir", str(images), "--output_dir", str(images)])


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("script", ["make_posters", "import_captions", *SLOWER])
def test_a_full_disk_is_named_and_nothing_half_made_is_left(tmp_path, images, small_disk, script):
    with (small_disk / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    flags = makers(images, small_disk / "made")[f"data_scripts/{script}.py"]
    process = start(f"data_scripts/{script}.py", *flags)
    output = process.communicate()[0]
    assert process.returncode == 2, output
    assert f"the disk of {small_disk / 'made'} is full" in output
    assert "Traceback" not in output
    assert sorted(path.name for path in small_disk.iterdir()) == [".made.lock", "filling"]
    (small_disk / "filling").unlink()
    process = start(f"data_scripts/{script}.py", *flags)
    assert (process.communicate()[0], process.returncode)[1] == 0

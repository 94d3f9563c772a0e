"""`latest` and `best` on every file system: links, files that name a checkpoint, folders, or lost with a copy."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import pytest

from pipelines.tools.checkpoint_links import follow_links, follow_links_or_name, linked_checkpoint
from pipelines.tools.cli import UserError
from pipelines.tools.loading import find_pipeline
from tests.support.child import can_refuse, in_child, refuse_symbolic_links
from tests.support.runs import assert_same_state, rows, tensors
from tests.support.toy_runs import EVERY_STEP, assert_equal, run, run_of, tensors_of
from training.engine.weights import load_component
from training.experiments.comparison import run_metrics
from training.models.vae_loading import load_vae
from training.run import checkpoint
from training.run.folder import RunFolder

# Every second step is validated; the run is interrupted after the fourth of its six steps.
FLAGS = ("--validation_steps", "2", *EVERY_STEP)
FIRST_PART = (*FLAGS, "--max_train_steps", "4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed run of two sessions."""
    return run_of(tmp_path_factory, FIRST_PART, FLAGS)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """The first session of it; tests copy it."""
    return run_of(tmp_path_factory, FIRST_PART)


def write_names(checkpoints: Path, ending: str = "\n") -> None:
    """Replace the links by files that name the checkpoints, as Git does on Windows, and some archivers do."""
    for name in ("latest", "best"):
        target = os.readlink(checkpoints / name)
        (checkpoints / name).unlink()
        (checkpoints / name).write_bytes(f"{target}{ending}".encode())


def as_windows_zips_it(source: Path, archive: Path) -> None:
    """Write a zip without links; text files get CRLF, and those in checkpoints are not changed."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source)
            if not path.is_file() or {"latest", "best"} & set(name.parts):
                continue
            content = path.read_bytes()
            if "checkpoints" not in name.parts and path.suffix in (".yaml", ".csv", ".log", ".md", ".json"):
                content = content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
            file.writestr(name.as_posix(), content)


@pytest.mark.parametrize(
    "copied", ["links lost", "links resolved", "names", "names with CRLF", "names without newline"]
)
def test_a_run_that_was_copied_without_its_links_resumes_bit_for_bit(tmp_path, half, whole, copied):
    folder = tmp_path / "elsewhere" / "renamed"
    if copied == "links lost":
        as_windows_zips_it(half, tmp_path / "run.zip")
        zipfile.ZipFile(tmp_path / "run.zip").extractall(folder)
        assert b"\r\n" in (folder / "config.yaml").read_bytes()
        assert b"\r\n" in (folder / "run.log").read_bytes()
    else:
        shutil.copytree(half, folder, symlinks=copied != "links resolved")
    if copied.startswith("names"):
        write_names(folder / "checkpoints", {"names": "\n", "names with CRLF": "\r\n"}.get(copied, ""))
    assert find_pipeline(folder, "latest").parent.name in ("step-00000004", "latest")
    assert run(folder, *FLAGS) == 0
    assert "resumed from step-00000004 at step 4" in (folder / "run.log").read_text()
    assert_same_state(folder, whole)
    assert rows(folder) == rows(whole)
    assert os.readlink(folder / "checkpoints/best") == os.readlink(whole / "checkpoints/best")
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {path.name for path in (whole / "checkpoints").iterdir()}


def test_a_complete_run_without_its_links_gets_them_again(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    for name in ("latest", "best"):
        (folder / "checkpoints" / name).unlink()
    assert run(folder, *FLAGS) == 0
    for name in ("latest", "best"):
        assert os.readlink(folder / "checkpoints" / name) == os.readlink(whole / "checkpoints" / name)


@can_refuse
def test_a_run_on_a_file_system_without_links(tmp_path, whole):
    """Trained, pruned, resumed, exported, and resumed from `best`; then moved to a file system that has links."""
    folder = tmp_path / "run"
    flags = ("--validation_steps", "2", "--checkpointing_steps", "1", "--checkpoints_total_limit", "1")

    def train() -> int:
        refuse_symbolic_links()
        return run(folder, *flags, "--max_train_steps", "4") or run(folder, *flags)

    status, text = in_child(train, tmp_path / "output")
    assert status == 0, text
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "latest").read_bytes() == b"step-00000006\n"
    best = checkpoint.step_of(linked_checkpoint(checkpoints, "best"))
    assert (checkpoints / "best").read_bytes() == f"step-{best:08d}\n".encode()
    assert {p.name for p in checkpoints.iterdir()} == {"latest", "best", "step-00000006", f"step-{best:08d}"}
    assert_equal(tensors_of(linked_checkpoint(checkpoints, "latest")), tensors(whole))
    assert rows(folder) == rows(whole)
    assert run(folder, *flags, "--resume_from_checkpoint", "best", "--max_train_steps", "7") == 0
    assert os.readlink(checkpoints / "latest") == "step-00000007"


@pytest.fixture(params=["link", "name", "folder", "lost"])
def run_with(request, tmp_path, half) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(half, folder, symlinks=request.param != "folder")
    if request.param == "name":
        write_names(folder / "checkpoints", "\r\n")
    elif request.param == "lost":
        for name in ("latest", "best"):
            (folder / "checkpoints" / name).unlink()
    return folder


def test_every_place_that_takes_a_checkpoint_follows(run_with, half):
    """--resume_from_checkpoint, --init_from, --validate_model, --vae, --model and --checkpoint of the commands."""
    checkpoints, best = run_with / "checkpoints", os.readlink(half / "checkpoints/best")
    assert linked_checkpoint(checkpoints, "best") == checkpoints / best
    assert linked_checkpoint(checkpoints, "latest") == checkpoints / "step-00000004"
    expected = (checkpoints / best / "pipeline/model_index.json").read_bytes()
    for path, name in ((checkpoints / "best", None), (checkpoints / "best" / "pipeline", None), (run_with, "best")):
        assert (find_pipeline(path, name) / "model_index.json").read_bytes() == expected
    shutil.rmtree(run_with / "pipeline")
    assert (find_pipeline(run_with) / "model_index.json").read_bytes() == expected
    assert load_component(str(checkpoints / "best"), "unet", "--encoder") is not None
    for name in ("best", str(checkpoints / "best"), f"{checkpoints}/latest/"):
        assert checkpoint.find_checkpoint(checkpoints, name) is not None
    assert run_metrics("autoencoder", RunFolder(run_with))["steps"] == 4


def test_a_vae_in_a_checkpoint(run_with):
    """The message names the class, which shows that its config.json was read from behind the name."""
    with pytest.raises(UserError, match="UNet2DModel"):
        load_vae(str(run_with / "checkpoints/best/pipeline/unet"))


def test_paths_without_links_are_not_changed(tmp_path, monkeypatch):
    assert follow_links_or_name("user/best") == "user/best"
    assert follow_links("best/of/all") == Path("best/of/all")
    assert follow_links(tmp_path / "latest" / "x") == tmp_path / "latest" / "x"
    assert follow_links("~/x") == Path.home() / "x"


@pytest.mark.parametrize("content", ["", "\0" * 20, "../../secret", "/etc", "step-9", "step-1/..", "x" * 1000])
def test_a_damaged_name_is_as_good_as_none(tmp_path, content):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000001").mkdir(parents=True)
    (checkpoints / "latest").write_text(content)
    assert linked_checkpoint(checkpoints, "latest") == checkpoints / "step-00000001"
    assert linked_checkpoint(checkpoints, "best") is None


@pytest.mark.parametrize("target", ["latest", "best", "nowhere"])
def test_links_that_lead_in_circles_or_nowhere(tmp_path, half, target):
    folder = tmp_path / "run"
    shutil.copytree(half, folder, symlinks=True)
    for name, other in (("latest", target), ("best", "latest")):
        (folder / "checkpoints" / name).unlink()
        (folder / "checkpoints" / name).symlink_to(other)
    assert find_pipeline(folder, "latest").parent.name == "step-00000004"
    assert run(folder, *FLAGS) == 0
    assert rows(folder)[-1]["step"] == "6"
    assert os.readlink(folder / "checkpoints/latest") == "step-00000006"


def test_a_copy_whose_original_is_lost_or_damaged_takes_its_place(tmp_path, half):
    folder = tmp_path / "run"
    shutil.copytree(half, folder)  # links resolved
    original = folder / "checkpoints/step-00000004"
    (original / "ema.safetensors").write_bytes(b"damaged")
    for step in (1, 2, 3):
        shutil.rmtree(folder / f"checkpoints/step-{step:08d}")
    run(folder, *FLAGS, "--max_train_steps", "5")
    assert "resumed from step-00000004 at step 4" in (folder / "run.log").read_text()
    assert (folder / "checkpoints/step-00000004.old-1/ema.safetensors").read_bytes() == b"damaged"


def test_a_folder_of_other_contents_is_never_deleted(tmp_path, half):
    folder = tmp_path / "run"
    shutil.copytree(half, folder, symlinks=True)
    (folder / "checkpoints/latest").unlink()
    (folder / "checkpoints/latest").mkdir()
    (folder / "checkpoints/latest/notes.txt").write_text("mine")
    run(folder, *FLAGS, "--max_train_steps", "5")
    assert (folder / "checkpoints/latest.old-1/notes.txt").read_text() == "mine"
    assert os.readlink(folder / "checkpoints/latest") == "step-00000005"
    assert "is not a complete checkpoint; it was renamed to latest.old-1" in (folder / "run.log").read_text()


def test_writing_a_name_replaces_a_name(tmp_path):
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}").mkdir()
        checkpoint.write_name(tmp_path / "latest", tmp_path / f"step-{step:08d}")
        assert linked_checkpoint(tmp_path, "latest").name == f"step-{step:08d}"
    checkpoint.link(tmp_path, "latest", tmp_path / "step-00000001")
    assert os.readlink(tmp_path / "latest") == "step-00000001"


def test_a_manifest_that_was_written_on_windows(tmp_path, half):
    import json

    folder = tmp_path / "step-00000004"
    shutil.copytree(half / "checkpoints/step-00000004", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert not any("\\" in name for name in manifest["files"])
    manifest["files"] = {name.replace("/", "\\"): entry for name, entry in manifest["files"].items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.verify(folder)

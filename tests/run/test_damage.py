"""Damaged and forged files in a run folder: they are repaired with a warning, or refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from pipelines.tools.cli import UserError
from tests.support.runs import assert_same_state, rows, tensors
from tests.support.toy_runs import EVERY_STEP, assert_equal, run, run_of
from training.run import checkpoint
from training.run.checkpoint import DamagedCheckpoint
from training.run.folder import RunFolder
from training.run.metrics_log import MetricsLog, read_metrics
from training.run.state import RunState

FLAGS = EVERY_STEP
FIRST_PART = (*FLAGS, "--max_train_steps", "4")
# tests/core/test_files.py tests more of them.
OTHER_JSON = [b"", b"[1, 2]", b"\0" * 4096]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory, FIRST_PART, FLAGS)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory, FIRST_PART)


@pytest.fixture
def folder(tmp_path, half) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run", symlinks=True))


def log(folder: Path) -> str:
    return (folder / "run.log").read_text()


def seal(step: Path) -> None:
    """Write a manifest that fits the files, as somebody who forges a checkpoint would."""
    (step / "manifest.json").unlink()
    checkpoint._seal(step)


BROKEN_CONFIGS = {
    "empty": b"",
    "zero bytes": b"\0" * 2048,
    "torn": None,
    "a list": b"- a\n- b\n",
    "not YAML": b"a: [1, 2\nb: }",
    "not UTF-8": b"seed: \xff\xfe",
    "text": b"hello",
    "deep": b"[" * 2000,
}


@pytest.mark.parametrize("damage", ["empty", "torn", "deleted"])
def test_a_damaged_config_is_restored_and_no_other_seed_passes(folder, whole, damage):
    file = folder / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    if damage == "deleted":
        file.unlink()
    elif damage == "torn":
        lines = file.read_text().splitlines(keepends=True)
        cut = next(i for i, line in enumerate(lines) if line.startswith("seed:"))
        file.write_text("".join(lines[:cut]))
    else:
        file.write_bytes(BROKEN_CONFIGS[damage])
    before = file.read_bytes() if file.exists() else None
    with pytest.raises(UserError, match="--seed: 0 → 1"):
        run(folder, *FLAGS, "--seed", "1")
    assert (file.read_bytes() if file.exists() else None) == before
    assert run(folder, *FLAGS) == 0
    assert "is missing or damaged" in log(folder)
    changed = {"max_train_steps": 0, "output_dir": str(folder)}
    assert yaml.safe_load(file.read_text()) == settings | changed
    assert_same_state(folder, whole)


@pytest.mark.parametrize("damage", [name for name in BROKEN_CONFIGS if name != "torn"])
def test_the_settings_of_a_damaged_config_are_those_of_the_newest_checkpoint(folder, damage):
    settings = RunFolder(folder).saved_config()
    (folder / "config.yaml").write_bytes(BROKEN_CONFIGS[damage])
    assert RunFolder(folder).saved_config() == settings


def make_older(folder: Path) -> None:
    """Earlier versions saved no copy of the config in checkpoints."""
    for step in (folder / "checkpoints").glob("step-*"):
        (step / "config.yaml").unlink()
        seal(step)


def test_a_damaged_config_without_a_copy_is_refused(folder):
    make_older(folder)
    (folder / "config.yaml").write_text("")
    for seed in ("0", "1"):
        with pytest.raises(UserError, match=r"config.yaml is damaged.*restore it from a backup, or delete it"):
            run(folder, *FLAGS, "--seed", seed)
    (folder / "config.yaml").unlink()
    assert run(folder, *FLAGS) == 0


@pytest.mark.parametrize("content", OTHER_JSON)
def test_a_damaged_record_means_that_the_pipeline_is_exported_again(tmp_path, whole, content):
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_bytes(content)
    assert run(folder, *FLAGS) == 0
    again = json.loads((folder / "record.json").read_text())
    assert (again["steps"], again["pipeline_weights"]) == (record["steps"], record["pipeline_weights"])


@pytest.mark.parametrize("damage", ["weights cut", "weights gone", "index empty", "record of another step"])
def test_an_incomplete_pipeline_is_exported_again(tmp_path, whole, damage):
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    weights = folder / "pipeline/unet/diffusion_pytorch_model.safetensors"
    good = weights.read_bytes()
    if damage == "weights cut":
        weights.write_bytes(good[:100])
    elif damage == "weights gone":
        weights.unlink()
    elif damage == "index empty":
        (folder / "pipeline/model_index.json").write_text("")
    else:
        weights.write_bytes(good[::-1])
        record = json.loads((folder / "record.json").read_text())
        (folder / "record.json").write_text(json.dumps(record | {"steps": 4}))
    assert not RunFolder(folder).is_exported(6)
    assert run(folder, *FLAGS) == 0
    assert weights.read_bytes() == good


def test_a_model_card_that_was_edited_is_kept(tmp_path, whole):
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    (folder / "pipeline/README.md").write_text("my text")
    (folder / "pipeline/notes.txt").write_text("mine")
    record = json.loads((folder / "record.json").read_text())
    assert run(folder, *FLAGS) == 0
    assert (folder / "pipeline/README.md").read_text() == "my text"
    record.pop("pipeline_weights")  # the record of an earlier version
    (folder / "record.json").write_text(json.dumps(record))
    assert run(folder, *FLAGS) == 0
    assert (folder / "pipeline/README.md").read_text() == "my text"


@pytest.mark.parametrize(
    "tail",
    [
        b"5,", b"5,0.8", b"\0" * 4096, b"4,1,2,3\r\n", b'5,"0.8', b"\xff\xfe\xfd\r\n", b"5,x,y\r\n", b"5" + b"," * 40,
        b"9" * 300_000,
    ],
)  # fmt: skip
def test_torn_rows_of_metrics_are_dropped(folder, half, tail):
    with (folder / "metrics.csv").open("ab") as file:
        file.write(tail)
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")] == ["1", "2", "3", "4"]
    MetricsLog(folder / "metrics.csv", resume_step=4)
    assert (folder / "metrics.csv").read_bytes() == (half / "metrics.csv").read_bytes()


def test_a_torn_row_in_the_middle_costs_this_row(folder, whole):
    lines = (folder / "metrics.csv").read_bytes().splitlines(keepends=True)
    (folder / "metrics.csv").write_bytes(b"".join([*lines[:2], lines[2][:9] + b"\r\n", *lines[3:]]))
    assert run(folder, *FLAGS) == 0
    assert [row["step"] for row in rows(folder)] == ["1", "3", "4", "5", "6"]


@pytest.mark.parametrize("content", [b"\0" * 9000, b"nothing of ours", b"loss\r\n1.0\r\n"])
def test_metrics_without_a_row_are_renamed(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    MetricsLog(tmp_path / "metrics.csv", resume_step=4).write({"step": 5, "loss": 1.0})
    assert (tmp_path / "metrics.damaged.csv").read_bytes() == content
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == ["5"]


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b'{"seconds": {"startup": "x"}}'])
def test_a_damaged_speed_is_measured_again(folder, content):
    (folder / "speed.json").write_bytes(content)
    assert run(folder, *FLAGS, "--max_train_minutes", "10", "--max_train_steps", "5") == 0
    assert "speed.json is damaged, so the speed is measured again" in log(folder)
    assert json.loads((folder / "speed.json").read_text())["seconds"]["phases"].keys() == {"denoiser"}


STATE = "trainer_state.json"
FORGED_MANIFESTS = {
    "empty": {},
    "without files": {"files": {}},
    "a list": [1],
    "files is a list": {"files": ["a"]},
    "entries of another shape": {"files": {STATE: "abc"}},
    "entries without sha256": {"files": {STATE: {"size": 1}}},
    "size is text": {"files": {STATE: {"size": "1", "sha256": "x"}}},
    "escapes": {"files": {"../../config.yaml": {"size": 1, "sha256": "x"}}},
    "escapes by backslashes": {"files": {"..\\..\\config.yaml": {"size": 1, "sha256": "x"}}},
    "absolute": {"files": {"/etc/passwd": {"size": 1, "sha256": "x"}}},
    "a drive": {"files": {"C:\\boot.ini": {"size": 1, "sha256": "x"}}},
    "null character": {"files": {"a\0b": {"size": 1, "sha256": "x"}}},
    "not the state": {"files": {"x": {"size": 1, "sha256": "x"}}},
}


@pytest.mark.parametrize("manifest", [*FORGED_MANIFESTS, *OTHER_JSON])
def test_a_manifest_of_another_shape_is_damage(folder, whole, manifest):
    file = folder / "checkpoints/step-00000004/manifest.json"
    file.write_bytes(manifest if isinstance(manifest, bytes) else json.dumps(FORGED_MANIFESTS[manifest]).encode())
    with pytest.raises(UserError, match=f"the checkpoint is damaged.*{checkpoint.MANIFEST}"):
        checkpoint.find_checkpoint(folder / "checkpoints", str(file.parent))
    assert checkpoint.find_checkpoint(folder / "checkpoints", "latest").name == "step-00000003"


def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(folder, whole):
    (folder / "checkpoints/step-00000004/manifest.json").write_text('{"files": {}}')
    assert run(folder, *FLAGS) == 0
    assert "checkpoint step-00000004 is damaged (its manifest.json is missing, damaged or empty)" in log(folder)
    assert_equal(tensors(folder), tensors(whole))


def test_looping_links_in_a_checkpoint_are_damage(folder):
    file = folder / "checkpoints/step-00000004/ema.safetensors"
    file.unlink()
    file.symlink_to(file.name)
    (folder / "checkpoints/step-00000009").symlink_to("step-00000009")
    assert checkpoint.find_checkpoint(folder / "checkpoints", "latest").name == "step-00000003"
    assert run(folder, *FLAGS) == 0


def forged_state(**changes):
    return lambda state: state | changes


FORGED_STATES = {
    "a list": lambda state: [1, 2],
    "empty": lambda state: {},
    "a number": lambda state: 5,
    "step is text": forged_state(step="4"),
    "step is negative": forged_state(step=-1),
    "step is a truth value": forged_state(step=True),
    "step is null": forged_state(step=None),
    "means is a list": forged_state(means=[1]),
    "means of text": forged_state(means={"loss": ["a", "b"]}),
    "means of one": forged_state(means={"loss": [1.0]}),
    "means of numbers": forged_state(means={"loss": 3}),
    "epochs of text": forged_state(epochs=["a"]),
    "epochs of other fields": forged_state(epochs=[{"x": 1}]),
    "epoch_loss of text": forged_state(epoch_loss={"total": "a", "count": 1, "low": 0, "high": 1}),
    "best value is text": forged_state(best_value="good"),
    "validation is text": forged_state(last_validation="x"),
    "validation of text": forged_state(last_validation={"val_loss": "x"}),
    "best validation of text": forged_state(best_validation={"val_loss": "x"}),
}


@pytest.mark.parametrize("forged", FORGED_STATES)
def test_a_state_of_another_shape_is_damage(tmp_path, half, forged):
    state = json.loads((half / "checkpoints/step-00000004" / STATE).read_text())
    (tmp_path / STATE).write_text(json.dumps(FORGED_STATES[forged](state)))
    with pytest.raises(DamagedCheckpoint, match=STATE):
        RunState.read(tmp_path)


def test_a_forged_state_is_refused(folder):
    step = folder / "checkpoints/step-00000004"
    (step / STATE).write_text('{"step": 4}')
    seal(step)
    with pytest.raises(UserError, match=r"step-00000004 cannot be loaded \(its trainer_state.json.*--resume_from"):
        run(folder, *FLAGS)
    assert run(folder, *FLAGS, "--resume_from_checkpoint", str(folder / "checkpoints/step-00000003")) == 0


HEADER = b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
FORGED_FILES = {
    "empty weights": ("phase_denoiser.safetensors", b""),
    "a long header": ("phase_denoiser.safetensors", b"\xff" * 8 + b"{}"),
    "huge tensors": ("phase_denoiser.safetensors", len(HEADER).to_bytes(8, "little") + HEADER),
    "optimizer of lists": ("optimizer_denoiser.json", b'{"scalars": [], "param_groups": {}}'),
    "optimizer of numbers": ("optimizer_denoiser.json", b'{"scalars": {"a/b": 1}, "param_groups": 3}'),
    "optimizer of null": ("optimizer_denoiser.json", b'{"scalars": null, "param_groups": null}'),
}


@pytest.mark.parametrize("forged", FORGED_FILES)
def test_forged_files_are_refused(folder, forged):
    name, content = FORGED_FILES[forged]
    step = folder / "checkpoints/step-00000004"
    (step / name).write_bytes(content)
    seal(step)
    with pytest.raises(UserError, match=r"step-00000004 (cannot be loaded|is of another model or optimizer) \("):
        run(folder, *FLAGS)


def test_tensors_of_another_shape_are_refused(folder):
    step = folder / "checkpoints/step-00000004"
    save_file({"a": torch.zeros(3)}, step / "optimizer_denoiser.safetensors")
    seal(step)
    with pytest.raises(UserError, match="step-00000004"):
        run(folder, *FLAGS)


def test_leftovers_of_killed_writers_are_deleted_at_the_next_start(folder, whole):
    made = [".writing-99-config.yaml", ".metrics.csv.tmp99", "samples/.writing-99-epoch_0001.png"]
    made += ["checkpoints/.writing-99-latest", "checkpoints/.latest.tmp99"]
    for name in made:
        (folder / name).write_text("half")
    for name in (".writing-pipeline", "checkpoints/.writing-step-00000005", "checkpoints/.deleting-step-00000001"):
        (folder / name / "unet").mkdir(parents=True)
    (folder / "pipeline").rename(folder / ".replaced-pipeline")
    (folder / "checkpoints/step-00000004").rename(folder / "checkpoints/.replaced-step-00000004")
    kept = [".lock", "mine.txt", ".mine"]
    for name in kept[1:]:
        (folder / name).write_text("mine")
    busy = RunFolder(folder)
    busy.create()
    with pytest.raises(UserError, match="another process"):
        run(folder, *FLAGS)
    assert all((folder / name).exists() for name in made)
    busy.release()
    assert run(folder, *FLAGS) == 0
    assert_same_state(folder, whole)
    hidden = {p.relative_to(folder).as_posix() for p in folder.rglob(".*")}
    assert hidden == {".lock", ".mine"}

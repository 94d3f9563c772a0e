"""A fresh machine resumes a run from the Hub, and its run is the same as one that was never interrupted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.tools.cli import UserError
from tests.publishing.test_hub import quick_client  # noqa: F401  (a fixture)
from tests.support.hub_server import HubServer, Request, hub  # noqa: F401  (a fixture)
from tests.support.runs import ROOT, TOY, assert_same_state, environment
from tests.support.toy_runs import run, run_of, state_of
from training.publishing.hub_resume import is_on_hub
from training.push_to_hub import main as push

pytestmark = pytest.mark.slow

# The best step is not the last one when the run is interrupted, and is exported at the end of a run that stops early.
STEPS = ("--num_samples", "24", "--max_train_steps", "9", "--validation_steps", "2", "--checkpointing_steps", "3",
         "--early_stopping_patience", "3", "--early_stopping_min_delta", "0.04")  # fmt: skip
PUSH = ("--push_to_hub", "--hub_model_id", "toy", "--hub_strategy", "checkpoint")
INTERRUPTED = 75


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory, STEPS, name="toy")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run that was interrupted at step 4."""
    folder = tmp_path_factory.mktemp("interrupted") / "toy"
    assert run(folder, *STEPS, *PUSH[1:], "--signal_step", "4") == INTERRUPTED
    return folder


@pytest.fixture
def uploaded(hub: HubServer, interrupted, tmp_path) -> Path:  # noqa: F811
    """A run that was interrupted at step 4, and is on the Hub."""
    folder = Path(shutil.copytree(interrupted, tmp_path / "first" / "toy", symlinks=True))
    assert push([str(folder)]) == 0
    return folder


def resume(folder: Path, *flags: str, source: str = "hub") -> int:
    return run(folder, *STEPS, "--hub_model_id", "toy", "--resume_from_checkpoint", source, *flags)


def assert_same_run(folder: Path, other: Path) -> None:
    assert_same_state(folder, other)
    for name in ("best", "latest"):
        assert (folder / "checkpoints" / name).resolve().name == (other / "checkpoints" / name).resolve().name
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (other / weights).read_bytes()


def test_an_empty_folder_resumes_bit_for_bit(hub, uploaded, undisturbed, tmp_path, capsys):  # noqa: F811
    assert state_of(uploaded)["step"] == 4
    assert state_of(uploaded)["best_step"] == 2
    pushed = hub.files("ada/toy")
    assert {"last-checkpoint/best/manifest.json", "last-checkpoint/run/metrics.csv"} <= set(pushed)
    folder = tmp_path / "second" / "toy"
    command = [sys.executable, str(TOY), "--output_dir", str(folder), "--train_batch_size", "4", *STEPS, *PUSH[1:],
               "--gradient_accumulation_steps", "2", "--logging_steps", "1", "--num_train_epochs", "1",
               "--report_to", "none", "--cpu_threads", "1", "--resume_from_checkpoint", "hub"]  # fmt: skip
    done = subprocess.run([*command, "--push_to_hub"], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "downloaded the checkpoint of step 4 from ada/toy" in done.stdout
    assert "resumed from step-00000004 at step 4" in done.stdout
    assert_same_run(folder, undisturbed)
    assert not (folder / ".hub_download").exists()
    assert not (folder / ".hub_queue").exists()
    # The second machine uploads as the first one did.
    assert "last-checkpoint/run/metrics.csv" in hub.files("ada/toy")
    assert b'"stopped_early": true' in hub.files("ada/toy")["last-checkpoint/trainer_state.json"]


def test_a_revision_of_a_repository_can_be_resumed_without_a_token(
    hub,  # noqa: F811
    uploaded,
    undisturbed,
    tmp_path,
    monkeypatch,
):
    commit = hub.repos["ada/toy"].commits[-1][0]
    hub.put("ada/toy", "last-checkpoint/manifest.json", None)
    monkeypatch.delenv("HF_TOKEN")
    folder = tmp_path / "second" / "toy"
    with pytest.raises(UserError, match=r"the checkpoint on the Hub is damaged \(manifest.json is missing\)"):
        resume(folder, source="ada/toy")
    assert resume(folder, source=f"ada/toy@{commit}") == 0
    assert_same_run(folder, undisturbed)
    with pytest.raises(UserError, match="ada/toy has no revision v9"):
        resume(tmp_path / "third", source="ada/toy@v9")


def test_the_newer_checkpoint_wins(hub, uploaded, undisturbed, tmp_path, capsys):  # noqa: F811
    older, newer = tmp_path / "older", tmp_path / "newer"
    assert run(older, *STEPS, "--signal_step", "3") == INTERRUPTED
    assert resume(older) == 0
    assert "resumed from step-00000004 at step 4" in capsys.readouterr().out
    assert_same_run(older, undisturbed)
    assert run(newer, *STEPS, "--signal_step", "5") == INTERRUPTED
    assert resume(newer) == 0
    said = capsys.readouterr().out
    assert f"the checkpoint in {newer} is of step 6, the one on the Hub of step 4" in said
    assert "resumed from step-00000006 at step 6" in said
    assert_same_run(newer, undisturbed)


def test_without_the_hub_a_run_resumes_from_its_own_checkpoint(hub, uploaded, tmp_path, capsys):  # noqa: F811
    hub.stop()
    with pytest.raises(UserError, match="--resume_from_checkpoint hub: .* could not be reached"):
        resume(tmp_path / "empty")
    assert resume(uploaded) == 0
    assert "Resuming from the checkpoint of step 4" in capsys.readouterr().out


def test_a_repository_without_a_checkpoint_is_refused(hub, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="no repository ada/toy that you may read.*--hub_strategy checkpoint"):
        resume(tmp_path / "run")
    assert run(tmp_path / "other", "--max_train_steps", "1", "--push_to_hub", "--hub_model_id", "toy") == 0
    for source in ("hub", "ada/toy"):
        with pytest.raises(UserError, match="ada/toy contains no last-checkpoint/.*--hub_strategy checkpoint"):
            resume(tmp_path / "run", source=source)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_first_session_of_a_job_that_always_resumes_from_the_hub(hub, tmp_path, capsys):  # noqa: F811
    assert resume(tmp_path / "a" / "toy", *PUSH, "--signal_step", "4") == INTERRUPTED
    assert "has no repository ada/toy that you may read; it will be uploaded there" in capsys.readouterr().out
    assert push([str(tmp_path / "a" / "toy")]) == 0
    assert resume(tmp_path / "b" / "toy", *PUSH) == 0
    assert "resumed from step-00000004" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["phase_denoiser.safetensors", "best/ema.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("content", [b"other", None])
def test_a_checkpoint_that_does_not_match_its_manifest_is_refused(hub, uploaded, tmp_path, file, content):  # noqa: F811
    hub.put("ada/toy", f"last-checkpoint/{file}", content)
    with pytest.raises(UserError, match="--resume_from_checkpoint hub: the checkpoint on the Hub is damaged"):
        resume(tmp_path / "second")
    assert not list((tmp_path / "second" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "name", ["../../../evil.json", "/tmp/evil.json", "a/../../b.json", "..\\evil", "C:evil", "./a", "a//b", ""]
)
def test_a_manifest_that_leads_out_of_the_checkpoint_is_refused(hub, uploaded, tmp_path, name):  # noqa: F811
    place = "last-checkpoint/manifest.json"
    manifest = json.loads(hub.files("ada/toy")[place])
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    hub.put("ada/toy", place, json.dumps(manifest).encode())
    hub.put("ada/toy", f"last-checkpoint/{name}", b"x")
    with pytest.raises(UserError, match="which is not a path in it"):
        resume(tmp_path / "second")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 3}', b"\xff\xfe"])
def test_damaged_metadata_is_one_message(hub, uploaded, tmp_path, content):  # noqa: F811
    for file in ("manifest.json", "trainer_state.json"):
        before = hub.files("ada/toy")[f"last-checkpoint/{file}"]
        hub.put("ada/toy", f"last-checkpoint/{file}", content)
        with pytest.raises(UserError, match="is damaged"):
            resume(tmp_path / file)
        hub.put("ada/toy", f"last-checkpoint/{file}", before)


def test_other_settings_are_refused_before_the_weights_are_downloaded(hub, uploaded, tmp_path):  # noqa: F811
    hub.requests.clear()
    with pytest.raises(UserError, match="was started with other settings: --seed: 0 → 1"):
        resume(tmp_path / "second", "--seed", "1")
    assert not any(request.path.endswith(".safetensors") for request in hub.requests)


def test_a_download_that_was_killed_is_continued(hub, uploaded, undisturbed, tmp_path):  # noqa: F811
    folder = tmp_path / "second" / "toy"
    processes: list[subprocess.Popen] = []

    def kill(request: Request) -> None:
        if request.method == "GET" and request.path.endswith("last-checkpoint/phase_denoiser.safetensors"):
            processes[0].kill()
            processes[0].wait()

    hub.before = kill
    words = [sys.executable, str(TOY), "--output_dir", str(folder), "--hub_model_id", "toy", *STEPS]
    words += ["--report_to", "none", "--resume_from_checkpoint", "hub", "--train_batch_size", "4"]
    words += ["--gradient_accumulation_steps", "2"]
    processes.append(subprocess.Popen(words, env=environment(), cwd=ROOT))
    assert processes[0].wait(120) == -9
    hub.before = lambda request: None
    assert not list((folder / "checkpoints").iterdir())
    hub.requests.clear()
    assert resume(folder) == 0
    assert_same_run(folder, undisturbed)
    loaded = [request.path for request in hub.requests if request.method == "GET" and "/resolve/" in request.path]
    assert not any(path.endswith("last-checkpoint/run/metrics.csv") for path in loaded)
    assert not (folder / ".hub_download").exists()


def test_nothing_of_this_machine_is_in_what_is_uploaded(hub, uploaded, tmp_path):  # noqa: F811
    pushed = hub.files("ada/toy")
    config = yaml.safe_load(pushed["last-checkpoint/run/config.yaml"])
    assert config["seed"] == 0
    assert "output_dir" not in config
    for path, content in pushed.items():
        assert str(tmp_path).encode() not in content, path
        assert str(Path.home()).encode() + b"/" not in content, path


def test_names_on_the_hub_and_paths_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    assert all(map(is_on_hub, ["hub", "ada/toy", "ada/toy@v1.0", "ada/toy@refs/pr/1"]))
    paths = ["latest", "best", "none", "runs/toy", "/a/b", "./a", "../a", "a/b/c", "C:\\a", "~/a", "a@b", ""]
    assert not any(map(is_on_hub, paths))

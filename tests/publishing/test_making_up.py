"""What could not be uploaded is part of a run's state: the same command, or push_to_hub.py, makes up for it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.publishing.test_hub import make_publisher, quick_client, save_checkpoint  # noqa: F401  (a fixture)
from tests.support.hub_server import HubServer, Request, hub  # noqa: F401  (a fixture)
from tests.support.runs import ROOT, TOY, environment
from tests.support.toy_runs import run, run_of
from training.publishing.hub_account import HubAccount, answer

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "training" / "push_to_hub.py"
SHORT = ("--num_samples", "8", "--max_train_steps", "2", "--checkpointing_steps", "1")
STOP_SECONDS = 2
PUSH = ("--push_to_hub", "--hub_model_id", "toy")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A complete run that was not uploaded."""
    return run_of(tmp_path_factory, SHORT, name="toy")


@pytest.fixture
def complete(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "toy", symlinks=True))


def start(*words: str) -> subprocess.Popen:
    command = [sys.executable, *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=ROOT
    )


def push(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(SCRIPT), str(folder), "--hub_model_id", "toy", *flags]
    return subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT)


def writes(server: HubServer) -> list[str]:
    """Return the requests that stored something in a repository."""
    return [
        f"{request.method} {request.path}"
        for request in server.requests
        if request.status == 200 and ("/commit/" in request.path or request.method == "PUT")
    ]


def test_a_run_that_is_complete_is_uploaded_by_the_same_command(hub, complete, capsys):  # noqa: F811
    card = (complete / "pipeline" / "README.md").read_text()
    assert run(complete, *SHORT, *PUSH) == 0
    assert "Uploaded to" in capsys.readouterr().out
    files = hub.files("ada/toy")
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= set(files)
    assert 'from_pretrained("ada/toy")' in files["README.md"].decode()
    assert (complete / "pipeline" / "README.md").read_text() == card
    stored = writes(hub)
    requests = len(hub.requests)
    assert run(complete, *SHORT, *PUSH) == 0
    assert "everything is already uploaded to" in capsys.readouterr().out
    assert (writes(hub), len(hub.requests)) == (stored, requests)


@pytest.mark.parametrize("way", ["the same command", "push_to_hub.py"])
def test_a_refused_upload_has_its_own_exit_status_and_is_made_up_for(hub, tmp_path, capsys, way):  # noqa: F811
    folder = tmp_path / "toy"
    hub.fail_next(20, 403, match="/preupload/|/commit/")
    assert run(folder, *SHORT, *PUSH) == 3
    said = capsys.readouterr().out
    assert f"training/push_to_hub.py {folder} --hub_model_id ada/toy" in said
    assert (folder / "pipeline" / "model_index.json").is_file()
    assert "model_index.json" not in hub.files("ada/toy")
    hub._failures.clear()
    if way == "the same command":
        assert run(folder, *SHORT, *PUSH) == 0
    else:
        done = push(folder)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "model_index.json" in hub.files("ada/toy")
    assert len(hub.messages("ada/toy")) == 2


HELD = ["whoami", "GET .*/models/", "/preupload/", "PUT /lfs/", "/commit/"]


@pytest.mark.parametrize(("held", "number"), [*((held, signal.SIGTERM) for held in HELD), ("/commit/", signal.SIGINT)])
def test_a_stop_takes_effect_although_the_hub_hangs(hub, complete, held, number):  # noqa: F811
    hub.held = held
    arrived = threading.Event()
    hub.before = lambda request: arrived.set() if _matches(held, request) else None
    hub.gate.clear()
    process = start(str(SCRIPT), str(complete), "--hub_model_id", "toy")
    assert arrived.wait(60), process.communicate(timeout=5)[0]
    time.sleep(0.3)
    stopped = time.monotonic()
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    seconds = time.monotonic() - stopped
    assert process.returncode == (75 if number == signal.SIGTERM else 130), output
    assert seconds < STOP_SECONDS, output
    assert "run the same command again to complete it" in output
    hub.gate.set()
    hub.before = lambda request: None
    if held == "PUT /lfs/":
        assert push(complete).returncode == 0
        assert "model_index.json" in hub.files("ada/toy")


def _matches(pattern: str, request: Request) -> bool:
    import re

    return re.search(pattern, f"{request.method} {request.path}") is not None


@pytest.mark.parametrize("held", ["whoami", pytest.param("/commit/", marks=pytest.mark.slow)])
def test_a_training_command_stops_as_quickly(hub, tmp_path, held):  # noqa: F811
    folder = tmp_path / "toy"
    hub.held = held
    arrived = threading.Event()
    hub.before = lambda request: arrived.set() if _matches(held, request) else None
    hub.gate.clear()
    words = [str(TOY), "--output_dir", str(folder), "--train_batch_size", "4", *SHORT, *PUSH, "--report_to", "none"]
    process = start(*words)
    assert arrived.wait(90), process.communicate(timeout=5)[0]
    time.sleep(0.3)
    stopped = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0]
    assert time.monotonic() - stopped < STOP_SECONDS, output
    assert process.returncode == 75, output
    hub.gate.set()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "model_index.json" in hub.files("ada/toy")


POINTS = [("before", "create"), ("before", "/preupload/"), ("before", "/commit/"), ("after", "PUT /lfs/")]


@pytest.mark.parametrize(
    ("moment", "point"), [*(pytest.param(*point, marks=pytest.mark.slow) for point in POINTS), ("after", "/commit/")]
)
def test_a_killed_upload_is_completed_without_storing_anything_twice(hub, complete, moment, point):  # noqa: F811
    processes: list[subprocess.Popen] = []

    def kill(request: Request) -> None:
        if _matches(point, request):
            processes[0].kill()
            processes[0].wait()

    setattr(hub, moment, kill)
    processes.append(start(str(SCRIPT), str(complete), "--hub_model_id", "toy", "--hub_strategy", "all_checkpoints"))
    processes[0].communicate(timeout=90)
    assert processes[0].returncode == -signal.SIGKILL
    setattr(hub, moment, lambda request: None)
    done = push(complete, "--hub_strategy", "all_checkpoints")
    assert done.returncode == 0, done.stdout + done.stderr
    for path, content in hub.files("ada/toy").items():
        own = complete / "pipeline" / path if "/" not in path.removeprefix("unet/") else None
        if own is not None and own.is_file() and path != "README.md":
            assert own.read_bytes() == content
    sent = [write for write in writes(hub) if write.startswith("PUT")]
    assert len(sent) == len(set(sent))
    saved = [f"step-0000000{step}: checkpoint" for step in (2, 2, 1)]  # last-checkpoint/, and both in checkpoints/
    assert hub.messages("ada/toy")[1:] == ["toy: the final pipeline", *saved]
    assert not (complete / ".hub_queue").exists()
    assert push(complete, "--hub_strategy", "all_checkpoints").returncode == 0
    assert len(hub.messages("ada/toy")) == 5


def test_push_to_hub_refuses_what_is_not_a_run_or_not_complete(hub, tmp_path):  # noqa: F811
    done = push(tmp_path)
    assert (done.returncode, list(tmp_path.glob("checkpoints"))) == (2, [])
    assert "is not the folder of a run" in done.stderr
    save_checkpoint(tmp_path / "run", 10)
    done = push(tmp_path / "run")
    assert done.returncode == 2
    assert "--hub_strategy every_save or checkpoint" in done.stderr
    done = push(tmp_path / "run", "--hub_strategy", "checkpoint")
    assert done.returncode == 0, done.stderr
    assert "last-checkpoint/trainer_state.json" in hub.files("ada/toy")


def test_push_to_hub_takes_the_options_of_the_run(hub, tmp_path):  # noqa: F811
    folder = tmp_path / "toy"
    assert run(folder, *SHORT, "--hub_model_id", "museum/own", "--hub_private_repo", "true") == 0
    words = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.repos["museum/own"].private
    assert "model_index.json" in hub.files("museum/own")


def test_a_repository_that_was_deleted_is_filled_again(hub, complete):  # noqa: F811
    assert push(complete).returncode == 0
    del hub.repos["ada/toy"]
    assert push(complete).returncode == 0
    assert "model_index.json" in hub.files("ada/toy")


def test_each_repository_is_remembered_by_itself(hub, complete):  # noqa: F811
    assert run(complete, *SHORT, *PUSH) == 0
    assert run(complete, *SHORT, "--push_to_hub", "--hub_model_id", "museum/toy") == 0
    assert hub.files("ada/toy").keys() == hub.files("museum/toy").keys()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"repositories": 3}', '{"repositories": {"a": 1}}'])
def test_a_damaged_record_costs_a_comparison_with_the_hub(hub, complete, content):  # noqa: F811
    assert run(complete, *SHORT, *PUSH) == 0
    stored = writes(hub)
    (complete / "hub.json").write_text(content)
    assert run(complete, *SHORT, *PUSH) == 0
    assert writes(hub) == stored
    assert json.loads((complete / "hub.json").read_text())["repositories"]


def test_a_changed_card_is_uploaded_again(hub, complete):  # noqa: F811
    assert run(complete, *SHORT, *PUSH) == 0
    card = complete / "pipeline" / "README.md"
    card.write_text(card.read_text() + "\nMore about it.\n")
    assert run(complete, *SHORT, *PUSH) == 0
    assert hub.files("ada/toy")["README.md"].endswith(b"More about it.\n")


def test_a_checkpoint_that_failed_and_was_deleted_is_made_up_for_by_a_later_session(hub, tmp_path):  # noqa: F811
    publisher, _ = make_publisher(tmp_path, hub_strategy="all_checkpoints")
    publisher.check()
    hub.fail_next(1000, 403, match="/preupload/")
    for step in (10, 20):
        saved = save_checkpoint(tmp_path / "run", step)
        publisher.checkpoint_saved(saved)
        assert set(publisher.finish(timeout=30).missing) >= {f"checkpoints/{saved.name}"}
    weights = (tmp_path / "run/checkpoints/step-00000010/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000010")
    hub._failures.clear()
    later, _ = make_publisher(tmp_path, hub_strategy="all_checkpoints")
    assert later.push() == 0
    assert hub.files("ada/posters")["checkpoints/step-00000010/model.safetensors"] == weights
    assert "checkpoints/step-00000020/model.safetensors" in hub.files("ada/posters")
    assert "last-checkpoint/model.safetensors" in hub.files("ada/posters")
    assert not (tmp_path / "run" / ".hub_queue").exists()


def test_leftovers_of_a_killed_process_are_cleaned_up(hub, tmp_path):  # noqa: F811
    save_checkpoint(tmp_path / "run", 20)
    queue = tmp_path / "run" / ".hub_queue"
    for name in ("000001-files", "000002-step-00000010", "000003", "other"):
        (queue / name).mkdir(parents=True)
        (queue / name / "weights.safetensors").write_bytes(b"cut off")
    publisher, _ = make_publisher(tmp_path, hub_strategy="all_checkpoints")
    assert publisher.push() == 0
    assert not queue.exists()
    assert not any("step-00000010" in path for path in hub.files("ada/posters"))


def test_a_hub_that_does_not_answer_is_given_up_before_the_first_step(hub):  # noqa: F811
    hub.held = "whoami"
    hub.gate.clear()
    with pytest.raises(TimeoutError, match="no answer for 0 seconds"):
        answer(HubAccount(None).who, seconds=0.3)
    hub.gate.set()

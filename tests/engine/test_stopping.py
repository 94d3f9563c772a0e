"""A stop takes effect within two seconds in every long part of a run, and the same command continues it exactly."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.forks import Fork, WarmInterpreter, wait_for
from tests.support.hub_server import HubServer
from tests.support.runs import TOY, assert_same_state, environment
from training.engine.signals import REQUEUE_STATUS

# Two seconds, and a second for a machine that is busy with other tests.
SECONDS = 3.0
FLAGS = ("--train_batch_size", "4", "--num_samples", "16", "--num_train_epochs", "2", "--validation_steps", "3",
         "--preview_epochs", "1", "--logging_steps", "1", "--critic", "true", "--cpu_threads", "1")  # fmt: skip
WORKERS = ("--dataloader_num_workers", "2")


@dataclass
class Case:
    """A stop in one part of a run."""

    part: str
    number: int
    to_group: bool = False
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = f"{self.part}-{signal.Signals(self.number).name}"
        return name + ("-group" if self.to_group else "") + ("-workers" if self.flags else "")


TOY_PARTS = [
    Case("data", signal.SIGINT, to_group=True, flags=WORKERS),
    Case("foreign", signal.SIGHUP),
    Case("first_step", signal.SIGTERM, to_group=True, flags=WORKERS),
    Case("validation", signal.SIGTERM, to_group=True, flags=WORKERS),
    Case("previews", signal.SIGINT),
    Case("saving", signal.SIGTERM, to_group=True, flags=WORKERS),
    Case("finish", signal.SIGHUP, to_group=True, flags=WORKERS),
]
MORE_TOY_PARTS = [
    Case("data", signal.SIGTERM),
    Case("first_step", signal.SIGINT),
    Case("validation", signal.SIGHUP),
    Case("previews", signal.SIGTERM, to_group=True, flags=WORKERS),
    Case("saving", signal.SIGINT),
    Case("finish", signal.SIGTERM),
]


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmInterpreter]:
    interpreter = WarmInterpreter(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(warm, folder).wait() == 0
    return folder / "run"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def start(warm: WarmInterpreter, folder: Path, *flags: str, **variables: str) -> Fork:
    report_to = () if "--report_to" in flags else ("--report_to", "none")
    words = ["--output_dir", str(folder / "run"), *FLAGS, *report_to, *flags]
    return warm.start(TOY, *words, env=environment(**variables))


def stop(run: Fork, case: Case, active: str) -> float:
    """Signal a run once it has printed `active`; return the seconds until its end."""
    wait_for(lambda: active in run.output or run.returncode is not None)
    assert run.returncode is None, run.output
    time.sleep(0.1)
    asked = time.monotonic()
    (os.killpg if case.to_group else os.kill)(run.pid, case.number)
    status = run.wait()
    seconds = time.monotonic() - asked
    assert status == (130 if case.number == signal.SIGINT else REQUEUE_STATUS), run.output
    assert "Traceback" not in run.output
    print(f"{case}: {seconds:.2f} s")
    return seconds


def check_resumed(warm: WarmInterpreter, folder: Path, whole: Path, *flags: str, **variables: str) -> None:
    again = start(warm, folder, *flags, **variables)
    assert again.wait() == 0, again.output
    assert_same_state(folder / "run", whole)


@pytest.mark.parametrize(
    "case", [*TOY_PARTS, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_TOY_PARTS)], ids=str
)
def test_a_stop_in_a_part_of_the_stage(warm, whole, tmp_path, case):
    run = start(warm, tmp_path, "--long_part", case.part, *case.flags)
    assert stop(run, case, f"long part: {case.part}") < SECONDS
    if case.part in ("validation", "previews", "saving", "finish"):
        assert "everything is saved" in run.output
    check_resumed(warm, tmp_path, whole)


@pytest.mark.parametrize("case", [Case("hub", signal.SIGTERM), Case("hub", signal.SIGINT, to_group=True)], ids=str)
def test_a_stop_while_the_hub_does_not_answer(warm, whole, tmp_path, silent_server, case):
    flags = ("--push_to_hub", "true", "--hub_model_id", "toy", *WORKERS)
    run = start(warm, tmp_path, *flags, HF_ENDPOINT=silent_server, HF_TOKEN="hf_" + "w" * 34)
    # The check of the Hub is the last thing before the log says how the run starts.
    wait_for(lambda: (tmp_path / "run/checkpoints").is_dir())
    time.sleep(1.5)
    assert stop(run, case, "") < SECONDS
    assert "starting from scratch" not in run.output
    check_resumed(warm, tmp_path, whole)


def test_a_stop_during_an_upload(warm, whole, tmp_path):
    hub = HubServer(tmp_path / "hub")
    hub.gate.clear()
    flags = ("--push_to_hub", "true", "--hub_model_id", "toy")
    variables = hub.env(home=tmp_path / "home")
    try:
        run = start(warm, tmp_path, *flags, **variables)
        assert stop(run, Case("upload", signal.SIGTERM), "Finishing the upload") < SECONDS
        hub.gate.set()
        check_resumed(warm, tmp_path, whole, *flags, **variables)
    finally:
        hub.stop()


def test_a_stop_while_a_tracker_does_not_answer(warm, whole, tmp_path, silent_server):
    variables = {"WANDB_BASE_URL": silent_server, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    run = start(warm, tmp_path, "--report_to", "wandb", **variables)
    wait_for(lambda: (tmp_path / "run/wandb").is_dir())
    time.sleep(1)
    assert stop(run, Case("tracker", signal.SIGTERM), "") < SECONDS
    assert "starting from scratch" not in run.output
    check_resumed(warm, tmp_path, whole)

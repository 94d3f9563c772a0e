"""A run that is asked to stop, at any point, finishes the step, saves everything and exits with the right status."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipelines.tools.cli import UserError
from tests.support.forks import Fork, warm_interpreter
from tests.support.runs import ROOT, TOY, assert_same_state, environment, rows, toy
from tests.support.toy_runs import run, state_of
from training.engine import prepare
from training.engine.signals import REQUEUE_STATUS, Interrupted, StopSignal

FLAGS = ("--train_batch_size", "4", "--num_train_epochs", "2", "--critic", "true", "--preview_epochs", "0")


def words(folder: Path, *flags: str) -> tuple[str, ...]:
    return ("--output_dir", str(folder), "--report_to", "none", "--cpu_threads", "1", *FLAGS, *flags)


def started(folder: Path, *flags: str) -> Fork:
    """Start a run in a process and a group of its own, and wait until it is training."""
    process = warm_interpreter().start(TOY, *words(folder, *flags))
    wait_for(lambda: (folder / "metrics.csv").is_file(), process)
    return process


def started_by(folder: Path, before: tuple[str, ...], *flags: str, hangup=signal.SIG_DFL) -> subprocess.Popen[str]:
    """Start a run by another program, and wait until it is training. `hangup` is what a SIGHUP does at the start."""
    process = subprocess.Popen(
        [*before, str(TOY), *words(folder, *flags)],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),
    )  # fmt: skip
    wait_for(lambda: (folder / "metrics.csv").is_file(), process)
    return process


def wait_for(condition, process: subprocess.Popen[str] | Fork, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name
)
def test_a_process_asked_to_stop_saves_and_says_how_to_resume(tmp_path, number):
    process = started(tmp_path / "run", "--slow_seconds", "0.05", "--logging_steps", "1")
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else REQUEUE_STATUS), errors
    assert "Traceback" not in errors
    assert f"stopped at step {state_of(tmp_path / 'run')['step']} of 24; everything is saved" in output
    assert f"To resume: python tests/support/toy.py --output_dir {tmp_path}/run" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_leaves_the_workers_alone(tmp_path, number):
    """Service managers and schedulers signal every process of a job, the data-loading workers too."""
    flags = ("--slow_seconds", "0.05", "--logging_steps", "1", "--dataloader_num_workers", "2")
    process = started(tmp_path / "run", *flags)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == REQUEUE_STATUS, errors
    assert "everything is saved" in output
    assert state_of(tmp_path / "run")["step"] > 0


@pytest.mark.slow
def test_nohup_keeps_a_run_training_when_the_terminal_closes(tmp_path):
    process = started_by(tmp_path / "run", (sys.executable,), "--logging_steps", "1", hangup=signal.SIG_IGN)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    process = started(tmp_path / "run", "--slow_seconds", "1", "--logging_steps", "1", "--checkpointing_epochs", "0")
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "press Ctrl-C again" in process.stderr, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "run/checkpoints/latest").exists()


@pytest.mark.parametrize("where", ["training", "validation", "previews", "finish"])
def test_a_stop_anywhere_loses_nothing(tmp_path, where):
    common = ("--num_train_epochs", "2", "--validation_steps", "4", "--preview_epochs", "1", "--critic", "true")
    run(tmp_path / "whole", *common)
    stop = ("--signal_step", "5") if where == "training" else ("--signal_at", where)
    assert run(tmp_path / "run", *common, *stop) == REQUEUE_STATUS
    assert not (tmp_path / "run/pipeline").exists()
    assert "everything is saved" in (tmp_path / "run/run.log").read_text()
    assert run(tmp_path / "run", *common) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def is_making_posters(trainer: int) -> bool:
    with contextlib.suppress(psutil.Error):  # other programs that an import starts come and go
        return any("make_posters" in " ".join(child.cmdline()) for child in psutil.Process(trainer).children())
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_stop_while_an_input_is_made(tmp_path, number):
    """The script that makes the input receives the signal, and the run ends with its exit status."""
    target = tmp_path / "posters"
    (tmp_path / "c.yaml").write_text(
        f"prepare:\n  {target}: data_scripts/make_posters.py --output_dir {target} --num_posters 50000\n"
    )
    flags = ("--config", tmp_path / "c.yaml", "--output_dir", tmp_path / "run", "--data", target, "--report_to", "none")
    process = warm_interpreter().start(TOY, *map(str, flags))
    wait_for(lambda: is_making_posters(process.pid), process)
    time.sleep(0.5)
    process.send_signal(number)  # to the trainer alone, as a scheduler or `kill` does, unlike a terminal
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else REQUEUE_STATUS), errors
    assert not (target / "data").exists()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(target) in (p.info["cmdline"] or [])]


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_are_set_in_the_main_thread_only():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with StopSignal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_a_stop_between_two_inputs_makes_no_more(tmp_path):
    calls: list[int] = []
    recipes = {str(tmp_path / name): "data_scripts/make_posters.py --help" for name in "ab"}

    def stop_requested() -> int | None:
        calls.append(1)
        return signal.SIGTERM if len(calls) > 1 else None

    with pytest.raises(Interrupted):
        prepare.make_missing(recipes, stop_requested)


@pytest.mark.slow
def test_a_launcher_ended_by_a_sigterm_stops_the_trainer(tmp_path):
    """`accelerate launch` does not pass the signal on: the trainer notices that its parent is gone, saves and exits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    toy(whole, *FLAGS)
    launcher = str(Path(sys.executable).with_name("accelerate"))
    process = started_by(parts, (launcher, "launch", "--cpu"), "--slow_seconds", "0.2")
    (trainer,) = psutil.Process(process.pid).children()
    process.terminate()
    process.wait(30)
    trainer.wait(60)
    log = (parts / "run.log").read_text()
    assert "everything is saved" in log
    assert "To resume: accelerate launch tests/support/toy.py" in log
    toy(parts, *FLAGS)
    assert rows(parts) == rows(whole)
    assert_same_state(parts, whole)


def test_only_the_projects_own_scripts_are_run(tmp_path):
    for command_line in (
        "/bin/rm -rf x",
        "../outside.py",
        "tests/support/toy.py",
        "data_scripts/../tests/support/toy.py",
    ):
        with pytest.raises(UserError, match="own scripts"):
            prepare.make_missing({str(tmp_path / "x"): command_line}, lambda: None)


def test_validating_a_model_outside_of_a_run_can_be_interrupted(tmp_path, capsys):
    """`--validate_only --validate_model DIR` polls as a run does: a signal ends it, and no metrics are printed."""
    run(tmp_path / "run", "--max_train_steps", "1")
    flags = ("--validate_only", "--validate_model", str(tmp_path / "run" / "pipeline"))
    capsys.readouterr()
    assert run(tmp_path / "none", *flags) == 0
    assert "val_loss" in capsys.readouterr().out
    assert run(tmp_path / "none", *flags, "--signal_at", "validation") == REQUEUE_STATUS
    assert "val_loss" not in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("waits", [False, True])
def test_only_a_thread_that_waits_in_the_background_ends_a_program_without_its_shutdown(waits):
    """Idle threads of a pool exist until the end, and the shutdown need not wait for them."""
    program = f"""
import atexit, threading, time
from concurrent.futures import ThreadPoolExecutor
from pipelines.tools.cli import UserError, entry_point, in_background

begun = threading.Event()

def work(seconds):
    with in_background():
        if seconds:
            begun.set()
        time.sleep(seconds)

def main():
    pool = ThreadPoolExecutor(2)
    list(pool.map(work, [0, 0]))
    if {waits}:
        pool.submit(work, 60)
        begun.wait()
    raise UserError("no")

atexit.register(print, "shut down")
entry_point(main)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (ended.returncode, ended.stderr) == (2, "error: no\n")
    assert ended.stdout == ("" if waits else "shut down\n")


def test_loader_processes_that_ignore_signals_do_not_keep_a_finished_program(tmp_path):
    """At its end, multiprocessing sends SIGTERM to them, which they ignore, and then waits for them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, signal, time\n"
        "from pipelines.tools.cli import entry_point\n"
        "def work(ready):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    ready.set()\n"
        "    time.sleep(60)\n"
        "def main():\n"
        "    ready = multiprocessing.Event()\n"
        "    multiprocessing.Process(target=work, args=(ready,), daemon=True).start()\n"
        "    ready.wait()\n"
        "entry_point(main)\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], env=environment(PYTHONPATH=str(ROOT)), timeout=30)
    assert done.returncode == 0


IN_A_DESTRUCTOR = """
import signal, sys, time
from pipelines.tools.cli import entry_point
from training.engine.signals import StopSignal

class Slow:
    def __del__(self):
        print("in the destructor", flush=True)
        time.sleep(0.5)

def main():
    with StopSignal() as stop{block}:
        Slow()
        print("past the destructor", flush=True)
        time.sleep(60)

entry_point(main)
"""


@pytest.mark.parametrize(
    ("block", "ending", "numbers"),
    [
        ("", "", [signal.SIGINT, signal.SIGINT]),  # a second Ctrl-C, which stops without saving
        (", stop.at_once()", "Interrupted", [signal.SIGTERM]),
    ],
)
def test_an_end_that_is_asked_for_in_a_destructor_is_not_dropped(block, ending, numbers):
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_DESTRUCTOR.replace("{block}", block)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "in the destructor\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    output, errors = process.communicate(timeout=30)
    assert output == "past the destructor\n"
    if ending:  # nothing here handles Interrupted
        assert errors.splitlines()[-1].endswith(ending)
    else:
        assert (process.returncode, errors.splitlines()[-1]) == (130, "stopped")
    assert "Exception ignored" not in errors

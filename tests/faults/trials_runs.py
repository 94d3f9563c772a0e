"""Trials of runs: signals, terminals, locks, divergence, numbers, and damaged files."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from tests.faults.compare import differences
from tests.faults.crash_points import logged_steps, resumed_step
from tests.faults.lab import TOY, Command, Done, Lab, Worker, runs
from tests.faults.table import Row, Rows, expect, trial
from tests.support.toy import ToyConfig
from training.run.checkpoint import load_tensors

# Slow enough that a signal meets a running step.
SLOW = TOY.plus("--slow_seconds", "0.03", folder="slow")
WORKERS = SLOW.plus("--dataloader_num_workers", "2", folder="workers")


@contextmanager
def fresh(worker: Worker, command: Command, lab: Lab) -> Iterator[Path]:
    folder = worker.fresh(command, lab.reference)
    yield folder
    shutil.rmtree(folder)


def type_again(lab: Lab, worker: Worker, command: Command, folder: Path) -> list[str]:
    """Type a command again, and return what differs from the undisturbed one, which the lab must have run before."""
    done = worker.type(command, folder)
    return expect(done, [0]) or differences(folder / command.folder, lab.reference / command.folder)


def wait_for_steps(folder: Path, steps: int, process: int) -> None:
    """Wait until metrics.csv has a row of this step."""
    while logged_steps(folder) < steps and runs(process):
        time.sleep(0.005)


@trial("Signals to the process group, with data-loading workers")
def signals_to_the_group(lab: Lab) -> Rows:
    lab.changes(WORKERS)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        row = Row(f"{number.name} to the process group of a run with two data-loading workers")
        for steps in range(1, 6 if lab.thorough else 3):
            with lab.worker() as worker, fresh(worker, WORKERS, lab) as folder:
                process = worker.start(WORKERS, folder)
                wait_for_steps(folder / WORKERS.folder, steps, process)
                os.killpg(process, number)
                done = worker.end()
                reached = logged_steps(folder / WORKERS.folder)
                problems = expect(done, [75], ["everything is saved"])
                again = worker.type(WORKERS, folder)
                problems += expect(again, [0])
                problems += differences(folder / WORKERS.folder, lab.reference / WORKERS.folder)
                row.record(done, problems, max(0, reached - resumed_step(again.output)))
        yield row


@trial("A closed terminal")
def hang_up_under_nohup(lab: Lab) -> Rows:
    lab.changes(SLOW)
    row = Row("SIGHUP under nohup")
    with lab.worker() as worker, fresh(worker, SLOW, lab) as folder:
        command = ["nohup", sys.executable, str(SLOW.script), *SLOW.words]
        process = subprocess.Popen(
            command, cwd=folder, env=worker.variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_for_steps(folder / SLOW.folder, 1, process.pid)
        process.send_signal(signal.SIGHUP)
        output, _ = process.communicate()
        done = Done(process.returncode, output)
        yield row.record(done, expect(done, [0]) + type_again(lab, worker, SLOW, folder), lost=0)


@trial("The reader of stdout")
def standard_output(lab: Lab) -> Rows:
    lab.changes(TOY)

    def closed() -> int:
        reader, writer = os.pipe()
        os.close(reader)
        return writer

    def full() -> int:
        return os.open("/dev/full", os.O_WRONLY)

    for name, opened in (("the reader of stdout is gone", closed), ("stdout is on a full disk", full)):
        row = Row(name)
        for both in (False, True):
            with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
                stdout = opened()
                process = subprocess.Popen(
                    [sys.executable, str(TOY.script), *TOY.words], cwd=folder, env=worker.variables, stdout=stdout,
                    stderr=stdout if both else subprocess.PIPE, text=True,
                )  # fmt: skip
                os.close(stdout)
                errors = process.communicate()[1] or ""
                done = Done(process.returncode, errors)
                row.record(done, expect(done, [0]) + type_again(lab, worker, TOY, folder), lost=0)
        yield row


@trial("The output folder is deleted during the run")
def output_folder_deleted(lab: Lab) -> Rows:
    lab.changes(SLOW)
    row = Row("the output folder is deleted during the run")
    for steps in (1, 2, 3):
        with lab.worker() as worker, fresh(worker, SLOW, lab) as folder:
            process = worker.start(SLOW, folder)
            wait_for_steps(folder / SLOW.folder, steps, process)
            shutil.rmtree(folder / SLOW.folder, ignore_errors=True)
            done = worker.end()
            problems = expect(done, [0, 2], [SLOW.folder])
            shutil.rmtree(folder / SLOW.folder, ignore_errors=True)
            row.record(done, problems + type_again(lab, worker, SLOW, folder))
    yield row


@trial("Divergence")
def divergence(lab: Lab) -> Rows:
    row = Row("the weights diverge after a good checkpoint (--learning_rate 1e30)")
    with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
        assert worker.type(TOY, folder).status == 0
        more = TOY.plus("--num_train_epochs", "20", "--lr_warmup_steps", "0")
        done = worker.type(more.plus("--learning_rate", "1e30"), folder)
        problems = expect(done, [2], ["--learning_rate"])
        for name in ("latest", "best"):
            for file in (folder / TOY.folder / "checkpoints" / name).glob("*.safetensors"):
                if not all(bool(tensor.float().abs().max() < 1e6) for tensor in load_tensors(file).values()):
                    problems.append(f"{name}/{file.name} has diverged weights")
        again = worker.type(more.plus("--learning_rate", "1e-4"), folder)
        yield row.record(done, problems + expect(again, [0], never=["Traceback", "nan", "not finite"]))


@trial("NaN in validation")
def nan_in_validation(lab: Lab) -> Rows:
    row = Row("the validation loss is NaN")
    with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
        done = worker.type(TOY.plus("--bad_validation", "true"), folder)
        yield row.record(done, expect(done, [0, 2], ["warning: ", "val_loss"]))


@trial("Locks")
def locks(lab: Lab) -> Rows:
    for command in (TOY, SLOW, WORKERS):
        lab.changes(command)
    row = Row("a file system without locks (ENOLCK, ENOSYS, ENOTSUP)")
    for number in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
        with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
            done = worker.type(TOY, folder, FAULT_LOCK=str(number))
            problems = expect(done, [0], ["cannot be locked", os.strerror(number)], ["Traceback", "another process"])
            row.record(done, problems + type_again(lab, worker, TOY, folder), lost=0)
    yield row
    row = Row("two processes for one run folder")
    with lab.worker() as worker, fresh(worker, SLOW, lab) as folder:
        endless = SLOW.plus("--num_train_epochs", "5000")
        process = worker.start(endless, folder)
        wait_for_steps(folder / SLOW.folder, 1, process)
        second = subprocess.run(
            [sys.executable, str(SLOW.script), *endless.words], cwd=folder, env=worker.variables, capture_output=True,
            text=True,
        )  # fmt: skip
        os.kill(process, signal.SIGTERM)
        first = worker.end()
        done = Done(second.returncode, second.stdout + second.stderr)
        yield row.record(done, expect(first, [75]) + expect(done, [2], ["another process"]), lost=0)
    row = Row("typed again at once after SIGKILL, while data-loading workers still run")
    with lab.worker() as worker, fresh(worker, WORKERS, lab) as folder:
        process = worker.start(WORKERS, folder, cold=True)
        wait_for_steps(folder / WORKERS.folder, 2, process)
        os.kill(process, signal.SIGKILL)
        done = worker.end()
        yield row.record(done, type_again(lab, worker, WORKERS, folder))


@trial("Numbers that are not finite")
def numbers(lab: Lab) -> Rows:
    floats = [f.name for f in dataclasses.fields(ToyConfig) if str(f.type) in ("float", "float | None")]
    row = Row(f"NaN or infinity for each of {len(floats)} numeric options")
    names = floats if lab.thorough else ["weight_decay", "max_grad_norm", "learning_rate", "lr_power"]
    for name in names:
        for value in (".nan", ".inf", "-.inf"):
            with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
                done = worker.type(TOY.plus(f"--{name}", value), folder)
                row.record(done, [f"--{name} {value}: {line}" for line in expect(done, [2], [name])])
    yield row


def write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write(text: str | bytes) -> Callable[[Path], None]:
    return partial(write_bytes, data=text if isinstance(text, bytes) else text.encode())


def half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


_STEP = "checkpoints/step-00000004"
DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    *[("config.yaml", _write(text)) for text in ("", "a: [", "some text", "- 1\n- 2\n", b"\xff\xfe\x00", b"\x00" * 64)],
    *[("metrics.csv", _write(text)) for text in ("", "step,epoch\n1", 'step\n"1', b"\x00" * 99, b"\xff\xfe")],
    ("metrics.csv", half),
    *[("record.json", _write(text)) for text in ("", "null", "[]", "{", b"\x00")],
    *[(f"{_STEP}/manifest.json", _write(text)) for text in ("", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}')],
    (f"{_STEP}/manifest.json", _write('{"files": {"missing": {"size": 1, "sha256": ""}}}')),
    (f"{_STEP}/manifest.json", _write('{"files": {}}')),
    *[(f"{_STEP}/trainer_state.json", _write(text)) for text in ("", "[]", "{}", "null")],
    *[(f"{_STEP}/ema.safetensors", damage) for damage in (half, flip, _write(b""), _write(b"\xff" * 64))],
    *[(f"checkpoints/{name}", _loop) for name in ("latest", "best")],
    *[("sessions.md", _write(b"\xff")), ("run.log", _write(b"\xff")), ("speed.json", _write("["))],
]


@trial("Damaged files in a run folder")
def damaged_files(lab: Lab) -> Rows:
    lab.changes(TOY)
    interrupted = TOY.plus("--signal_step", "5")
    row = Row("a damaged file in the folder of an interrupted run")
    with lab.worker() as worker:
        folder = worker.fresh(TOY, lab.reference)
        assert worker.type(interrupted.plus("--checkpoints_total_limit", "9"), folder).status == 75
        for name, damage in DAMAGES:
            copy = folder.with_name("damaged")
            shutil.copytree(folder, copy, symlinks=True)
            damage(copy / TOY.folder / name)
            if _STEP in name:  # the damaged one is the newest
                shutil.rmtree(copy / TOY.folder / "checkpoints/step-00000005", ignore_errors=True)
            done = worker.type(TOY, copy)
            row.record(done, [f"{name}, {damage}: {problem}" for problem in expect(done, [0, 2])])
            if done.status == 0:
                same = torch.equal(*(_first_tensor(f / TOY.folder) for f in (copy, lab.reference)))
                row.wrong += [] if same else [f"{name}: other weights after it"]
            shutil.rmtree(copy)
    yield row


def _first_tensor(run: Path) -> torch.Tensor:
    return next(iter(load_tensors(run / "checkpoints/step-00000006/ema.safetensors").values()))

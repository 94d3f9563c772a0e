"""Under `accelerate launch`, a Ctrl-C, a closed terminal or a SIGTERM loses nothing, with one process and with two."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.support.forks import wait_for
from tests.support.runs import ROOT, TOY, assert_same_state, environment, relative_difference, toy

pytestmark = pytest.mark.slow

FLAGS = ("--train_batch_size", "4", "--num_train_epochs", "2", "--preview_epochs", "0", "--logging_steps", "1",
         "--checkpointing_epochs", "0", "--validation_epochs", "0")  # fmt: skip
LAUNCHERS = {1: ("--cpu",), 2: ("--multi_gpu", "--num_processes", "2")}  # without GPUs, the second one uses the CPU


class Terminal:
    """A pseudo-terminal with `accelerate launch` as its foreground process."""

    def __init__(self, processes: int, folder: Path, *flags: str):
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        words = [accelerate, "launch", *LAUNCHERS[processes], str(TOY), "--output_dir", str(folder)]
        self.output = b""
        self.pid, self._screen = pty.fork()
        if self.pid == 0:
            for number in (signal.SIGHUP, signal.SIGINT):  # the tests themselves may run in the background
                signal.signal(number, signal.SIG_DFL)
            os.chdir(ROOT)
            os.execve(words[0], [*words, "--report_to", "none", "--cpu_threads", "1", *FLAGS, *flags], environment())
        self._keyboard = os.dup(self._screen)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._screen, 4096):
                self.output += data

    def press_ctrl_c(self) -> None:
        os.write(self._keyboard, b"\x03")

    def close(self) -> None:
        # Both descriptors; the reading thread holds the first one, so the device is hung up through a signal as well.
        os.close(self._keyboard)
        os.close(self._screen)
        os.killpg(self.pid, signal.SIGHUP)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


@pytest.fixture(scope="module", params=[1, 2])
def processes(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    toy(folder, *FLAGS, processes=processes)
    return folder


@pytest.mark.parametrize("action", ["press_ctrl_c", "close", "terminate"])
def test_nothing_is_lost(tmp_path, processes, whole, action):
    folder = tmp_path / "run"
    terminal = Terminal(processes, folder, "--slow_seconds", "0.2", "--dataloader_num_workers", "2")
    wait_for(lambda: (folder / "metrics.csv").is_file(), 120)
    family = [psutil.Process(terminal.pid), *psutil.Process(terminal.pid).children(recursive=True)]
    time.sleep(0.5)
    getattr(terminal, action)()
    log = folder / "run.log"
    wait_for(lambda: "everything is saved" in log.read_text(encoding="utf-8"), 30)
    os.waitpid(terminal.pid, 0)
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive, terminal.output
    assert b"Signals.SIGKILL" not in terminal.output
    toy(folder, *FLAGS, processes=processes)
    assert_same_state(folder, whole)


@pytest.mark.parametrize("config", ["multi_node.yaml", "fsdp2.yaml"])
def test_two_machines_with_a_shipped_config(tmp_path, config):
    """Both are this one; each starts one of the two processes, as the launcher would on machines of a network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    named = ("--config_file", f"configs/accelerate/{config}", "--mixed_precision", "no", "--num_machines", "2")
    network = ("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    words = [accelerate, "launch", *named, *network]
    flags = [str(TOY), "--output_dir", str(tmp_path / "run"), "--report_to", "none", "--cpu_threads", "1", *FLAGS]
    machines = [
        subprocess.Popen([*words, "--machine_rank", rank, *flags], cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)))
        for rank in ("0", "1")
    ]
    assert [machine.wait(180) for machine in machines] == [0, 0]
    toy(tmp_path / "other", *FLAGS, processes=2)
    if config == "multi_node.yaml":
        assert_same_state(tmp_path / "run", tmp_path / "other")
    else:
        assert "with FSDP2" in (tmp_path / "run/run.log").read_text(encoding="utf-8")
        assert relative_difference(tmp_path / "run", tmp_path / "other") < 1e-3

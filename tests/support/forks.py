"""Runs of tests/support/toy.py in forks of an interpreter that has imported everything: each starts in a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.runs import ROOT, environment


class Fork:
    """A run in a process and a session of its own; its output is in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        wait_for(lambda: self._read("pid") != "")
        self.pid = int(self._read("pid"))

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @property
    def output(self) -> str:
        return self._read("stdout") + self._read("stderr")

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        text = self._read("status")
        return int(text) if text else None

    def wait(self, seconds: float = 60) -> int:
        wait_for(lambda: self.status is not None, seconds)
        assert self.status is not None
        return self.status


class WarmInterpreter:
    """Starts the forks."""

    def __init__(self, **variables: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks"],
            env=environment(PYTHONPATH=str(ROOT), **variables), cwd=ROOT, stdin=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, folder: Path, *flags: str, **variables: str) -> Fork:
        folder.mkdir(parents=True)
        request = {"folder": str(folder), "flags": flags, "variables": variables}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Fork(folder)

    def close(self) -> None:
        self._process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _serve() -> None:
    import accelerate  # noqa: F401
    import diffusers
    import huggingface_hub  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import wandb  # noqa: F401

    from tests.support import toy

    diffusers.UNet2DModel, diffusers.DDPMPipeline, diffusers.DDPMScheduler  # noqa: B018 - imported when it is accessed
    for line in sys.stdin:
        if os.fork() == 0:
            _supervise(toy.main, **json.loads(line))


def _supervise(main: Callable[[], int | None], folder: str, flags: list[str], variables: dict[str, str]) -> None:
    """Fork the run, and write its process id and its exit status."""
    from pipelines.tools.cli import entry_point

    place = Path(folder)
    child = os.fork()
    if child:
        (place / "pid.new").write_text(str(child), encoding="utf-8")
        (place / "pid.new").rename(place / "pid")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (place / "status.new").write_text(str(status), encoding="utf-8")
        (place / "status.new").rename(place / "status")
        os._exit(0)
    os.setsid()
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(place / name, os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ.update(variables)
    sys.argv = ["tests/support/toy.py", *flags]
    entry_point(main)


if __name__ == "__main__":
    _serve()

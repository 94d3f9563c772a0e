"""A warm interpreter: everything that a run imports is imported once, and each command is a fork of it.

A fork costs some milliseconds and an interpreter with torch and Diffusers several seconds. A forked command is a real
process: its own arguments, folder, environment, output, signals, and a regular end of the interpreter.

This file is also the script of the warm interpreter. It reads jobs from its input, one JSON object a line, and answers
with the process id of the fork, and then with its exit status.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


class Warm:
    """Commands as forks of one interpreter; a context manager.

    Args:
        environment: variables of the interpreter, which its commands inherit.
        folder: where the interpreter writes its log.
    """

    def __init__(self, environment: dict[str, str], folder: Path):
        self._environment, self._log = environment, folder / "warm.log"

    def __enter__(self) -> Warm:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__], env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True,
            )  # fmt: skip
        assert self._answer() == "ready"
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def start(self, script: Path, *words: str, folder: Path, output: Path, **environment: str) -> int:
        """Start `python script words` in `folder`, and return its process id; `wait` must follow."""
        assert self._process.stdin is not None
        job = {"script": str(script), "words": words, "folder": str(folder), "output": str(output)}
        print(json.dumps(job | {"environment": environment}), file=self._process.stdin, flush=True)
        self._command = int(self._answer())
        return self._command

    def wait(self, seconds: float = 120.0) -> int:
        """Wait for the command and return its exit status; a negative one is the signal that ended it.

        Raises:
            TimeoutError: it took longer than `seconds`, and was killed.
        """
        timer = threading.Timer(seconds, os.killpg, (self._command, signal.SIGKILL))
        timer.start()
        status = int(self._answer())
        late = timer.finished.is_set()
        timer.cancel()
        with contextlib.suppress(ProcessLookupError):  # children of a killed command
            os.killpg(self._command, signal.SIGKILL)
        if late:
            raise TimeoutError(f"still running after {seconds:.0f} s")
        return status

    def run(self, script: Path, *words: str, folder: Path, output: Path, **environment: str) -> int:
        self.start(script, *words, folder=folder, output=output, **environment)
        return self.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the warm interpreter ended: {self._log.read_text()}")
        return line.strip()


def become(job: dict[str, Any]) -> None:
    """Run the command of a job in this process, a fork of the warm interpreter, as `python script words` does."""
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.argv = [job["script"], *job["words"]]
    runpy.run_path(job["script"], run_name="__main__")


def main() -> None:
    from tests.support.forks import import_everything

    import_everything()
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    # Not `for line in sys.stdin`: a fork must not inherit lines that were read in advance.
    while line := sys.stdin.readline():
        job = json.loads(line)
        process = os.fork()
        with contextlib.suppress(PermissionError):  # whichever of the two is first makes the process group
            os.setpgid(process, process)
        if process == 0:
            answers.close()
            become(job)
            return
        print(process, file=answers, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.path.remove(str(Path(__file__).resolve().parent))
    main()

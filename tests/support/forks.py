"""Scripts in forks of an interpreter that has imported the libraries: each starts in a moment instead of seconds.

A fork differs from `python SCRIPT` only in that the libraries were imported before it got its environment. What
depends on that, on the memory of a process or on how it is started is tested with processes of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Without wandb: it makes a folder for images when it is imported, which the first fork that ends would delete.
MODULES = (
    "torch", "accelerate", "diffusers", "transformers", "datasets", "tokenizers", "huggingface_hub",
    "safetensors.torch", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "PIL.Image", "PIL.PngImagePlugin",
    "jinja2", "pandas",
    "pyarrow.parquet", "diffusers.pipelines.ddpm.pipeline_ddpm", "diffusers.models.unets.unet_2d",
    "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip", "transformers.tokenization_utils_fast", "accelerate.tracking",
    "data_scripts.make_posters", "data_scripts.train_tokenizer", "data_scripts.precompute_latents",
    "training.train_latent_diffusion", "training.train_autoencoder", "tests.support.toy",
)  # fmt: skip


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a script: with one thread, without a network, and not one of several processes."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return {**kept, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **extra}


class Fork:
    """A script in a process and a session of its own, with the methods of `subprocess.Popen`.

    Its output is in files, so that it never waits for a reader.
    """

    def __init__(self, folder: Path, args: list[str]):
        self.args = args
        self._place = {name: folder / name for name in ("pid", "status", "stdout", "stderr")}
        wait_for(self._place["pid"].is_file)
        self.pid = int(self._read("pid"))

    def _read(self, name: str) -> str:
        path = self._place[name]
        return path.read_bytes().decode(errors="replace") if path.is_file() else ""

    @property
    def stdout(self) -> str:
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        return self._read("stderr")

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        text = self._read("status")
        return int(text) if text else None

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        wait_for(self._place["status"].is_file, timeout)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout, self.stderr

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmInterpreter:
    """Starts scripts as forks of one interpreter. All of them have its hash seed, and so the same order of sets.

    Args:
        variables: environment variables while the libraries are imported.
    """

    def __init__(self, **variables: str):
        self._folder = Path(tempfile.mkdtemp(prefix="halftone-forks-"))
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks"],
            env=environment(**variables), cwd=ROOT, stdin=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, script: Path, *flags: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Fork:
        """Start a script; `env` is its environment, of which the libraries only see what they read after the import."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        args = [str(script), *flags]
        request = {"folder": str(folder), "args": args, "cwd": str(cwd), "env": dict(env or environment())}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Fork(folder, args)

    def run(self, script: Path, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, as `subprocess.run` does."""
        fork = self.start(script, *flags, cwd=cwd)
        try:
            return subprocess.CompletedProcess(fork.args, fork.wait(600), *fork.communicate())
        finally:
            fork.kill()

    def close(self) -> None:
        self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@functools.cache
def warm_interpreter() -> WarmInterpreter:
    """Return the interpreter that the tests of this process share; it ends with the process."""
    shared = WarmInterpreter()
    atexit.register(shared.close)
    return shared


def import_everything() -> None:
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # so that the collector of a fork does not copy the memory of the modules


def _serve() -> None:
    import_everything()
    supervisors: list[int] = []
    for line in sys.stdin:
        supervisors = [pid for pid in supervisors if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        if (supervisor := os.fork()) == 0:
            _supervise(**json.loads(line))
        supervisors.append(supervisor)


def _supervise(folder: str, args: list[str], cwd: str, env: dict[str, str]) -> None:
    """Fork the script, and write its process id and its exit status."""
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
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(place / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = args
    sys.path[0] = str(Path(args[0]).parent)
    runpy.run_path(args[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    _serve()

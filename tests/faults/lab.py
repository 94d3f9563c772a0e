"""Where faults are tried: a working folder, warm interpreters, and undisturbed commands to compare with."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import psutil

from tests.faults.shim import Change, Plan
from tests.faults.warm import Warm
from tests.scripts.conftest import COMMON, TINY_AUTOENCODER, TINY_DIFFUSION
from tests.support.hub_server import HubServer
from tests.support.runs import ROOT, environment

Item = TypeVar("Item")
Result = TypeVar("Result")

REPO = "ada/model"


@dataclass(frozen=True)
class Command:
    """A command that is disturbed and typed again.

    Args:
        folder: what it makes, below the folder in which it is typed.
        inputs: commands that make what it needs.
        uploads: whether the result is in the repository REPO as well.
    """

    folder: str
    script: Path
    words: tuple[str, ...]
    inputs: tuple[Command, ...] = ()
    uploads: bool = False

    @property
    def name(self) -> str:
        return f"{self.script.stem} ({self.folder})"

    def plus(self, *words: str, folder: str | None = None) -> Command:
        """Return this command with more words, and with another output folder if one is given."""
        own = ("--output_dir", folder) if folder else ()
        return replace(self, folder=folder or self.folder, words=(*self.words, *words, *own))


def _command(folder: str, script: str, *words: str, inputs: Sequence[Command] = (), uploads: bool = False) -> Command:
    return Command(folder, ROOT / script, (*words, "--output_dir", folder), tuple(inputs), uploads)


_DATA = ("--dataset_name", "posters")
# A run that is asked to stop writes a checkpoint that an undisturbed one does not have. It is deleted like any other
# checkpoint as soon as there are more than the limit.
_TWO_EPOCHS = ("--num_train_epochs", "2", "--checkpoints_total_limit", "1")
_TOY = (
    "--report_to", "none", "--cpu_threads", "1", "--train_batch_size", "4", "--num_samples", "8", "--logging_steps",
    "1", "--num_train_epochs", "3", "--checkpointing_steps", "2", "--checkpoints_total_limit", "1",
    "--validation_steps", "3",
)  # fmt: skip
POSTERS = _command(
    "posters", "data_scripts/make_posters.py", "--num_posters", "12", "--num_workers", "1",
    "--validation_fraction", "0.2",
)  # fmt: skip
TOKENIZER = _command("tokenizer", "data_scripts/train_tokenizer.py", *_DATA, inputs=[POSTERS])
AUTOENCODER = _command(
    "vae", "training/train_autoencoder.py", *COMMON, *TINY_AUTOENCODER, *_DATA, *_TWO_EPOCHS, inputs=[POSTERS],
)  # fmt: skip
LATENTS = _command(
    "latents", "data_scripts/precompute_latents.py", *_DATA, "--resolution", "64", "--vae", "vae", "--shard_rows", "4",
    inputs=[POSTERS, AUTOENCODER],
)  # fmt: skip
DIFFUSION = _command(
    "ldm", "training/train_latent_diffusion.py", *COMMON, *TINY_DIFFUSION, *_DATA, "--tokenizer", "tokenizer", "--vae",
    "vae", "--latent_cache", "latents", *_TWO_EPOCHS, "--preview_epochs", "1",
    inputs=[POSTERS, TOKENIZER, AUTOENCODER, LATENTS],
)  # fmt: skip
# A run of six steps that prunes, moves `best`, and holds the best checkpoint, of step 3, in memory until that of step 4
# is written: the smallest one in which everything about checkpoints happens.
TOY = _command("toy", "tests/support/toy.py", *_TOY)
UPLOAD = _command(
    "uploaded", "tests/support/toy.py", *_TOY, "--push_to_hub", "true", "--hub_model_id", REPO,
    "--hub_strategy", "checkpoint", uploads=True,
)  # fmt: skip
COMMANDS = (TOY, POSTERS, TOKENIZER, AUTOENCODER, LATENTS, DIFFUSION, UPLOAD)


@dataclass
class Done:
    """A command that has ended: its exit status (None: it hung and was killed) and what it printed."""

    status: int | None
    output: str


class Worker:
    """A warm interpreter with a plan of faults and a Hub of its own."""

    def __init__(self, folder: Path, stack: ExitStack):
        folder.mkdir(parents=True)
        self.folder = folder
        self.plan = Plan(folder / "plan")
        self.hub = HubServer(folder / "hub")
        stack.callback(self.hub.stop)
        self.variables = environment(
            **self.hub.env(home=folder / "hf_home"), HF_DATASETS_CACHE=str(folder / "datasets"), PYTHONPATH=str(ROOT)
        )
        self.warm = stack.enter_context(Warm(self.variables | self.plan.environment(), folder))
        self._typed: subprocess.Popen[bytes] | None = None
        self._number = 0

    def fresh(self, command: Command, reference: Path) -> Path:
        """Return a new folder in which the inputs of `command` lie, and an empty Hub."""
        self._number += 1
        folder = self.folder / f"{self._number:05d}"
        folder.mkdir()
        for made in command.inputs:
            shutil.copytree(reference / made.folder, folder / made.folder, symlinks=True)
        self.hub.repos.clear()
        return folder

    def type(self, command: Command, folder: Path, **environment: str) -> Done:
        """Run a command in `folder` to its end."""
        self.start(command, folder, **environment)
        return self.end()

    def start(self, command: Command, folder: Path, cold: bool = False, **environment: str) -> int:
        """Start a command in `folder` and return its process id.

        Args:
            cold: start a new interpreter, as typing the command does, instead of a fork of the warm one.
            environment: further variables.
        """
        self.output = self.folder / "output"
        self.output.unlink(missing_ok=True)
        if not cold:
            return self.warm.start(command.script, *command.words, folder=folder, output=self.output, **environment)
        with self.output.open("wb") as output:
            self._typed = subprocess.Popen(
                [sys.executable, str(command.script), *command.words], cwd=folder, env=self.variables | environment,
                stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        return self._typed.pid

    def end(self) -> Done:
        """Wait for the command."""
        status: int | None = None
        if self._typed is not None:
            status, self._typed = self._typed.wait(), None
        else:
            with suppress(TimeoutError):
                status = self.warm.wait()
        text = self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""
        return Done(status, text)

    def hub_files(self, command: Command) -> dict[str, bytes]:
        """Return the names of the files in the repository, with the contents of those that have weights."""
        files = self.hub.files(REPO) if command.uploads and REPO in self.hub.repos else {}
        return {name: data if name.endswith(".safetensors") else b"" for name, data in files.items()}


@dataclass
class Lab:
    """A context manager.

    Args:
        folder: an empty working folder.
        thorough: try everything instead of a sample.
        every: with `thorough`, faults hit every `every`-th change of the file system.
        workers: number of commands that are tried at a time.
    """

    folder: Path
    thorough: bool = False
    every: int = 1
    workers: int = 1
    reference_hub: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def stride(self, sample: int) -> int:
        """Return the distance between the changes that faults hit; `sample` is that of the short form."""
        return self.every if self.thorough else sample

    def __enter__(self) -> Lab:
        self._stack = ExitStack()
        self._idle: queue.Queue[Worker] = queue.Queue()
        self._changes: dict[str, list[Change]] = {}
        for number in range(self.workers):
            self._idle.put(Worker(self.folder / f"worker{number}", self._stack))
        self.reference.mkdir(exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def reference(self) -> Path:
        """Folder of the undisturbed commands."""
        return self.folder / "reference"

    def changes(self, command: Command) -> list[Change]:
        """Run a command and its inputs undisturbed, once, and return the changes of the file system that it makes."""
        for made in command.inputs:
            self.changes(made)
        if command.name not in self._changes:
            with self.worker() as worker:
                worker.hub.repos.clear()
                worker.plan.watch(self.reference)
                done = worker.type(command, self.reference)
                assert done.status == 0, done.output
                self._changes[command.name] = worker.plan.changes()
                self.reference_hub[command.name] = worker.hub_files(command)
                worker.plan.clear()
        return self._changes[command.name]

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Lend a worker."""
        worker = self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put(worker)

    def map(self, function: Callable[[Worker, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield `function(worker, item)` for each item, on all workers."""

        def call(item: Item) -> Result:
            with self.worker() as worker:
                return function(worker, item)

        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(call, items)


def runs(process: int) -> bool:
    """Return whether a process exists and has not ended."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def available_workers() -> int:
    return len(os.sched_getaffinity(0))

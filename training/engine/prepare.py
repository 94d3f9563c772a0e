"""Making the missing inputs of a run: posters, tokenizer, autoencoder, latents.

The `prepare` key of a YAML file maps each path to the script of this project that makes it. What is complete is left
unchanged. These functions are called on the main process only.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pipelines.tools.cli import INTERRUPTED_STATUS, REQUEUE_STATUS, USER_ERROR_STATUS, UserError
from pipelines.tools.commands import command as typed
from pipelines.tools.resources import CODE
from training.core.locks import FolderLock
from training.core.made_folders import incomplete, lock_of
from training.core.options import Options, option
from training.engine.signals import STARTED_BY, Interrupted

logger = logging.getLogger("halftone")

WAIT_SECONDS = 0.5
RUN_LOCK = ".lock"
_OWN_FOLDERS = ("data_scripts", "training")
# Variables of a launcher are not passed on to a script: it would wait for other ranks, which are never started.
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
)
_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")
OWN_IMAGES = (
    f"To train on your own images: {typed('training/train_autoencoder.py --train_data_dir FOLDER --output_dir')} "
    "runs/my_autoencoder, then see 'Your own images' in README.md"
)


@dataclass
class PrepareConfig(Options):
    """Inputs that are made before training if they are missing."""

    prepare: dict[str, str] = option({}, on_resume="free")
    """Mapping from a required path to the script of this project, with its flags, that creates it if it is missing or
    incomplete (usually in YAML), e.g. {data/posters_64: data_scripts/make_posters.py --output_dir data/posters_64}"""

    def recipes(self) -> dict[str, str]:
        """Return the entries of `prepare` whose path is used in the config or in another such entry."""
        settings = self.to_dict()
        named = set(_strings({name: value for name, value in settings.items() if name != "prepare"}))
        needed: dict[str, str] = {}
        for path, command in reversed(self.prepare.items()):  # an entry comes after the entries that it uses
            if any(is_named(path, name) for name in named):
                needed[path] = command
                named |= set(command.split())
        return dict(reversed(needed.items()))


def make_missing(recipes: Mapping[str, str], stop_requested: Callable[[], int | None]) -> None:
    """Run the command of each path that is missing or incomplete, in order.

    If another process is making a path, this one waits and then uses the result.

    Args:
        recipes: path → command line, consisting of a script in data_scripts/ or training/ and its flags.
        stop_requested: returns the signal that asked this process to stop, or None; it is passed on to the command.

    Raises:
        UserError: a command does not run a script of this project, fails, or does not make its path.
        Interrupted: this process or a command was asked to stop.
    """
    missing = missing_inputs(recipes)
    if missing and len(sys.argv) == 1:
        logger.info("no arguments given: running the quickstart. %s", OWN_IMAGES)
    for number, (path, command) in enumerate(missing.items(), 1):
        while problem := incomplete(path, _script(command)):
            if _wait_for_other_maker(path, command, stop_requested):
                continue
            logger.info("%s %s; making it (%d of %d): %s", path, problem, number, len(missing), typed(command))
            status = run_script(_checked(command), stop_requested)
            if stop_requested() or status in (INTERRUPTED_STATUS, REQUEUE_STATUS):
                raise Interrupted
            problem = incomplete(path, _script(command))
            if status == USER_ERROR_STATUS and (problem is None or _is_locked(path, command)):
                continue  # another process began to make it in the meantime
            if status == USER_ERROR_STATUS:
                raise UserError(f"{path} could not be made; see the error above")
            if status != 0 or problem:
                fact = f"exit status {status}" if status else f"exit status 0, but it {problem}"
                raise UserError(f"{path} was not made ({fact}); run its command alone: {typed(command)}")


def missing_inputs(recipes: Mapping[str, str]) -> dict[str, str]:
    """Return the recipes whose path is missing or incomplete. Raises UserError for a command that cannot be run."""
    commands = {path: _checked(command) for path, command in recipes.items()}
    return {path: command for path, command in recipes.items() if incomplete(path, commands[path][1])}


def described(missing: Mapping[str, str]) -> list[str]:
    """Return lines for a dry run that say what is missing, and how it is made."""
    lines = [f"  {path}\n    {typed(command)}" for path, command in missing.items()]
    return ["missing inputs; the run makes them first, and these commands make them by hand:", *lines]


def _wait_for_other_maker(path: str, command: str, stop_requested: Callable[[], int | None]) -> bool:
    """Wait while another process makes `path`, and return whether there was one. Raises Interrupted."""
    told = False
    while _is_locked(path, command):
        if not told:
            logger.info("another process is making %s; waiting for it", path)
        told = True
        if stop_requested():
            raise Interrupted
        time.sleep(WAIT_SECONDS)
    return told


def _is_locked(path: str, command: str) -> bool:
    """Return whether another process makes what `command` makes."""
    file = _lock_file(path, command)
    if file is None or not file.is_file():
        return False
    try:
        with FolderLock(file, ""):
            return False
    except UserError:
        return True


def _lock_file(path: str, command: str) -> Path | None:
    """Return the file that the script of `command` locks: beside a data folder, or inside the folder of a run."""
    words = shlex.split(command)
    given = [word.removeprefix("--output_dir=") for word in words if word.startswith("--output_dir=")]
    after = words[words.index("--output_dir") + 1 :] if "--output_dir" in words else []
    folder = Path([*after[:1], *given, path][0])
    if Path(words[0]).parent.name != "training":
        return lock_of(folder).file
    return next((place / RUN_LOCK for place in (folder, folder.parent) if (place / RUN_LOCK).is_file()), None)


def _script(command: str) -> str:
    return shlex.split(command)[0]


def is_named(path: str, name: str, kind: type[PurePath] = PurePath) -> bool:
    """Return whether `name` is the path of an input, or of a folder that contains it."""
    return bool(kind(name).parts) and kind(path).is_relative_to(kind(name))


def _checked(command: str) -> list[str]:
    try:
        script, *arguments = shlex.split(command)
    except ValueError as error:  # nothing, or a quotation mark without its counterpart
        raise UserError(f"the command `{command}` in `prepare` cannot be read ({error}); fix it") from None
    path = (CODE / script).resolve()
    # A YAML file may come from another person, so it can only run this project's own scripts.
    if path.parent not in [CODE / folder for folder in _OWN_FOLDERS] or path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"`prepare` runs '{script}', which is not one of this project's own scripts; "
            f"name one in {' or '.join(f'{folder}/' for folder in _OWN_FOLDERS)}"
        )
    return [sys.executable, str(path), *arguments]


def run_script(command: list[str], stop_requested: Callable[[], int | None]) -> int:
    """Run a command outside any launcher, pass a request to stop on to it, and return its exit status."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ:
        environment.pop("OMP_NUM_THREADS", None)  # set to 1 by the launcher, not chosen by the user
    environment[STARTED_BY] = str(os.getpid())  # the command ends when this process has been killed
    process = subprocess.Popen(command, env=environment)
    forwarded = False
    while process.poll() is None:
        number = stop_requested()
        if number is not None and not forwarded:
            # Ctrl-C in a terminal also reaches the command, and a second SIGINT would stop it without saving.
            # `kill -INT` reaches this process only. SIGTERM is right in both cases.
            # Windows can only end a process.
            on_windows = sys.platform == "win32"
            process.send_signal(signal.SIGTERM if number == signal.SIGINT or on_windows else number)
        forwarded = forwarded or number is not None
        time.sleep(0.1)
    return process.returncode


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in nested dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)

"""Inputs that are missing and that a config knows how to make: posters, tokenizer, autoencoder, latents.

A YAML file may say, under `prepare`, which path each of the project's scripts makes; what is there already is left
alone. Called on the main process only.
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
from pathlib import Path
from typing import Any

from pipelines.tools.cli import USER_ERROR_STATUS, UserError
from pipelines.tools.commands import command as typed
from pipelines.tools.resources import CODE
from training.core.options import Options, option
from training.engine.signals import REQUEUE_STATUS, Interrupted

logger = logging.getLogger("halftone")

_OWN_FOLDERS = ("data_scripts", "training")
# What a launcher sets for its own processes would make a script started from one wait for ranks that never come.
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
    f"For your own pictures: {typed('training/train_autoencoder.py --train_data_dir FOLDER --output_dir')} "
    "runs/my_autoencoder, then see 'Your own images' in README.md"
)


@dataclass
class PrepareConfig(Options):
    """Inputs that are made before training where they are missing."""

    prepare: dict[str, str] = option({}, on_resume="free")
    """Inputs that may be missing: path → the script (and its flags) that makes it; for YAML files"""

    def recipes(self) -> dict[str, str]:
        """The entries of `prepare` that are needed: those for a path that the config names, or another such entry."""
        settings = self.to_dict()
        named = set(_strings({name: value for name, value in settings.items() if name != "prepare"}))
        needed: dict[str, str] = {}
        for path, command in reversed(self.prepare.items()):  # what is made from others comes after them
            if any(path == name or path.startswith(f"{name}/") for name in named):
                needed[path] = command
                named |= set(command.split())
        return dict(reversed(needed.items()))


def make_missing(recipes: Mapping[str, str], stop_requested: Callable[[], int | None]) -> None:
    """Run, in order, the command of each path that does not exist.

    Args:
        recipes: path → command line, a script of data_scripts/ or training/ and its flags.
        stop_requested: the signal that asked this process to stop, if any; it is passed on to the command.

    Raises:
        UserError: a command that is none of ours, fails, or does not make its path.
        Interrupted: a stop was asked for.
    """
    missing = {path: command for path, command in recipes.items() if not Path(path).exists()}
    if missing and len(sys.argv) == 1:
        logger.info("no arguments: this is the quickstart. %s", OWN_IMAGES)
    for number, (path, command) in enumerate(missing.items(), 1):
        logger.info("%s is missing; making it (%d of %d): %s", path, number, len(missing), typed(command))
        status = run_script(_checked(command), stop_requested)
        if stop_requested() or status in (130, REQUEUE_STATUS):
            raise Interrupted
        if status == USER_ERROR_STATUS:
            raise UserError(f"{path} could not be made, for the reason given above")
        if status != 0 or not Path(path).exists():
            raise UserError(f"{path} was not made (exit status {status}); run it by itself: {typed(command)}")


def interrupted_while_making(recipes: Mapping[str, str], stop_requested: Callable[[], int | None]) -> bool:
    """`make_missing`, and whether a stop came between."""
    try:
        make_missing(recipes, stop_requested)
    except Interrupted:
        return True
    return False


def _checked(command: str) -> list[str]:
    script, *arguments = shlex.split(command)
    path = (CODE / script).resolve()
    # A shared YAML file may start the project's own scripts and nothing else.
    if path.parent not in [CODE / folder for folder in _OWN_FOLDERS] or path.suffix != ".py" or not path.is_file():
        raise UserError(f"`prepare` may run the project's own scripts, and '{script}' is none")
    return [sys.executable, str(path), *arguments]


def run_script(command: list[str], stop_requested: Callable[[], int | None]) -> int:
    """Run a command of its own, outside any launcher, and pass a request to stop on to it; returns its exit status."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ:
        environment.pop("OMP_NUM_THREADS", None)  # the launcher's 1, not the user's choice
    process = subprocess.Popen(command, env=environment)
    told = False
    while process.poll() is None:
        number = stop_requested()
        if number is not None and not told:
            # A terminal's Ctrl-C has reached the command already, and a second one would stop it without saving;
            # `kill -INT` has not: a SIGTERM is right for both.
            process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
        told = told or number is not None
        time.sleep(0.1)
    return process.returncode


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)

"""Commands as the user types them: `python data_scripts/make_posters.py` in a checkout, `halftone data make_posters`
in an installed copy, whose scripts have no path that anybody would type."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from .resources import IS_CHECKOUT

PROGRAM = "halftone"
SCRIPT_FOLDERS = ("training", "training/evaluation", "pipelines", "data_scripts")
# The beginning of a script's path, and the words that stand for it after `halftone`.
_SUBCOMMANDS = {
    "training/train_": "train ",
    "training/evaluation/evaluate_": "evaluate ",
    "training/": "",
    "pipelines/": "",
    "data_scripts/": "data ",
}
_LAUNCHED = ("training/train_", "data_scripts/precompute_latents")


def subcommand(script: str) -> str:
    """`train autoencoder` for `training/train_autoencoder.py`: what is typed after `halftone`."""
    name = script.removesuffix(".py")
    beginning = next(beginning for beginning in _SUBCOMMANDS if name.startswith(beginning))
    return _SUBCOMMANDS[beginning] + name.removeprefix(beginning)


def command(script: str, *, checkout: bool = IS_CHECKOUT) -> str:
    """How one of the project's scripts is started, for messages.

    Args:
        script: its path in the repository, flags after it or not.
        checkout: whether the code is used from the repository.
    """
    path, *flags = script.split(" ", 1)
    if not checkout:
        return " ".join([PROGRAM, subcommand(path), *flags])
    launcher = "accelerate launch" if path.startswith(_LAUNCHED) else "python"
    return " ".join([launcher, path, *flags])


def install_command(extra: str, package: str, *, checkout: bool = IS_CHECKOUT) -> str:
    """How the package of an extra is installed, for messages."""
    return f"pip install -e '.[{extra}]'" if checkout else f"pip install {package}"


def this_command() -> str:
    """What the user typed, as far as a process can know it: to be typed again."""
    return " ".join([_program(), *map(shlex.quote, sys.argv[1:])])


def _program() -> str:
    typed = sys.argv[0]
    if typed.startswith(f"{PROGRAM} "):  # halftone_trainer puts its subcommand there
        return typed
    launcher = _launcher()
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    if specification is not None and specification.origin == typed:
        return f"{launcher} -m {specification.name}"
    script = Path(typed).resolve()
    return f"{launcher} {script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else typed}"


def _launcher() -> str:
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "accelerate launch"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    return "python"

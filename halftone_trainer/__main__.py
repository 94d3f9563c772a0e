"""The command `halftone`: every script of the project under one name.

    halftone train latent_diffusion --train_data_dir my_pictures
    halftone sample --model runs/my_images/latent_diffusion_64_caption --prompt "a red circle"

A subcommand takes the same options as its script (`python training/train_latent_diffusion.py …`). To train with several
processes, use `accelerate launch` or `torchrun`; in an installed copy, with `-m training.train_latent_diffusion`.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import textwrap
from pathlib import Path

from pipelines.tools.cli import UserError, entry_point, nearest
from pipelines.tools.commands import PROGRAM, SCRIPT_FOLDERS, subcommand
from pipelines.tools.resources import CODE, PRESETS, find_shipped, own_version, shipped_files

PATH_HELP = "Print the path of a preset or of another file that comes with Halftone; without a name, list them all"
_COLUMN = 28


def main() -> int | None:
    words = sys.argv[1:]
    scripts = find_scripts()
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview({name: summary(script) for name, script in scripts.items()} | {"path [NAME]": PATH_HELP}))
        return None
    if words[0] in ("-V", "--version"):
        print(own_version() or "a checkout that is not installed")
        return None
    if words[0] == "path":
        print_path(words[1:])
        return None
    chosen, options = choose(words, scripts)
    if chosen is None:
        print(overview({name: summary(file) for name, file in scripts.items() if name.startswith(f"{words[0]} ")}))
        return None
    # As if the program had been started by this name, so that usage lines and suggested commands show what was typed.
    sys.argv = [f"{PROGRAM} {chosen}", *options]
    module = scripts[chosen].relative_to(CODE).with_suffix("")
    return importlib.import_module(".".join(module.parts)).main()


def find_scripts() -> dict[str, Path]:
    """Return every script by its subcommand: `train autoencoder`, `sample`, ..."""
    files = [file for folder in SCRIPT_FOLDERS for file in sorted((CODE / folder).glob("*.py"))]
    scripts = [file for file in files if '__name__ == "__main__"' in file.read_text(encoding="utf-8")]
    return {subcommand(script.relative_to(CODE).as_posix()): script for script in scripts}


def choose(words: list[str], scripts: dict[str, Path]) -> tuple[str | None, list[str]]:
    """Split `words` into a subcommand and its options; the subcommand is None if the help of a group is requested.

    Raises:
        UserError: if the subcommand does not exist; the message suggests the nearest.
    """
    first, *others = words
    if first in scripts:
        return first, others
    group = [name.split()[1] for name in scripts if name.startswith(f"{first} ")]
    if not group:
        firsts = sorted({name.split()[0] for name in scripts} | {"path"})
        raise UserError(f"unknown command '{PROGRAM} {first}'{nearest(first, firsts)} ({PROGRAM} --help lists all)")
    if others and others[0] in ("-h", "--help"):
        return None, []
    if not others or others[0].startswith("-"):
        raise UserError(f"'{PROGRAM} {first}' is incomplete; add one of {', '.join(group)}")
    if others[0] not in group:
        near = nearest(others[0], group)
        raise UserError(f"unknown command '{PROGRAM} {first} {others[0]}'{near}; choose from {', '.join(group)}")
    return f"{first} {others[0]}", others[1:]


def overview(commands: dict[str, str]) -> str:
    """Return the help text, with an entry for each of these subcommands."""
    indent = " " * _COLUMN
    lines = [f"usage: {PROGRAM} COMMAND [options]", ""]
    for name, text in commands.items():
        lines += textwrap.wrap(text, width=100, initial_indent=f"  {name}".ljust(_COLUMN), subsequent_indent=indent)
    return "\n".join([*lines, "", f"`{PROGRAM} COMMAND --help` explains the options of a command."])


def summary(script: Path) -> str:
    """Return the first sentence of a script's docstring, up to a colon if it has one; the script is not imported."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) |: |[:.]$", paragraph)[0].rstrip(".")


def print_path(words: list[str]) -> None:
    """Run `halftone path [NAME]`."""
    if not words:
        print("\n".join(shipped_files()))
    elif words[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} path [NAME]\n\n{PATH_HELP}.")
    else:
        print(find_shipped(words[0], [PRESETS, "configs"]))


def run() -> None:
    entry_point(main)


if __name__ == "__main__":
    run()

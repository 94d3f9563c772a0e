"""The help of a command: its essential options, or all of them, by group."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

from training.core.options import Options

HELP_ALL = "--help_all"
ESSENTIALS, ADVANCED = "Essentials", "Advanced"
# The order in which groups are shown; groups of a component (--model.*) come last.
ORDER = (ESSENTIALS, "Data", "Length", "Saving and measuring", "Trackers", "Hub", ADVANCED)
WIDTH = 120


def help_text(parser: Any, config_class: type[Options], *, everything: bool) -> str:
    """Return the help of a parser.

    Args:
        parser: a parser of jsonargparse with the options of `config_class`.
        everything: whether to list all options; otherwise only the essential ones.
    """
    groups = _grouped(parser, config_class)
    is_short = not everything and len(groups) > 1
    shown = {ESSENTIALS: groups[ESSENTIALS]} if is_short else groups
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    formatter = argparse.RawDescriptionHelpFormatter(parser.prog, max_help_position=30, width=width)
    formatter.add_usage(f"{parser.prog} [--config FILE] [--OPTION VALUE ...]", [], [])
    formatter.add_text(parser.description)
    for title, actions in shown.items():
        formatter.start_section(title if len(groups) > 1 else "Options")
        formatter.add_arguments(actions)
        formatter.end_section()
    if is_short:
        total = sum(len(actions) for actions in groups.values())
        others = ", ".join(title for title in groups if title in ORDER[1:])
        formatter.add_text(f"{HELP_ALL} lists all {total} options: {others}, and those of the networks.")
    return formatter.format_help()


def _grouped(parser: Any, config_class: type[Options]) -> dict[str, list[argparse.Action]]:
    """Return the options of a parser by group, in the order in which groups are shown."""
    found: dict[str, list[argparse.Action]] = {}
    essential = _essential(config_class)
    components = {action.dest.partition(".")[0] for action in parser._actions if "." in action.dest}
    for action in parser._actions:
        name = action.dest.partition(".")[0]
        if action.help == argparse.SUPPRESS or not action.option_strings:
            continue
        if name in components:
            title = f"--{name}.*"
        elif name in essential:
            title = ESSENTIALS
        else:
            title = _group(config_class, name)
        found.setdefault(title, []).append(_shown(action))
    order = [*ORDER, *(title for title in found if title not in ORDER)]
    return {title: found[title] for title in order if title in found}


def _shown(action: argparse.Action) -> argparse.Action:
    """Return an action as the help shows it: without the second spelling of lists, and with a short placeholder."""
    return argparse.Action(
        [option for option in action.option_strings if not option.endswith("+")],
        action.dest,
        nargs=0 if action.nargs == 0 else None,
        help=action.help,
        metavar=_placeholder(action),
    )


def _placeholder(action: argparse.Action) -> str:
    if action.dest == "config":
        return "FILE"
    if action.dest == "print_config":
        return "[=skip_default]"
    kinds = [kind for kind in alternatives(action) if kind is not type(None)]
    if kinds and get_origin(kinds[0]) is Literal:
        return "{" + ",".join(map(str, get_args(kinds[0]))) + "}"
    names = [{bool: "BOOLEAN", int: "N", float: "NUMBER", str: "TEXT"}.get(kind, "VALUE") for kind in kinds]
    return names[0] if len(set(names)) == 1 else "VALUE"


def alternatives(action: argparse.Action) -> tuple[Any, ...]:
    """Return the types of the values that an option takes."""
    kind = getattr(action, "_typehint", None)
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _essential(config_class: type[Options]) -> set[str]:
    """Return the options that `--help` lists: the marked ones, and where a command marks none, all of its own."""
    names = {field.name for field in dataclasses.fields(config_class)}
    marked = {name for name in names if any(f.metadata.get("essential") for f in _definitions(config_class, name))}
    own = set(config_class.__dict__.get("__annotations__", {}))
    return {"config", "help"} | marked | (set() if own & marked else own)


def _group(config_class: type[Options], name: str) -> str:
    """Return the group of the part of the config that defines an option first."""
    for part in reversed(config_class.__mro__):
        if name in part.__dict__.get("__annotations__", {}):
            return getattr(part, "help_group", ADVANCED)
    return ADVANCED


def _definitions(config_class: type[Options], name: str) -> Sequence[dataclasses.Field]:
    parts = [part for part in config_class.__mro__ if dataclasses.is_dataclass(part)]
    fields = [part.__dataclass_fields__.get(name) for part in parts]
    return [field for field in fields if field is not None]

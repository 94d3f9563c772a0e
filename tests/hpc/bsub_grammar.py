"""The options of `bsub` that a script may contain, by IBM's reference of the command: a parser of #BSUB lines."""

from __future__ import annotations

import re
import shlex

TIME = r"(\d{1,3}:)?\d{1,3}"  # [hour:]minute
DONE = r"done\((\d+|\$\{\w+\})(\[\d+\])?\)"
SECTION = r"(span|rusage|select|order|same|affinity)\[[^\[\]]+\]"  # of a resource requirement
# Pattern of each option's value; None for an option without a value.
OPTIONS: dict[str, str | None] = {
    "-J": r"[A-Za-z][\w.+-]{0,4093}(\[\d+-\d+\](%\d+)?)?",
    "-n": r"[1-9]\d*",
    "-R": rf"{SECTION}( {SECTION})*",
    "-x": None,
    "-app": r"[\w-]{1,59}",
    "-U": r"[\w#.-]+",
    "-G": r"[\w-]+",
    "-gpu": r"num=[1-9]\d*(:gmodel=\w+)?",
    "-M": r"\d+[KMGT]?B?",
    "-W": TIME,
    "-q": r"[\w-]{1,59}",
    "-P": r"[\w-]{1,511}",
    "-wa": r"[A-Z]\w*",
    "-wt": TIME,
    "-Q": r"\d{1,3}( \d{1,3})*",
    "-r": None,
    "-o": r"[^\s]+",
    "-w": rf"{DONE}( && {DONE})*",
}
REPEATED = ("-R",)  # `bsub` joins its values


class NotBsub(Exception):
    """A script is not one that `bsub` reads as it was meant."""


def options_of(script: str) -> dict[str, str | None]:
    """Return the options of a script. Raises NotBsub."""
    lines = script.splitlines()
    if not lines or not lines[0].startswith("#!"):
        raise NotBsub("the first line names no shell")
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    found: dict[str, str | None] = {}
    for number, line in enumerate(lines):
        if not line.startswith("#BSUB"):
            continue
        if number > first_command:
            raise NotBsub(f"line {number + 1} is after the first command: {line}")
        words = shlex.split(line.removeprefix("#BSUB"), comments=False)
        while words:
            option = words.pop(0)
            if option not in OPTIONS or (option in found and option not in REPEATED):
                raise NotBsub(f"{option} in line {number + 1} is unknown, or is given twice")
            pattern = OPTIONS[option]
            value = None if pattern is None else words.pop(0) if words else ""
            if pattern is not None and not re.fullmatch(pattern, value or ""):
                raise NotBsub(f"{option} has the value {value}")
            found[option] = f"{found[option]} {value}" if option in found else value
    if ("-wa" in found) != ("-wt" in found):
        raise NotBsub("-wa and -wt belong together")
    if "-wt" in found and "-W" in found and minutes(found["-wt"]) >= minutes(found["-W"]):
        raise NotBsub(f"the warning of -wt {found['-wt']} would come at the start of a job with -W {found['-W']}")
    return found


def minutes(time: str | None) -> int:
    """Return the minutes of [hour:]minute."""
    *hours, rest = (int(part) for part in (time or "0").split(":"))
    return 60 * sum(hours) + rest

"""Sweeps: one experiment becomes several, one for each combination of values and for each random seed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.tools.cli import UserError

SEED = "seed"
_OWN = ("output_dir", "config")
_MOST_CHARACTERS = 200  # a name of a file may have 255 bytes


@dataclass(frozen=True)
class Sweep:
    """An option and the values that it takes, as they are typed."""

    option: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A combination of values, and the number of the seed."""

    values: tuple[tuple[str, str], ...]
    """Pairs of an option and its value"""
    repetition: int | None
    """Number that is added to the seed of the config; None keeps the seed"""

    @property
    def flags(self) -> list[str]:
        """The flags of the combination, without the seed."""
        return [f"--{option}={value}" for option, value in self.values]

    @property
    def setting(self) -> str:
        """The combination in words, without the seed; empty if nothing is swept."""
        return ", ".join(f"{option}={value}" for option, value in self.values)

    def folder(self, seed: int) -> str:
        """Return the name of the run folder, in which every file system accepts each character."""
        parts = [f"{option}_{_plain(value)}" for option, value in self.values]
        name = "_".join([*parts, *([f"{SEED}_{seed}"] if self.repetition is not None else [])])
        if len(name) > _MOST_CHARACTERS:
            raise UserError(
                f"--sweep: the run folder {name[:60]}… would have a name of {len(name)} characters; sweep less"
            )
        return name


def parse_sweeps(texts: Sequence[str]) -> list[Sweep]:
    """Parse `learning_rate=1e-4,5e-4`. Commas in brackets belong to a value.

    Raises:
        UserError: a text has another form, gives a value twice, or names an option that cannot be swept.
    """
    sweeps: list[Sweep] = []
    for text in texts:
        option, equals, values = text.partition("=")
        option = option.strip().removeprefix("--")
        found = tuple(_split(values))
        if not option or not equals or not all(found):
            raise UserError(f"--sweep {text}: write it as OPTION=VALUE,VALUE, for example learning_rate=1e-4,5e-4")
        if option in _OWN:
            raise UserError(f"--sweep {text}: {option} is different for each run already; sweep another option")
        if option in [sweep.option for sweep in sweeps]:
            raise UserError(f"--sweep gives {option} twice; write all of its values into one --sweep")
        if len(set(found)) < len(found):
            raise UserError(f"--sweep {text}: a value occurs twice; remove one of them")
        sweeps.append(Sweep(option, found))
    return sweeps


def variants(sweeps: Sequence[Sweep], seeds: int | None) -> list[Variant]:
    """Return every combination of the values of all sweeps, each with every seed, in the given order.

    Args:
        seeds: number of seeds; None keeps the seed of the config.

    Raises:
        UserError: there are seeds, and the seed is swept.
    """
    if seeds is not None and SEED in [sweep.option for sweep in sweeps]:
        raise UserError("--seeds and --sweep seed=… both give the seeds; keep one of them")
    repetitions = [None] if seeds is None else range(seeds)
    grid = itertools.product(*([(sweep.option, value) for value in sweep.values] for sweep in sweeps))
    return [Variant(values, repetition) for values in grid for repetition in repetitions]


def _split(text: str) -> Iterator[str]:
    """Yield the values between commas that are outside of brackets."""
    depth, value = 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth <= 0:
            yield value.strip()
            value = ""
        else:
            value += character
    yield value.strip()


def _plain(value: str) -> str:
    """Return a value as a part of a file name: [64,128] is 64-128."""
    return re.sub(r"[^\w.+-]+", "-", value.strip("[](){} '\"")) or "empty"

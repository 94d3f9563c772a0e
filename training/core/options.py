"""Options: config fields with bounds, and with a rule for changing them when a run is resumed.

A config is a dataclass derived from `Options`. Each module (the optimizer, the checkpoints, a model) defines its own
part of the config with its checks, and a command's config is derived from the parts that it needs. Flags are flat; a
part that is a field (`model: UNetConfig = option(UNetConfig)`) has flags with a dot, such as `--model.layers`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pipelines.tools.cli import UserError
from pipelines.tools.private import without_private
from training.core.checks import check_bounds, check_choice

OnResume = Literal["error", "warn", "free"]
_LARGEST_FLOAT, _LARGEST_INTEGER = 1e38, 2**63 - 1


def option(
    default: Any,
    *,
    on_resume: OnResume = "error",
    content: str = "",
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    usual: str = "",
    essential: bool = False,
    replaces: Sequence[str] = (),
    kept: bool = False,
) -> Any:
    """Define a config field.

    Args:
        default: a value (lists and dicts are copied), or a class derived from `Options` for a group of options.
        on_resume: effect of changing the value when a run is resumed. `error`: refused, as it would be another model or
            other data; `warn`: listed in a warning; `free`: allowed.
        content: for the path or name of an input: its key in `Stage.inputs`. A changed value is then allowed if the
            content is the same, as for data that were copied to another place.
        choices: the allowed values, or the allowed entries of a list.
        at_least, above, at_most, below: bounds of the value, or of each entry of a list; None and texts are allowed.
        usual: a usual value, shown in the message about a value that is out of bounds.
        essential: whether `--help` lists the option; `--help_all` lists all of them.
        replaces: options that say the same in another way; if this one is given as a flag, and not they, their value in
            a YAML file is dropped.
        kept: for an option whose default leaves the choice to the program: a resumed run that does not give the option
            keeps the value with which it was started, also one that an earlier version chose (see `keep`).
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {
        "on_resume": on_resume,
        "content": content,
        "choices": choices,
        "bounds": bounds,
        "usual": usual,
        "essential": essential,
        "replaces": replaces,
        "kept": kept,
    }
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _check_size(flag: str, value: Any) -> None:
    """Raise UserError for a number that no tensor can hold, also in a list or dict."""
    if isinstance(value, list | tuple | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            _check_size(flag, entry)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{flag} is {value}; it must be a finite number")
    elif isinstance(value, float) and abs(value) > _LARGEST_FLOAT:
        raise UserError(f"--{flag} is {value:g}; it must be at most {_LARGEST_FLOAT:g}")
    elif isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        raise UserError(f"--{flag} is {value}; it must be at most {_LARGEST_INTEGER}")


@dataclass
class Options:
    """Base class of configs and of their parts.

    Attributes:
        help_group: the group under which `--help_all` lists the options of a part; see `core/help.py`.
        announcements: what the command says before it begins, one line each.
        prints_config: whether `--dry_run` is followed by all settings (`--print_config`).
    """

    help_group: ClassVar[str] = "Advanced"
    announcements: ClassVar[tuple[str, ...]] = ()
    prints_config: ClassVar[bool] = False

    def validate(self, prefix: str = "") -> None:
        """Raise UserError for invalid values. This base method checks the bounds and choices of each field.
        No number may be infinite, NaN, or too large for float32 or an integer of 64 bits.

        A part overrides it to check several fields together, and calls `super().validate(prefix)` first, so that the
        checks of all base classes of a config run.

        Args:
            prefix: prefix of the flags' names, such as "model." for a group of options.
        """
        for option_field in dataclasses.fields(self):
            value, flag = getattr(self, option_field.name), prefix + option_field.name
            if isinstance(value, Options):
                value.validate(f"{flag}.")
                continue
            rules = option_field.metadata
            for entry in value if isinstance(value, list) else [value]:
                if rules.get("choices") and entry is not None:
                    check_choice(flag, entry, rules["choices"])
                _check_size(flag, entry)
                if "bounds" in rules and not isinstance(entry, str | None):
                    check_bounds(flag, entry, **rules["bounds"], usual=rules["usual"])

    def to_dict(self) -> dict[str, Any]:
        """Return the values of all fields as plain values, and groups of options as dicts."""
        return dataclasses.asdict(self)

    def keep(self, saved: dict[str, Any]) -> None:
        """Set each `kept` option that is left to the program to its value in a run's saved config, if it has one.

        Raises:
            UserError: a saved value is out of bounds.
        """
        for option_field in dataclasses.fields(self):
            name, default = option_field.name, option_field.default
            if not option_field.metadata.get("kept") or getattr(self, name) != default or name not in saved:
                continue
            number = default is None and isinstance(saved[name], (int, float)) and not isinstance(saved[name], bool)
            if number or isinstance(saved[name], str) == isinstance(default, str):
                setattr(self, name, saved[name])
        self.validate()

    def pinned(self) -> dict[str, Any]:
        """Return, by name, the options whose values stand for something that changes elsewhere, such as the newest
        commit of a dataset, with the values that they stand for now; this base method returns none. It may ask a
        server, and another call may return other values: a run calls it once and keeps what it returns.

        Raises:
            UserError: the server does not answer, or does not know the value.
        """
        return {}

    def changes_from(self, saved: dict[str, Any]) -> dict[OnResume, list[str]]:
        """Return the differences from a run's saved config: {"error": ["--seed: 0 → 1"], "warn": […]}.

        Inputs that are compared by their content are left out (see `moved_from`). Both sides are compared as they are
        saved, with tokens masked.
        """
        changes: dict[OnResume, list[str]] = {"error": [], "warn": []}
        for option_field, text in self._differences(saved):
            on_resume: OnResume = option_field.metadata.get("on_resume", "error")
            if on_resume != "free" and not option_field.metadata.get("content"):
                changes[on_resume].append(text)
        return changes

    def moved_from(self, saved: dict[str, Any]) -> dict[str, list[str]]:
        """Return the changed paths of inputs, by key of `Stage.inputs`: {"data": ["--train_data_dir: a → b"]}."""
        moved: dict[str, list[str]] = {}
        for option_field, text in self._differences(saved):
            if option_field.metadata.get("content"):
                moved.setdefault(option_field.metadata["content"], []).append(text)
        return moved

    def _differences(self, saved: dict[str, Any]) -> Iterator[tuple[dataclasses.Field, str]]:
        own, saved = without_private(self.to_dict()), without_private(saved)
        for option_field in dataclasses.fields(self):
            name = option_field.name
            # A choice such as "auto", which was not saved as what it meant, cannot be compared.
            was_open = option_field.metadata.get("kept") and isinstance(option_field.default, str)
            if was_open and saved.get(name) in (None, option_field.default):
                continue
            if name in saved and name in own and saved[name] != own[name]:
                yield option_field, f"--{name}: {saved[name]} → {own[name]}"

"""Options: config fields that carry their bounds, and what it means to change them on a run that has begun.

A config is a dataclass derived from `Options`. Whatever owns a setting (the optimizer, the checkpoints, a model)
defines its part, with its checks, beside the code that uses it; a command's config is derived from the parts it needs.
Flags are flat; a part that is a field of its own (`model: UNetConfig = option(UNetConfig)`) has flags with a dot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from training.core.checks import check_bounds, check_choice

OnResume = Literal["error", "warn", "free"]


def option(
    default: Any,
    *,
    on_resume: OnResume = "error",
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    usual: str = "",
    secret: bool = False,
) -> Any:
    """A config field.

    Args:
        default: a value (lists and dicts are copied), or a class derived from `Options` for a group of options.
        on_resume: what changing it means on a run that has begun. `error`: it would be another model or other data;
            `warn`: the change is listed in one warning; `free`: nothing to say.
        choices: the values allowed, or the entries allowed in a list.
        at_least, above, at_most, below: bounds of the value, or of each entry of a list; None values pass.
        usual: a usual value, named in the message about one out of bounds.
        secret: never written into a file.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"on_resume": on_resume, "choices": choices, "bounds": bounds, "usual": usual, "secret": secret}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Options:
    """Base of every config and of every part of one."""

    def validate(self, prefix: str = "") -> None:
        """Raise UserError for impossible values: here, those outside the bounds and choices of their own fields.

        A part overrides this for what concerns several of its fields, and calls `super().validate(prefix)` first, so
        that the checks of all parts that a config is derived from run.

        Args:
            prefix: what stands before the flags' names, such as "model." for a group of options.
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
                if "bounds" in rules and entry is not None:
                    check_bounds(flag, entry, **rules["bounds"], usual=rules["usual"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values of every field but secrets; groups of options as dicts."""
        values = dataclasses.asdict(self)
        return {f.name: values[f.name] for f in dataclasses.fields(self) if not f.metadata.get("secret")}

    def changes_from(self, saved: dict[str, Any]) -> dict[OnResume, list[str]]:
        """What differs from a run's saved config: {"error": ["--seed: 0 → 1"], "warn": […]}."""
        changes: dict[OnResume, list[str]] = {"error": [], "warn": []}
        own = self.to_dict()
        for option_field in dataclasses.fields(self):
            name = option_field.name
            on_resume: OnResume = option_field.metadata.get("on_resume", "error")
            if name in saved and name in own and on_resume != "free" and saved[name] != own[name]:
                changes[on_resume].append(f"--{name}: {saved[name]} → {own[name]}")
        return changes

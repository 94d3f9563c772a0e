"""The options that turn the choice of settings on and off, and limit the time of a command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from pipelines.tools.cli import UserError
from training.core.options import option
from training.engine.length import LengthConfig

OVERNIGHT_HOURS = 8
_FORM = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


@dataclass
class RecipeConfig(LengthConfig):
    """Whether settings are chosen for the images, and for how much time."""

    chosen: ClassVar[bool] = False  # whether settings were chosen for images

    recipe: Literal["auto", "none"] = option("auto", on_resume="free", essential=True)
    """auto: choose what is not given for these images; none: use the defaults"""
    time_budget: str | None = option(None, on_resume="free", essential=True)
    """Time for the whole command, such as 30m, 1h30m or overnight; settings are chosen for it"""

    def time_limit(self) -> tuple[str, str]:
        if self.time_budget:
            return f"--time_budget is {self.time_budget}", "To train further afterwards, add --extra_epochs N"
        return super().time_limit()

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        seconds = budget_seconds(self.time_budget)
        # A recipe turns the budget into --max_train_minutes, which is also in the config.yaml of its run.
        if seconds and not self.max_train_minutes and not self.chosen:
            raise UserError(
                f"--time_budget {self.time_budget} is for settings that are chosen for images, and this command "
                "chooses none (because of --config, --recipe none, or because no images are named); use "
                f"--max_train_minutes {seconds / 60:g} instead"
            )


def budget_seconds(text: str | None) -> float:
    """Return the seconds that a time such as 30m, 2h, 1h30m or overnight means; 0 for None.

    Raises:
        UserError: the text is not such a time, or it is zero.
    """
    if text is None:
        return 0.0
    if text == "overnight":
        return 3600.0 * OVERNIGHT_HOURS
    found = _FORM.fullmatch(text.replace(" ", "").lower())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    if not (total := 3600 * hours + 60 * minutes + seconds):
        unit = f"; for minutes, write {text}m" if text.isdigit() and int(text) else ""
        raise UserError(f"--time_budget is '{text}'; it must be a time such as 30m, 2h, 1h30m or overnight{unit}")
    return float(total)

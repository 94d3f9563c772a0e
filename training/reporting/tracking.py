"""Trackers: dashboards that record the metrics, previews, config and final summary of a run, beside its own folder.

Trackers never ask a question, never need a network, never slow down or end a run, and continue their record when the
run is resumed.
"""

from __future__ import annotations

import importlib.util
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipelines.tools.cli import UserError, cause, nearest
from pipelines.tools.private import without_private
from training.core.options import Options, option
from training.reporting.backends import (
    Backend,
    Notify,
    TensorBoard,
    Trackio,
    WandB,
    numbers,
    plain,
    wandb_is_set_up,
)
from training.reporting.groups import grouped
from training.reporting.recorder import Recorder

if TYPE_CHECKING:
    from PIL import Image

AUTO = "auto"
KNOWN_TRACKERS = ("wandb", "tensorboard", "trackio")
WANDB_LIMITS = {"wandb_group": 128, "wandb_tags": 64}
"""Largest number of characters that W&B accepts"""
# How long a complete run waits for its trackers, and one that was asked to stop, which should end within two seconds.
FINISH_SECONDS, STOPPING_SECONDS = 30.0, 1.5


@dataclass
class TrackerConfig(Options):
    """The trackers that record metrics and preview images, beside the run folder."""

    help_group = "Trackers"

    report_to: str | list[str] = option(AUTO, on_resume="free", essential=True)
    """Trackers: wandb, trackio, tensorboard, several of them (comma-separated), all, none, or auto (wandb where there
    is a login, a key or WANDB_MODE)"""
    tracker_project_name: str = option("halftone", on_resume="free")
    """Name of the project in the trackers"""
    wandb_group: str | None = option(None, on_resume="free")
    """Group of the run in W&B, such as the runs of one setting with several seeds; run_experiments.py sets it"""
    wandb_tags: list[str] = option([], on_resume="free")
    """Tags of the run in W&B"""
    wandb_entity: str | None = option(None, on_resume="free")
    """User or team in W&B that the run belongs to; if unset, WANDB_ENTITY, or the default of your account"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        for flag, texts in (("wandb_group", [self.wandb_group or ""]), ("wandb_tags", self.wandb_tags)):
            for text in texts:
                if len(text) > WANDB_LIMITS[flag] or (flag == "wandb_tags" and not text.strip()):
                    raise UserError(
                        f"--{prefix}{flag}: '{text}' has {len(text)} characters; W&B takes 1 to {WANDB_LIMITS[flag]}"
                    )
        if not is_automatic(self.report_to):  # what it means is determined when the trackers start
            parse_report_to(self.report_to)


def parse_report_to(report_to: str | Iterable[str] | None) -> list[str]:
    """Parse `"wandb,tensorboard"`, `["wandb"]`, `"none"` or `"all"` (every installed tracker) into a list of names;
    for `"auto"` see `automatic_trackers`.

    Raises:
        UserError: if a name is unknown (the message suggests the nearest), or if a tracker is not installed.
    """
    names = _names(report_to)
    if not names or names == ["none"]:
        return []
    if names == ["all"]:
        return [name for name in KNOWN_TRACKERS if is_installed(name)]
    if names == [AUTO]:
        return automatic_trackers()
    for name in names:
        if name in ("none", "all", AUTO):
            raise UserError(
                f"--report_to {','.join(names)}: '{name}' cannot be combined with other names; give it alone, or "
                "leave it out"
            )
        if name not in KNOWN_TRACKERS:
            known = ", ".join(KNOWN_TRACKERS)
            raise UserError(
                f"--report_to {name}: unknown tracker{nearest(name, KNOWN_TRACKERS)}; choose from {known}, all, "
                "none, auto"
            )
        if not is_installed(name):
            raise UserError(f"--report_to {name}: its package is not installed; pip install {name}, or leave it out")
    return list(dict.fromkeys(names))


def _names(report_to: str | Iterable[str] | None) -> list[str]:
    given = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [name.strip().lower() for part in given for name in part.split(",") if name.strip()]


def is_automatic(report_to: str | Iterable[str] | None) -> bool:
    """Return whether `--report_to` leaves the choice to the program."""
    return _names(report_to) == [AUTO]


def automatic_trackers() -> list[str]:
    """Return the trackers that a run uses unless the user names some: W&B where the user has set it up."""
    if not is_installed("wandb"):
        return []
    try:
        return ["wandb"] if wandb_is_set_up() else []
    except Exception:  # settings that W&B refuses; `start_trackers` names the cause
        return ["wandb"]


def explain_automatic(trackers: Sequence[str], folder: Path) -> str:
    """Return a line that says what `--report_to auto` chose, and what would change it."""
    if trackers:
        return f"--report_to auto: {', '.join(trackers)} records the run, as it is set up here; none turns it off"
    missing = "W&B has no login, no key and no WANDB_MODE here" if is_installed("wandb") else "wandb is not installed"
    return (
        f"--report_to auto: {missing}, so metrics, curves and samples are recorded in {folder} only; for a dashboard, "
        "run 'wandb login', or add --report_to tensorboard or trackio"
    )


def wandb_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the group, tags and entity of the settings of a run, as far as they are set, by their names in W&B."""
    named = {name: settings.get(f"wandb_{name}") for name in ("group", "tags", "entity")}
    return {name: value for name, value in named.items() if value}


def start_trackers(
    names: Sequence[str],
    *,
    project: str,
    run_name: str,
    run_dir: Path,
    config: Mapping[str, Any],
    wandb: Mapping[str, Any] | None = None,
    previous_id: str | None = None,
    first_step: int = 0,
    notify: Notify = tqdm.write,
) -> Trackers:
    """Start the trackers called `names` on the main process; on all other processes the result does nothing.

    Args:
        names: names as returned by `parse_report_to`.
        project: name of the project in W&B and Trackio.
        run_name: name of this run in the trackers.
        run_dir: the run folder; the files of W&B and TensorBoard are written to `wandb/` and `tensorboard/` in it.
        config: the resolved config; it may contain lists, nested dicts, None and paths. Access tokens in it
            and in `run_name` are masked.
        wandb: where W&B shows the run (see `wandb_options`).
        previous_id: `Trackers.run_id` of the run that is resumed; None starts a new run.
        first_step: the first step that will be logged; TensorBoard hides what an earlier session wrote from there on.
        notify: function that shows a line to the user (by default `tqdm.write`, which keeps progress bars intact).
    """
    from accelerate.state import PartialState

    trackers = Trackers(run_id=previous_id, notify=notify)
    run_name, config = without_private(run_name), without_private(plain(config))
    if not PartialState().is_main_process:
        return trackers
    run_id = previous_id or uuid.uuid4().hex[:8]
    starts: dict[str, Callable[[], Backend]] = {
        "wandb": lambda: WandB(project, run_name, run_dir, config, run_id, notify, without_private(dict(wandb or {}))),
        "tensorboard": lambda: TensorBoard(run_dir, config, first_step),
        "trackio": lambda: Trackio(project, run_name, config, run_id, previous_id is not None, notify),
    }
    for name in names:
        try:
            backend = starts[name]()
        except Exception as error:  # whatever error a tracker raises, training continues without it
            notify(f"warning: {name} could not be started and will not record this session: {cause(error)}")
        else:
            trackers.add(backend)
    trackers.run_id = trackers.run_id or run_id
    return trackers


class Trackers:
    """The trackers of one run. Its methods never raise and do not wait: each tracker is called by a thread of its own.

    When a tracker fails, the user sees one warning. `run_id` should be saved in the checkpoint: passed as `previous_id`
    on resume, it continues the same W&B run.
    """

    def __init__(self, run_id: str | None = None, notify: Notify = tqdm.write):
        self.run_id = run_id
        self._notify = notify
        self._recorders: list[Recorder] = []

    @property
    def names(self) -> list[str]:
        """The names of the trackers that are still in use."""
        return [recorder.name for recorder in self._recorders if recorder.in_use]

    def add(self, backend: Backend) -> None:
        self._recorders.append(Recorder(backend, self._notify))
        self.run_id = backend.run_id or self.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log scalar `metrics` at optimizer step `step`, with their group in front of their names.

        Values that are not numbers (None, text) are left out.
        """
        scalars = grouped(numbers(metrics))
        if scalars:
            self._each(lambda backend: backend.log(scalars, step))

    def log_images(
        self, images: Sequence[Image.Image], captions: Sequence[str], step: int, name: str = "samples/previews"
    ) -> None:
        """Log `images` (PIL, any mode) with one caption each at optimizer step `step`."""
        if images:
            self._each(lambda backend: backend.log_images(images, captions, step, name))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log final values, which are shown for the run as a whole rather than at a step."""
        plain_values = {key: plain(value) for key, value in values.items()}
        self._each(lambda backend: backend.summary(plain_values))

    def finish(self, seconds: float = FINISH_SECONDS, stop_requested: Callable[[], Any] = lambda: None) -> None:
        """Write what is pending and close the trackers; afterwards every method does nothing.

        Args:
            seconds: a tracker that takes longer is left behind, with a warning.
            stop_requested: whether the process was asked to stop, which ends the waiting.
        """
        deadline = time.monotonic() + seconds
        for recorder in self._recorders:
            recorder.finish()
        for recorder in self._recorders:
            while not recorder.ended.wait(0.05):
                if time.monotonic() > deadline or stop_requested():
                    recorder.leave_behind()
                    break
        self._recorders = []

    def _each(self, action: Callable[[Backend], None]) -> None:
        for recorder in self._recorders:
            recorder.record(action)


def is_installed(name: str) -> bool:
    """Return whether the package of a tracker is installed."""
    spec = importlib.util.find_spec(name)
    # The spec of a mere folder called `wandb`, which is not the package, has no origin.
    return spec is not None and spec.origin is not None

"""Trackers: dashboards that record the metrics, previews, config and final summary of a run, beside its own folder.

The tracker classes are those of Accelerate (`accelerate.tracking`). This module adds what long runs need: trackers
never ask a question, never need a network, never end a run, and continue their record when the run is resumed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import netrc
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from tqdm import tqdm

from pipelines.tools.cli import UserError, cause, nearest
from pipelines.tools.credentials import mask_credentials
from training.core.options import Options, option

if TYPE_CHECKING:
    from PIL import Image

KNOWN_TRACKERS = ("wandb", "tensorboard", "trackio")
# The horizontal axis of all charts. W&B's internal step would not do: it drops values that are logged for an earlier
# step than the last one, as a resumed run does when it repeats a few steps.
STEP_METRIC = "step"
# After this number of failures in a row, a tracker is no longer used: each failed call may take a network timeout.
FAILURES_BEFORE_GIVING_UP = 3

Notify = Callable[[str], None]


@dataclass
class TrackerConfig(Options):
    """The trackers that record metrics and preview images, beside the run folder."""

    report_to: str | list[str] = option("wandb", on_resume="free")
    """Trackers: wandb, trackio, tensorboard, several of them (comma-separated), all (that are installed) or none"""
    tracker_project_name: str = option("halftone", on_resume="free")
    """Name of the project in the trackers"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        parse_report_to(self.report_to)


def parse_report_to(report_to: str | Iterable[str] | None) -> list[str]:
    """Parse `"wandb,tensorboard"`, `["wandb"]`, `"none"` or `"all"` (every installed tracker) into a list of names.

    Raises:
        UserError: if a name is unknown (the message suggests the nearest), or if a tracker is not installed.
    """
    given = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name.strip().lower() for part in given for name in part.split(",") if name.strip()]
    if not names or names == ["none"]:
        return []
    if names == ["all"]:
        return [name for name in KNOWN_TRACKERS if _is_installed(name)]
    for name in names:
        if name in ("none", "all"):
            raise UserError(
                f"--report_to {','.join(names)}: '{name}' cannot be combined with other names; give it alone, or "
                "leave it out"
            )
        if name not in KNOWN_TRACKERS:
            known = ", ".join(KNOWN_TRACKERS)
            raise UserError(
                f"--report_to {name}: unknown tracker{nearest(name, KNOWN_TRACKERS)}; choose from {known}, all, none"
            )
        if not _is_installed(name):
            raise UserError(f"--report_to {name}: its package is not installed; pip install {name}, or leave it out")
    return list(dict.fromkeys(names))


def start_trackers(
    names: Sequence[str],
    *,
    project: str,
    run_name: str,
    run_dir: Path,
    config: Mapping[str, Any],
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
        previous_id: `Trackers.run_id` of the run that is resumed; None starts a new run.
        first_step: the first step that will be logged; TensorBoard hides what an earlier session wrote from there on.
        notify: function that shows a line to the user (by default `tqdm.write`, which keeps progress bars intact).
    """
    from accelerate.state import PartialState

    trackers = Trackers(run_id=previous_id, notify=notify)
    run_name, config = mask_credentials(run_name), mask_credentials(plain(config))
    if not PartialState().is_main_process:
        return trackers
    starts: dict[str, Callable[[], _Backend]] = {
        "wandb": lambda: _WandB(project, run_name, run_dir, config, previous_id, notify),
        "tensorboard": lambda: _TensorBoard(run_dir, config, first_step),
        "trackio": lambda: _Trackio(project, run_name, config, resumed=previous_id is not None),
    }
    for name in names:
        try:
            backend = starts[name]()
        except Exception as error:  # whatever error a tracker raises, training continues without it
            notify(f"warning: {name} could not be started and will not record this session: {cause(error)}")
        else:
            trackers.add(backend)
    trackers.run_id = trackers.run_id or run_name
    return trackers


class Trackers:
    """The trackers of one run. Its methods never raise: when a tracker fails, the user sees one warning.

    `run_id` should be saved in the checkpoint: passed as `previous_id` on resume, it continues the same W&B run.
    """

    def __init__(self, run_id: str | None = None, notify: Notify = tqdm.write):
        self.run_id = run_id
        self._notify = notify
        self._backends: list[_Backend] = []
        self._failures: dict[str, int] = {}  # number of failures in a row, by tracker
        self._warned: set[str] = set()

    @property
    def names(self) -> list[str]:
        """The names of the trackers that are still in use."""
        return [backend.name for backend in self._backends]

    def add(self, backend: _Backend) -> None:
        self._backends.append(backend)
        self.run_id = backend.run_id or self.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log scalar `metrics` at optimizer step `step`; values that are not numbers (None, text) are left out."""
        numbers = _numbers(metrics)
        if numbers:
            self._each(lambda backend: backend.log(numbers, step))

    def log_images(
        self, images: Sequence[Image.Image], captions: Sequence[str], step: int, name: str = "samples"
    ) -> None:
        """Log `images` (PIL, any mode) with one caption each at optimizer step `step`."""
        if images:
            self._each(lambda backend: backend.log_images(images, captions, step, name))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Log final values, which are shown for the run as a whole rather than at a step."""
        self._each(lambda backend: backend.summary({key: plain(value) for key, value in values.items()}))

    def finish(self) -> None:
        """Write what is pending and close the trackers; afterwards every method does nothing."""
        self._each(lambda backend: backend.finish())
        self._backends = []

    def _each(self, action: Callable[[_Backend], None]) -> None:
        for backend in list(self._backends):
            try:
                action(backend)
            except Exception as error:  # a failing tracker must not end the run
                self._failed(backend, error)
            else:
                self._failures[backend.name] = 0

    def _failed(self, backend: _Backend, error: Exception) -> None:
        self._failures[backend.name] = self._failures.get(backend.name, 0) + 1
        if backend.name not in self._warned:
            self._warned.add(backend.name)
            self._notify(f"warning: {backend.name} failed, training continues without it: {cause(error)}")
        if self._failures[backend.name] >= FAILURES_BEFORE_GIVING_UP:
            self._backends.remove(backend)


class _Backend:
    """One tracker. Its methods may raise; `Trackers` handles the errors."""

    name: str
    run_id: str | None = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def log_images(self, images: Sequence[Image.Image], captions: Sequence[str], step: int, name: str) -> None:
        raise NotImplementedError

    def summary(self, values: dict[str, Any]) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError


class _WandB(_Backend):
    name = "wandb"

    def __init__(
        self, project: str, run_name: str, run_dir: Path, config: Mapping[str, Any], run_id: str | None, notify: Notify
    ):
        import wandb
        from accelerate.tracking import WandBTracker

        self._wandb = wandb
        self._notify = notify
        mode = _wandb_mode(wandb)
        run_dir.mkdir(parents=True, exist_ok=True)
        init: dict[str, Any] = {
            "name": run_name,
            "id": re.sub(r"[/\\#?%:]", "-", run_id) if run_id else None,  # characters that W&B refuses in an id
            "resume": "allow" if mode == "online" else None,  # offline, W&B only warns that it has no effect
            "dir": str(run_dir),
            "config": plain(config),
        }
        quiet = {"silent": True}  # suppresses W&B's banner of ten lines
        # By default, W&B waits 90 s for a network that does not answer.
        patience = {"init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT", 30))} if mode == "online" else {}
        reason = "no W&B key and no login were found" if mode == "offline" and "WANDB_MODE" not in os.environ else ""
        try:
            settings = wandb.Settings(**quiet, **patience)
            self._tracker = WandBTracker(project, mode=mode, settings=settings, **init)
            self._tracker.start()
        except Exception as error:
            if mode != "online":
                raise
            reason = f"W&B could not be reached ({cause(error)})"
            offline = {**init, "mode": "offline", "resume": None}
            self._tracker = WandBTracker(project, settings=wandb.Settings(**quiet), **offline)
            self._tracker.start()
        self._run = self._tracker.run
        self.run_id = self._run.id
        self._run.define_metric(STEP_METRIC, hidden=True)
        self._run.define_metric("*", step_metric=STEP_METRIC)
        self._announce(reason)

    def _announce(self, reason: str) -> None:
        if self._run.settings.mode == "offline":
            # Each resumed session adds a folder with the same id; `wandb sync` joins them in order of time.
            folders = Path(self._run.dir).parent.parent / f"offline-run-*-{self.run_id}"
            note = f"{reason}: recording offline" if reason else "W&B records offline"
            self._notify(f"{note}; to upload the run later: wandb sync {_short(folders)}")
        elif self._run.url:
            self._notify(f"W&B: {self._run.url}")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._tracker.log({**metrics, STEP_METRIC: step})

    def log_images(self, images: Sequence[Image.Image], captions: Sequence[str], step: int, name: str) -> None:
        logged = [self._wandb.Image(image, caption=text) for image, text in _with_captions(images, captions)]
        self._tracker.log({name: logged, STEP_METRIC: step})

    def summary(self, values: dict[str, Any]) -> None:
        self._run.summary.update(values)

    def finish(self) -> None:
        self._tracker.finish()


class _TensorBoard(_Backend):
    name = "tensorboard"

    def __init__(self, run_dir: Path, config: Mapping[str, Any], first_step: int):
        from accelerate.tracking import TensorBoardTracker

        purge = {"purge_step": first_step} if first_step else {}
        self._tracker = TensorBoardTracker("tensorboard", run_dir, **purge)
        self._tracker.start()
        # `store_init_configuration` is not used: it opens a second run at every start, and rejects lists and None.
        self._config = flatten_config(config)
        text = "".join(
            f"    {key}: {value}\n" for key, value in self._config.items()
        )  # indented: a Markdown code block
        self._tracker.writer.add_text("config", text, global_step=first_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._tracker.log(metrics, step=step)

    def log_images(self, images: Sequence[Image.Image], captions: Sequence[str], step: int, name: str) -> None:
        import numpy as np

        # One image of the whole grid, with the captions drawn into it: TensorBoard shows no captions.
        grid = np.asarray(_grid(images, captions))
        self._tracker.writer.add_image(name, grid, global_step=step, dataformats="HWC")
        self._tracker.writer.flush()

    def summary(self, values: dict[str, Any]) -> None:
        metrics = {f"summary/{key}": value for key, value in _numbers(values).items()}
        self._tracker.writer.add_hparams(self._config, metrics, run_name=".")
        texts = {key: value for key, value in values.items() if isinstance(value, str)}
        for key, value in texts.items():
            self._tracker.writer.add_text(f"summary/{key}", value)

    def finish(self) -> None:
        self._tracker.finish()


class _Trackio(_Backend):
    name = "trackio"

    def __init__(self, project: str, run_name: str, config: Mapping[str, Any], resumed: bool):
        import trackio
        from accelerate.tracking import TrackioTracker

        self._trackio = trackio
        resume = "allow" if resumed else "never"
        self._tracker = TrackioTracker(
            project, name=run_name, config=flatten_config(config), resume=resume, embed=False
        )
        self._tracker.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._tracker.log(metrics, step=step)

    def log_images(self, images: Sequence[Image.Image], captions: Sequence[str], step: int, name: str) -> None:
        # One image of the whole grid: Trackio accepts one image per name and step.
        self._tracker.log({name: self._trackio.Image(_grid(images, captions), caption=name)}, step=step)

    def summary(self, values: dict[str, Any]) -> None:
        self._tracker.log({f"summary/{key}": value for key, value in values.items()})

    def finish(self) -> None:
        self._tracker.finish()


def plain(value: Any) -> Any:
    """Convert `value` to JSON types: dataclasses and mappings to dicts, sequences to lists, other objects to text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if _is_scalar_array(value):
        return plain(value.item())
    return str(value)


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Flatten `config` to one level of `outer.inner` keys with scalar values: lists as JSON text, None as "none"."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in cast(dict[str, Any], plain(config)).items():
        if isinstance(value, dict):
            flat.update(flatten_config(value, f"{prefix}{key}."))
        elif value is None:
            flat[prefix + key] = "none"
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _wandb_mode(wandb: Any) -> str:
    """Return the mode that the user chose (WANDB_MODE, `wandb offline`); by default online with a key, else offline."""
    settings = wandb.setup().settings
    chosen = os.environ.get("WANDB_MODE") or settings.mode
    if chosen and chosen != "online":
        return str(chosen)
    has_key = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or settings.api_key
    if has_key or _in_netrc(urlsplit(settings.base_url).netloc):
        return "online"
    return "offline"


def _in_netrc(host: str) -> bool:
    """Return whether `wandb login` has stored a key for `host` in the netrc file (NETRC, ~/.netrc or ~/_netrc)."""
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    hosts = {host, "api.wandb.ai"} if host.endswith("wandb.ai") else {host}
    for place in places:
        try:
            accounts = netrc.netrc(os.path.expanduser(place)).hosts
        except (OSError, netrc.NetrcParseError):
            continue  # the file is absent or unreadable: no login
        if hosts & set(accounts):
            return True
    return False


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    # The spec of a mere folder called `wandb`, which is not the package, has no origin.
    return spec is not None and spec.origin is not None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric entries of `values`, including 0-d tensors and NumPy scalars, as Python floats."""
    numbers = {}
    for key, value in values.items():
        if isinstance(value, (bool, int, float)) or _is_scalar_array(value):
            numbers[key] = float(value)
    return numbers


def _is_scalar_array(value: Any) -> bool:
    """Return whether `value` is a NumPy scalar or a 0-d tensor, without importing either library."""
    return hasattr(value, "item") and getattr(value, "ndim", None) == 0


def _with_captions(images: Sequence[Image.Image], captions: Sequence[str]) -> list[tuple[Image.Image, str | None]]:
    texts = list(captions) + [None] * (len(images) - len(captions))
    return list(zip(images, texts))


def _grid(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    from pipelines.tools.grids import image_grid

    return image_grid(images, captions)


def _short(path: Path) -> str:
    """Return `path` relative to the working folder if that is shorter, else as it is."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)

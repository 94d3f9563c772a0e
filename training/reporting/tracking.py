"""Trackers: where metrics, sample pictures, the config and the final summary of a run go besides its own folder.

The tracker classes are Accelerate's (`accelerate.tracking`); what is added here is what a long run needs of them: they
never ask a question, never need a network, never end a run, and go on where they were when the run is resumed.
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
from training.core.options import Options, option

if TYPE_CHECKING:
    from PIL import Image

KNOWN_TRACKERS = ("wandb", "tensorboard", "trackio")
# Our own horizontal axis. W&B's internal step only ever grows and drops what lies behind it, which a resumed run
# that repeats a few steps would run into.
STEP_METRIC = "step"
# A tracker that fails this often in a row is left alone: each failed call may cost its whole network timeout.
FAILURES_BEFORE_GIVING_UP = 3

Notify = Callable[[str], None]


@dataclass
class TrackerConfig(Options):
    """Where metrics and preview images go beside the run folder."""

    report_to: str | list[str] = option("wandb", on_resume="free")
    """wandb, trackio, tensorboard, several (comma-separated), or none."""
    tracker_project_name: str = option("halftone", on_resume="free")
    """The project on the dashboard."""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        parse_report_to(self.report_to)


def parse_report_to(report_to: str | Iterable[str] | None) -> list[str]:
    """`"wandb,tensorboard"`, `["wandb"]`, `"none"` or `"all"` (every tracker that is installed) as a list of names.

    Raises:
        UserError: a name that is no tracker (with the nearest that is), or a tracker whose package is not installed.
    """
    given = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name.strip().lower() for part in given for name in part.split(",") if name.strip()]
    if not names or names == ["none"]:
        return []
    if names == ["all"]:
        return [name for name in KNOWN_TRACKERS if _is_installed(name)]
    for name in names:
        if name in ("none", "all"):
            raise UserError(f"--report_to {','.join(names)}: '{name}' stands alone; leave it out or give nothing else")
        if name not in KNOWN_TRACKERS:
            known = ", ".join(KNOWN_TRACKERS)
            raise UserError(
                f"--report_to {name}: no such tracker{nearest(name, KNOWN_TRACKERS)} (known: {known}, none)"
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
        names: from `parse_report_to`.
        project: W&B's and Trackio's project.
        run_name: what this run is called in them.
        run_dir: the run's folder; W&B's and TensorBoard's files go into `wandb/` and `tensorboard/` in it.
        config: the resolved config; lists, nested dicts, None and paths are welcome.
        previous_id: `Trackers.run_id` of the run that is resumed; None starts a new one.
        first_step: the step the run stands at; TensorBoard hides what an interrupted run wrote at or after it.
        notify: takes the lines for the user (by default `tqdm.write`, which leaves progress bars whole).
    """
    from accelerate.state import PartialState

    trackers = Trackers(run_id=previous_id, notify=notify)
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
        except Exception as error:  # whatever a service's client does, training goes on without it
            notify(f"warning: {name} could not be started and gets nothing from this run: {cause(error)}")
        else:
            trackers.add(backend)
    trackers.run_id = trackers.run_id or run_name
    return trackers


class Trackers:
    """The trackers of one run. None of its methods raises: a tracker that fails costs one warning.

    `run_id` belongs into the checkpoint: given back as `previous_id` it continues the same W&B run.
    """

    def __init__(self, run_id: str | None = None, notify: Notify = tqdm.write):
        self.run_id = run_id
        self._notify = notify
        self._backends: list[_Backend] = []
        self._failures: dict[str, int] = {}  # in a row, by tracker
        self._warned: set[str] = set()

    @property
    def names(self) -> list[str]:
        """The trackers that are still being written to."""
        return [backend.name for backend in self._backends]

    def add(self, backend: _Backend) -> None:
        self._backends.append(backend)
        self.run_id = backend.run_id or self.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalar `metrics` at optimizer step `step`; what is no number (None, text) is left out."""
        numbers = _numbers(metrics)
        if numbers:
            self._each(lambda backend: backend.log(numbers, step))

    def log_images(
        self, images: Sequence[Image.Image], captions: Sequence[str], step: int, name: str = "samples"
    ) -> None:
        """Write `images` with one caption each (PIL, any mode) at optimizer step `step`."""
        if images:
            self._each(lambda backend: backend.log_images(images, captions, step, name))

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's last word: figures shown for the run as a whole rather than at a step."""
        self._each(lambda backend: backend.summary({key: plain(value) for key, value in values.items()}))

    def finish(self) -> None:
        """Write what is still pending and close; afterwards every method does nothing."""
        self._each(lambda backend: backend.finish())
        self._backends = []

    def _each(self, action: Callable[[_Backend], None]) -> None:
        for backend in list(self._backends):
            try:
                action(backend)
            except Exception as error:  # a tracker is a convenience: it must not cost a run
                self._failed(backend, error)
            else:
                self._failures[backend.name] = 0

    def _failed(self, backend: _Backend, error: Exception) -> None:
        self._failures[backend.name] = self._failures.get(backend.name, 0) + 1
        if backend.name not in self._warned:
            self._warned.add(backend.name)
            self._notify(f"warning: {backend.name} failed, training goes on without it: {cause(error)}")
        if self._failures[backend.name] >= FAILURES_BEFORE_GIVING_UP:
            self._backends.remove(backend)


class _Backend:
    """One tracker. Methods may raise; `Trackers` deals with that."""

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
            "resume": "allow" if mode == "online" else None,  # offline it only warns that it means nothing
            "dir": str(run_dir),
            "config": plain(config),
        }
        quiet = {"silent": True}  # W&B's own banner is ten lines a run
        # By default a dead network costs 90 s here.
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
            # Each resumption is one more folder of the same id; `wandb sync` joins them in order of their time.
            folders = Path(self._run.dir).parent.parent / f"offline-run-*-{self.run_id}"
            note = f"{reason}: recording offline" if reason else "W&B records offline"
            self._notify(f"{note}; to upload the run later: wandb sync {_short(folders)}")
        elif self._run.url:
            self._notify(f"W&B: {self._run.url}")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._tracker.log({**metrics, STEP_METRIC: step})

    def log_images(self, images: Sequence[Image.Image], captions: Sequence[str], step: int, name: str) -> None:
        pictures = [self._wandb.Image(image, caption=text) for image, text in _with_captions(images, captions)]
        self._tracker.log({name: pictures, STEP_METRIC: step})

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
        # Not store_init_configuration: it opens a second run on every start and refuses lists and None.
        self._config = flatten_config(config)
        text = "".join(
            f"    {key}: {value}\n" for key, value in self._config.items()
        )  # indented: a Markdown code block
        self._tracker.writer.add_text("config", text, global_step=first_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._tracker.log(metrics, step=step)

    def log_images(self, images: Sequence[Image.Image], captions: Sequence[str], step: int, name: str) -> None:
        import numpy as np

        # One picture of the whole grid: TensorBoard shows no captions of its own.
        grid = np.asarray(_grid(images, captions))
        self._tracker.writer.add_image(name, grid, global_step=step, dataformats="HWC")
        self._tracker.writer.flush()

    def summary(self, values: dict[str, Any]) -> None:
        figures = {f"summary/{key}": value for key, value in _numbers(values).items()}
        self._tracker.writer.add_hparams(self._config, figures, run_name=".")
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
        # One picture of the whole grid: Trackio takes one picture per name and step.
        self._tracker.log({name: self._trackio.Image(_grid(images, captions), caption=name)}, step=step)

    def summary(self, values: dict[str, Any]) -> None:
        self._tracker.log({f"summary/{key}": value for key, value in values.items()})

    def finish(self) -> None:
        self._tracker.finish()


def plain(value: Any) -> Any:
    """`value` in JSON's own types: dataclasses and mappings as dicts, sequences as lists, the rest as text."""
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
    """`config` as one level of `outer.inner` keys with scalar values; lists become JSON text, None becomes "none"."""
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
    """The mode the user asked for (WANDB_MODE, `wandb offline`), else online with a key and offline without."""
    settings = wandb.setup().settings
    asked = os.environ.get("WANDB_MODE") or settings.mode
    if asked and asked != "online":
        return str(asked)
    has_key = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or settings.api_key
    if has_key or _in_netrc(urlsplit(settings.base_url).netloc):
        return "online"
    return "offline"


def _in_netrc(host: str) -> bool:
    """Whether ~/.netrc (NETRC, or ~/_netrc) holds credentials for `host`: where `wandb login` puts the key."""
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    hosts = {host, "api.wandb.ai"} if host.endswith("wandb.ai") else {host}
    for place in places:
        try:
            accounts = netrc.netrc(os.path.expanduser(place)).hosts
        except (OSError, netrc.NetrcParseError):
            continue  # absent or unreadable: no login
        if hosts & set(accounts):
            return True
    return False


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a mere folder called `wandb` has a spec, but no origin


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numeric entries of `values` (0-d tensors and NumPy scalars too) as Python floats."""
    numbers = {}
    for key, value in values.items():
        if isinstance(value, (bool, int, float)) or _is_scalar_array(value):
            numbers[key] = float(value)
    return numbers


def _is_scalar_array(value: Any) -> bool:
    """A NumPy scalar or a 0-d tensor, told without importing either library."""
    return hasattr(value, "item") and getattr(value, "ndim", None) == 0


def _with_captions(images: Sequence[Image.Image], captions: Sequence[str]) -> list[tuple[Image.Image, str | None]]:
    texts = list(captions) + [None] * (len(images) - len(captions))
    return list(zip(images, texts))


def _grid(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    from pipelines.tools.grids import image_grid

    return image_grid(images, captions)


def _short(path: Path) -> str:
    """`path` relative to the working folder where that is shorter to type."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)

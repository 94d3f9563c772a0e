"""The trackers themselves, on top of the tracker classes of Accelerate (`accelerate.tracking`)."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import netrc
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from pipelines.tools.cli import cause
from pipelines.tools.private import without_private

if TYPE_CHECKING:
    from PIL import Image

Notify = Callable[[str], None]

# The horizontal axis of all charts. W&B's internal step would not do: it drops values that are logged for an earlier
# step than the last one, as a resumed run does when it repeats a few steps.
STEP_METRIC = "step"
PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
HUB_SECONDS = 10.0


class Backend:
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


class WandB(Backend):
    name = "wandb"

    def __init__(
        self,
        project: str,
        run_name: str,
        run_dir: Path,
        config: Mapping[str, Any],
        run_id: str,
        notify: Notify,
        shown: Mapping[str, Any],
    ):
        """Start a run.

        Args:
            shown: where W&B shows the run: its `group`, `tags` and `entity`, as far as they are set.
        """
        import wandb
        from accelerate.tracking import WandBTracker

        self._wandb = wandb
        self._notify = notify
        mode = wandb_mode(wandb)
        run_dir.mkdir(parents=True, exist_ok=True)
        init: dict[str, Any] = {
            "name": run_name,
            "id": re.sub(r"[/\\#?%:]", "-", run_id),  # characters that W&B refuses in an id
            "resume": "allow" if mode == "online" else None,  # offline, W&B only warns that it has no effect
            "dir": str(run_dir),
            "config": plain(config),
            **shown,
        }
        quiet = {"silent": True, **_private_settings()}  # silent: without its banner of ten lines
        logging.getLogger("wandb").addFilter(_without_private_in_log)
        # By default, W&B waits 90 s for a network that does not answer.
        patience = {"init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT", 30))} if mode == "online" else {}
        reason = "no W&B key and no login were found" if mode == "offline" and "WANDB_MODE" not in os.environ else ""
        try:
            settings = wandb.Settings(**quiet, **patience)
            with _masked_arguments():
                self._tracker = WandBTracker(project, mode=mode, settings=settings, **init)
                self._tracker.start()
        except Exception as error:
            if mode != "online":
                raise
            reason = f"W&B could not be reached ({cause(error)})"
            wandb.teardown()  # its service still reserves the id of the run
            offline = {**init, "mode": "offline", "resume": None}
            with _masked_arguments():
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


class TensorBoard(Backend):
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
        metrics = {f"summary/{key}": value for key, value in numbers(flatten_config(values)).items()}
        self._tracker.writer.add_hparams(self._config, metrics, run_name=".")
        texts = {key: value for key, value in values.items() if isinstance(value, str)}
        for key, value in texts.items():
            self._tracker.writer.add_text(f"summary/{key}", value)

    def finish(self) -> None:
        self._tracker.finish()


class Trackio(Backend):
    name = "trackio"

    def __init__(
        self, project: str, run_name: str, config: Mapping[str, Any], run_id: str, resumed: bool, notify: Notify
    ):
        import trackio
        from accelerate.tracking import TrackioTracker

        self._trackio = trackio
        existing: list[str] = []
        with suppress(ValueError):  # the project does not exist yet
            existing = [run.name for run in trackio.Api().runs(project)]
        name = _trackio_name(existing, run_name, run_id, resumed)
        resume = "allow" if resumed else "never"
        with _impatient_hub(), redirect_stdout(io.StringIO()):  # suppresses its banner of six lines
            self._tracker = TrackioTracker(
                project, name=name, config=flatten_config(config), resume=resume, embed=False
            )
            self._tracker.start()
        notify(f"Trackio records this run as '{name}'; to see it: trackio show --project {shlex.quote(project)}")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._tracker.log(metrics, step=step)

    def log_images(self, images: Sequence[Image.Image], captions: Sequence[str], step: int, name: str) -> None:
        # One image of the whole grid, with the captions drawn into it: Trackio shows one image per name and step.
        self._tracker.log({name: self._trackio.Image(_grid(images, captions), caption=f"step {step}")}, step=step)

    def summary(self, values: dict[str, Any]) -> None:
        self._tracker.log({f"summary/{key}": value for key, value in numbers(flatten_config(values)).items()})

    def finish(self) -> None:
        self._tracker.finish()


@contextmanager
def _impatient_hub() -> Iterator[None]:
    """Let requests to the Hub fail early inside the block. Trackio asks it who owns the token, and waits for ever."""
    from huggingface_hub import get_session

    session = get_session()
    before, session.timeout = session.timeout, HUB_SECONDS
    try:
        yield
    finally:
        session.timeout = before


def _trackio_name(existing: Collection[str], run_name: str, run_id: str, resumed: bool) -> str:
    """Return the name of a run in Trackio, which identifies runs by their names.

    It is `run_name`, unless a run in another folder of the same name had it first.
    """
    with_id = f"{run_name}-{run_id}"
    if resumed:
        return with_id if with_id in existing else run_name
    return with_id if run_name in existing else run_name


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


def _private_settings() -> dict[str, Any]:
    """Return the settings with which W&B does not record paths of this machine and what the terminal shows.

    Its metadata name the run folder, the script and the Python program, whose paths are not among our own texts; the
    terminal also shows messages of other libraries. run.log has our messages, and the summary the hardware.
    """
    return {"x_disable_meta": True, **({} if "WANDB_CONSOLE" in os.environ else {"console": "off"})}


def _without_private_in_log(record: logging.LogRecord) -> bool:
    """Change a message in the log of W&B, which is in the run folder; a filter for `logging`."""
    record.msg, record.args = without_private(record.getMessage()), None
    return True


@contextmanager
def _masked_arguments() -> Iterator[None]:
    """Mask access tokens in `sys.argv` inside the block, because W&B records the command line."""
    words = sys.argv
    sys.argv = without_private(words)
    try:
        yield
    finally:
        sys.argv = words


def wandb_mode(wandb: Any) -> str:
    """Return the mode that the user chose (WANDB_MODE, `wandb offline`); by default online with a key, else offline."""
    settings = wandb.setup().settings
    chosen = os.environ.get("WANDB_MODE") or settings.mode
    if chosen and chosen != "online":
        return str(chosen)
    return "online" if _has_login(settings) else "offline"


def wandb_is_set_up() -> bool:
    """Return whether the user has set up W&B on this machine: a login, a key, or a mode other than disabled."""
    import wandb

    settings = wandb.setup().settings
    chosen = os.environ.get("WANDB_MODE") or settings.mode
    is_named = bool(os.environ.get("WANDB_MODE")) or chosen not in (None, "online")
    found = chosen != "disabled" and (is_named or _has_login(settings))
    if not found and wandb.run is None:
        wandb.teardown()  # reading the settings has started its service, a process that nobody needs here
    return found


def _has_login(settings: Any) -> bool:
    has_key = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or settings.api_key
    return bool(has_key) or _in_netrc(urlsplit(settings.base_url).netloc)


def _in_netrc(host: str) -> bool:
    """Return whether `wandb login` has stored a key for `host` in the netrc file (NETRC, ~/.netrc or ~/_netrc)."""
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    # The public server has had several names, and W&B accepts a login of each of them.
    hosts = {host, *PUBLIC_HOSTS} if host.endswith((".wandb.ai", ".coreweave.com")) else {host}
    for place in places:
        try:
            accounts = netrc.netrc(os.path.expanduser(place)).hosts
        except (OSError, netrc.NetrcParseError):
            continue  # the file is absent or unreadable: no login
        if hosts & set(accounts):
            return True
    return False


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
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

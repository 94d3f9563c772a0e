"""The folder of one run: paths, lock, saved config and log."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from pipelines.tools.cli import UserError, printable
from pipelines.tools.credentials import mask_credentials
from pipelines.tools.files import read_text
from training.core.files import write_atomically
from training.core.options import Options, option

try:
    import fcntl
except ImportError:  # Windows lacks these locks, so the check for a second process is skipped there
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("halftone")


@dataclass
class RunFolderConfig(Options):
    """Options for the folder and name of a run."""

    output_dir: str = option("", on_resume="free")
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    run_name: str = option("", on_resume="free")
    """Name of the run for experiment trackers and the model card; if unset, the name of the run folder"""
    overwrite: bool = option(False, on_resume="free")
    """Start again although the folder contains a run; the old run is renamed, not deleted"""


class RunFolder:
    """runs/<name>: config.yaml metrics.csv training_curves.png run.log samples/ checkpoints/ pipeline/."""

    def __init__(self, path: str | Path, name: str = ""):
        self.path = Path(path)
        self.name = name or self.path.name
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.csv"
        self.curves_file = self.path / "training_curves.png"
        self.log_file = self.path / "run.log"
        self.record_file = self.path / "record.json"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.pipeline = self.path / "pipeline"
        self._lock: IO[str] | None = None

    def create(self) -> None:
        """Create and lock the folder. Raises UserError if it cannot be written, or another process has the lock."""
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self._lock = open(self.path / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - held until `release`
        except OSError as error:
            raise UserError(
                f"the output folder {self.path} cannot be written ({error.strerror}); choose another with --output_dir"
            ) from None
        self._take(self._lock)

    def check_unused(self) -> None:
        """Raise UserError if another process has the folder's lock."""
        lock = self.path / ".lock"
        if lock.is_file():
            with lock.open(encoding="utf-8") as file:
                self._take(file)

    def _take(self, lock: IO[str]) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is training in {self.path}; wait for it, or choose another --output_dir"
            ) from None

    def release(self) -> None:
        """Release the folder's lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def has_checkpoint(self) -> bool:
        """Return whether this run folder has a checkpoint to resume from."""
        return any(self.checkpoints.glob("step-*"))

    def is_exported(self, step: int) -> bool:
        """Return whether the exported pipeline is that of `step`."""
        if not (self.pipeline / "model_index.json").is_file() or not self.record_file.is_file():
            return False
        return json.loads(self.record_file.read_text(encoding="utf-8")).get("steps") == step

    def set_aside(self) -> Path | None:
        """Rename the folder of an old run and return its new path; None if there is nothing in the folder."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target = self.path.with_name(f"{self.path.name}.old-{stamp}")
        number = 1
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.path.name}.old-{stamp}-{number}")
        try:
            self.path.rename(target)
        except OSError as error:
            raise UserError(f"{self.path} cannot be renamed to {target} ({error.strerror}); move it by hand") from None
        return target

    def saved_config(self) -> dict[str, Any] | None:
        """Return the config that the run was started with, without a token from old versions; None if not saved."""
        if not self.config_file.is_file():
            return None
        config = yaml.safe_load(read_text(self.config_file))
        if isinstance(config, dict):
            config.pop("hub_token", None)
        return config

    def save_config(self, config: dict[str, Any]) -> None:
        """Write config.yaml, with access tokens masked."""
        text = yaml.safe_dump(mask_credentials(config), sort_keys=False, allow_unicode=True)
        write_atomically(self.config_file, text)

    def save_record(self, record: dict[str, Any]) -> None:
        """Write record.json: the metrics and settings of the run, for the model card and for users."""
        text = json.dumps(record, indent=2, default=str)
        write_atomically(self.record_file, mask_credentials(text) + "\n")


def start_logging(log_file: Path | None) -> None:
    """Send log messages to the terminal and to `log_file`, with their time; without a file, only errors are shown.

    Access tokens are masked in both.
    """
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    terminal = _TerminalHandler()
    terminal.setLevel(logging.INFO if log_file else logging.ERROR)
    logger.addHandler(terminal)
    if log_file:
        to_file = logging.FileHandler(log_file, encoding="utf-8")
        to_file.setFormatter(_MaskingFormatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(to_file)


class _MaskingFormatter(logging.Formatter):
    """Masks access tokens, also those in the text of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_credentials(super().format(record))


class _TerminalHandler(logging.Handler):
    """Prints messages without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(printable(mask_credentials(prefix + record.getMessage())))
        sys.stdout.flush()  # so that messages reach a file or a pipe at once

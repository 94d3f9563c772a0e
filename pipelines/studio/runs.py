"""Read the folders of training runs: metrics, samples and state. Only files are read, so that a run may be training.

A run folder has metrics.csv, config.yaml, samples/ and, after its end, record.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image

from ..tools.cli import UserError
from ..tools.files import open_image_file

METRICS = "metrics.csv"
MOST_RUNS = 500
DEEPEST = 4
"""Folders below --runs that are searched."""
SKIPPED = {"checkpoints", "pipeline", "samples", "wandb", "images"}
SILENT_SECONDS = 120
"""A run that has written nothing for this time, and holds no lock, is not training."""
AFTER_EXPORT_SECONDS = 5
"""Metrics that are newer than the record of the export by more than this are from a resumed run."""
KINDS = ("epoch", "step")
"""First words in the names of sample sheets: epoch_0005.png, step_00001000.png"""
COUNTERS = ("step", "epoch", "images_seen", "elapsed_seconds")


class Place(NamedTuple):
    """When in its run a sample sheet was made. Epochs come before steps, which are written at the end of a run."""

    kind: int
    number: int

    def __str__(self) -> str:
        return f"{KINDS[self.kind]} {self.number:,}"


@dataclass
class Run:
    """One run folder."""

    name: str
    folder: Path

    def metrics(self) -> pd.DataFrame:
        """Return the rows of metrics.csv as numbers; what cannot be read as a number is missing.

        Raises:
            UserError: The folder or its metrics.csv has been deleted, or cannot be read.
        """
        try:
            table = pd.read_csv(
                self.folder / METRICS, dtype=str, on_bad_lines="skip", encoding="utf-8-sig", encoding_errors="replace",
                engine="python",
            )  # fmt: skip
        except pd.errors.EmptyDataError:
            return pd.DataFrame({"step": []})
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is damaged"
            raise UserError(
                f"the metrics of the run {self.name} cannot be read ({reason}); refresh the list"
            ) from error
        if "step" not in table:
            return pd.DataFrame({"step": []})
        return table.apply(pd.to_numeric, errors="coerce").dropna(subset=["step"]).reset_index(drop=True)

    def samples(self) -> dict[Place, Path]:
        """Return the sample sheets by their place, in the order in which they were written."""
        files = list((self.folder / "samples").glob("*.png")) if self.folder.is_dir() else []
        return dict(sorted((place, path) for path in files if (place := _place_of(path)) is not None))

    def is_locked(self) -> bool:
        """Whether a process holds the lock of the run folder. Only Linux tells without trying to take the lock."""
        if not sys.platform.startswith("linux"):
            return False
        with contextlib.suppress(OSError):
            inode = str((self.folder / ".lock").stat().st_ino)
            lines = Path("/proc/locks").read_text(encoding="ascii", errors="replace").splitlines()
            return any("FLOCK" in line and line.split()[5].rpartition(":")[2] == inode for line in lines)
        return False

    def state(self) -> str:
        """Return in a few lines of Markdown what the run is doing, and how far it is. Raises UserError."""
        table = self.metrics()
        last = table.iloc[-1] if len(table) else pd.Series(dtype=float)
        facts = [f"**{self.name}**: {self._activity()}"]
        facts += [f"{name.replace('_', ' ')}: {last[name]:,.10g}" for name in COUNTERS if pd.notna(last.get(name))]
        record = self._record()
        if best := record.get("best"):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                facts.append(f"best {best['metric']}: {float(best['value']):.4g} at step {best['step']}")
        return "\n- ".join(facts)

    def is_training(self) -> bool:
        """Whether the run is training: its lock is held, or it has written something a short time ago.

        The second rule is for systems that do not list locks, and for folders that another machine writes to.
        """
        if self.is_locked():
            return True
        # A run that goes on after its export keeps its record until it is exported again.
        unexported = self._time_of(METRICS) - self._time_of("record.json") > AFTER_EXPORT_SECONDS
        return unexported and time.time() - self._last_change() < SILENT_SECONDS

    def version(self) -> tuple[Any, ...]:
        """Return a value that is another one after each change of what the tab of runs shows."""
        names = (METRICS, "run.log", "record.json", *(f"samples/{path.name}" for path in self.samples().values()))
        return (self.name, self.is_locked(), *(self._time_of(name) for name in names))

    def _activity(self) -> str:
        seconds = time.time() - self._last_change()
        if self.is_locked():
            return f"is training now; metrics were written {_ago(seconds)}"
        if self.is_training():
            return f"was training {_ago(seconds)}"
        if (self.folder / "record.json").is_file():
            return "complete"
        return f"interrupted or not exported; last written {_ago(seconds)}"

    def _last_change(self) -> float:
        return max(self._time_of(name) for name in (METRICS, "run.log"))

    def _time_of(self, name: str) -> float:
        """Return when a file was written, in seconds; 0 if there is none."""
        with contextlib.suppress(OSError):
            return (self.folder / name).stat().st_mtime
        return 0.0

    def _record(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((self.folder / "record.json").read_text(encoding="utf-8"))
            return record if isinstance(record, dict) else {}
        return {}


def find_runs(folder: Path) -> list[Run]:
    """Return the runs below a folder by name, at most MOST_RUNS; the folder itself may be one.

    Raises:
        UserError: The folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"--runs {folder} is not a folder; give the folder that contains the run folders")
    found = []
    for path in _folders(folder, 0):
        if (path / METRICS).is_file():
            name = path.relative_to(folder).as_posix()
            found.append(Run(folder.resolve().name if name == "." else name, path))
        if len(found) == MOST_RUNS:
            break
    return found


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    if depth == DEEPEST:
        return
    with contextlib.suppress(OSError):  # it cannot be listed, or was deleted in the meantime
        inner = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        for path in map(Path, inner):
            if path.name not in SKIPPED and not path.name.startswith("."):
                yield from _folders(path, depth + 1)


def open_sample(path: Path) -> Image.Image:
    """Read a sample sheet. Raises UserError if it cannot be read, because it is being written for example."""
    try:
        with open_image_file(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"the sample {path.name} cannot be read; refresh the list") from error


def _place_of(path: Path) -> Place | None:
    """Return the place of a sample sheet in the run; None for other files."""
    kind, _, digits = path.stem.partition("_")
    if not digits.isdecimal() or kind not in KINDS:
        return None
    return Place(KINDS.index(kind), int(digits))


def _ago(seconds: float) -> str:
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {name} ago"
    return f"{max(0, seconds):.0f} seconds ago"

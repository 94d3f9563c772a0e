"""Compares the folder of an undisturbed command with that of one that was disturbed and typed again, bit for bit."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.tools.checkpoint_links import LINKS, linked_checkpoint
from training.run.metrics_log import TIMING_COLUMNS

# What a run measures about itself differs from session to session, and its log grows with each of them.
MEASURED = {"elapsed_seconds", "sessions", "tracker_id", "peak_memory_mib", "images_per_second", "energy", "card"}
LOGS = ("run.log", "sessions.md")
# What merely informs.
INFORMING = ("samples/", "training_curves.png", "run.log", "sessions.md", "speed.json")


def differences(folder: Path, reference: Path) -> list[str]:
    """Return a line for each file that is missing, left over, or different."""
    ours, theirs = entries(folder), entries(reference)
    # A session that was killed after the export has not written its summary, and the next one has nothing to do.
    lines = [f"{name} is missing" for name in sorted(theirs - ours) if name != "sessions.md"]
    lines += [f"{name} is left over" for name in sorted(ours - theirs)]
    return lines + [f"{name} is different" for name in sorted(ours & theirs) if not same(folder, reference, name)]


def entries(folder: Path) -> set[str]:
    """Return the files, links and empty folders below `folder`."""
    paths = [p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir() or not any(p.iterdir())]
    return {p.relative_to(folder).as_posix() for p in paths}


def same(folder: Path, reference: Path, name: str) -> bool:
    ours, theirs = folder / name, reference / name
    if ours.name in LINKS:  # where no link can be made, a file names the checkpoint
        one, other = (linked_checkpoint(path.parent, path.name) for path in (ours, theirs))
        return one is not None and other is not None and one.name == other.name
    if ours.is_symlink() or theirs.is_symlink():
        return ours.is_symlink() and theirs.is_symlink() and ours.readlink() == theirs.readlink()
    if ours.is_dir() or theirs.is_dir():
        return ours.is_dir() and theirs.is_dir()
    return ours.name in LOGS or contents(ours) == contents(theirs)


def contents(path: Path) -> Any:
    """Return what a file says, without what a run measures about itself."""
    data = path.read_bytes()
    try:
        if path.name in ("trainer_state.json", "record.json"):
            return {name: value for name, value in json.loads(data).items() if name not in MEASURED}
        if path.name == "hub.json":  # it has the address of the Hub and digests of measured times
            return [sorted(parts) for parts in json.loads(data)["repositories"].values()]
        if path.name == "manifest.json":
            files = json.loads(data)["files"]
            return {name: value for name, value in files.items() if name != "trainer_state.json"}
    except (ValueError, KeyError, AttributeError):
        return data
    if path.name == "README.md":  # a model card names the training time, and the energy that follows from it
        data = re.sub(rb": [\d.e+-]+ kWh", b": ENERGY", data)
        return re.sub(rb"\b\d+ (h|min|s)( \d+ (min|s))?(?= |$)", b"TIME", data, flags=re.MULTILINE)
    if path.name == "metrics.csv":
        rows = csv.DictReader(io.StringIO(data.decode(errors="replace"), newline=""))
        return [{name: value for name, value in row.items() if name not in TIMING_COLUMNS} for row in rows]
    return data


def excused(lines: Sequence[str], reference: Path) -> set[str]:
    """Return the differences that a run may have which reported a fault and ended with status 0.

    It may lack what merely informs, and a checkpoint other than `latest` that could not be written: `best` is then the
    best of the others.
    """
    absent = {line for line in lines if line.startswith("checkpoints/step-") and line.endswith(" is missing")}
    found = absent | {line for line in lines if line.startswith(INFORMING)}
    best = linked_checkpoint(reference / "checkpoints", "best")
    if best is not None and any(line.startswith(f"checkpoints/{best.name}/") for line in absent):
        found.add("checkpoints/best is different")
    return found

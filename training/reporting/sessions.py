"""The report of a run at the end of a session: its previews side by side over time, and a table of its epochs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tools.files import open_image_file
from pipelines.tools.grids import image_grid
from pipelines.tools.progress import clock
from training.run.metrics_log import read_metrics

if TYPE_CHECKING:
    from PIL.Image import Image

    from training.run.state import RunState

STRIP = "progress.png"
REPORT = "sessions.md"
MOST_GRIDS = 8  # in a strip; if there are more, some in the middle are left out
GRID_WIDTH = 480  # of a grid in the strip, in pixels
MORE_EPOCHS = 0.1  # of a complete run: the share that is suggested for training further, and at least two epochs
MOST_EPOCHS = 12  # in the table on the terminal; if there are more, some in the middle are left out


def grid_name(step: int, steps_per_epoch: int) -> str:
    """Return the file name of a preview grid: by epoch if `step` ends one, otherwise by step."""
    return f"epoch_{step // steps_per_epoch:04d}.png" if step % steps_per_epoch == 0 else f"step_{step:08d}.png"


def progress_strip(samples: Path, steps_per_epoch: int, last_step: int) -> Image | None:
    """Join the saved preview grids up to `last_step` from left to right.

    At most MOST_GRIDS are shown, including the first and the last. Grids after `last_step` are left over from a session
    that went further than the checkpoint which the run resumed from.

    Returns:
        The strip; None without grids.
    """
    grids: list[tuple[int, str, Path]] = []
    for path in samples.glob("*.png"):
        match = re.fullmatch(r"(epoch|step)_(\d+)", path.stem)
        if match:
            number = int(match[2])
            step = number * steps_per_epoch if match[1] == "epoch" else number
            grids.append((step, f"{match[1]} {number}", path))
    shown = _spread(sorted(grid for grid in grids if grid[0] <= last_step), MOST_GRIDS)
    if not shown:
        return None
    images = []
    for _, _, path in shown:
        with open_image_file(path) as image:
            images.append(_narrow(image.convert("RGB")))
    return image_grid(images, columns=len(images), column_titles=[title for _, title, _ in shown])


def session_report(
    metrics_file: Path,
    state: RunState,
    steps_per_epoch: int,
    command: str,
    complete: bool,
    most_epochs: int | None = None,
) -> str:
    """Return a report of the run so far in Markdown: its progress, a table of its epochs, and the next command.

    Args:
        metrics_file: the metrics.csv of the run.
        command: the command of the session that ends.
        complete: whether the run reached its goal, export included, so that it can only be continued for more epochs.
        most_epochs: maximum number of epochs in the table; if there are more, some in the middle are left out.
    """
    epoch, last_epoch = (f"{round(step / steps_per_epoch, 1):g}" for step in (state.step, state.goal_steps))
    sessions = "1 session" if state.sessions == 1 else f"{state.sessions} sessions"
    progress = f"Step {state.step:,} of {state.goal_steps:,} (epoch {epoch} of {last_epoch})"
    lines = [f"{progress} after {sessions} and {clock(state.elapsed_seconds)} of training"]
    table = epoch_table(metrics_file, most_epochs)
    purpose = "To train for more epochs" if complete else "To resume"
    more = max(2, round(MORE_EPOCHS * state.goal_steps / steps_per_epoch)) if complete else 0
    return "\n".join([*lines, *(["", *table] if table else []), "", f"{purpose}: {next_command(command, more)}"])


def epoch_table(metrics_file: Path, most_epochs: int | None = None) -> list[str]:
    """Return a Markdown table as lines: loss, validation metrics and training time of each epoch; empty without one."""
    rows = [row for row in read_metrics(metrics_file) if row.get("epoch_loss_mean")] if metrics_file.is_file() else []
    if not rows:
        return []
    metrics = [name for name in rows[0] if name.startswith("val_") and any(row[name] for row in rows)]
    before = [0.0, *(float(row["elapsed_seconds"]) for row in rows)]
    cells = [
        [
            f"{float(row['epoch']):g}",
            _number(row["epoch_loss_mean"]),
            *(_number(row[name]) for name in metrics),
            clock(float(row["elapsed_seconds"]) - earlier),
        ]
        for row, earlier in zip(rows, before)
    ]
    shown = _last(cells, most_epochs)
    header = ["epoch", "loss", *(name.replace("_", " ") for name in metrics), "time"]
    widths = [max(len(row[i]) for row in [header, *shown]) for i in range(len(header))]
    aligned = [[cell.rjust(width) for cell, width in zip(row, widths)] for row in [header, *shown]]
    aligned.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return [f"| {' | '.join(row)} |" for row in aligned]


def next_command(command: str, extra_epochs: int = 0) -> str:
    """Return the command that continues the run: `command` without --overwrite, which would start the run again.

    Args:
        extra_epochs: for a complete run, how many epochs it suggests.
    """
    words = shlex.split(command)
    kept: list[str] = []
    for word, before in zip(words, ["", *words]):
        switched = before == "--overwrite" and word in ("true", "false")
        if not switched and word.split("=")[0] != "--overwrite":
            kept.append(word)
    if extra_epochs and not any(word.split("=")[0] == "--extra_epochs" for word in kept):
        kept += ["--extra_epochs", str(extra_epochs)]
    return shlex.join(kept)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` of `items`, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _last(rows: list[list[str]], most: int | None) -> list[list[str]]:
    """Return at most `most` rows: the first one, an ellipsis, and the last ones."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[0], ["…"] * len(rows[0]), *rows[2 - most :]]


def _narrow(grid: Image) -> Image:
    if grid.width <= GRID_WIDTH:
        return grid
    return grid.resize((GRID_WIDTH, max(1, round(grid.height * GRID_WIDTH / grid.width))))


def _number(text: str) -> str:
    return f"{float(text):.4g}" if text else ""

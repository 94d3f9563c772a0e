"""What a run shows for itself between sessions: its previews side by side over time, and a table of its epochs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tools.grids import image_grid
from training.run.metrics_log import read_metrics

if TYPE_CHECKING:
    from PIL.Image import Image

    from training.run.state import RunState

STRIP = "progress.png"
REPORT = "sessions.md"
MOST_GRIDS = 8  # of a strip; beyond, some in the middle are left out
GRID_WIDTH = 480  # pixels of a grid in the strip
MOST_EPOCHS = 12  # of a table on the terminal


def grid_name(step: int, steps_per_epoch: int) -> str:
    """The file of a preview grid, by the epoch it ends or else by its step."""
    return f"epoch_{step // steps_per_epoch:04d}.png" if step % steps_per_epoch == 0 else f"step_{step:08d}.png"


def progress_strip(samples: Path, steps_per_epoch: int, last_step: int) -> Image | None:
    """The saved grids up to `last_step` from left to right, at most MOST_GRIDS, the first and the last among them.

    None where there is none. Later ones are of a run that went back to an earlier checkpoint.
    """
    from PIL import Image as PILImage

    found: list[tuple[int, str, Path]] = []
    for path in samples.glob("*.png"):
        match = re.fullmatch(r"(epoch|step)_(\d+)", path.stem)
        if match:
            number = int(match[2])
            step = number * steps_per_epoch if match[1] == "epoch" else number
            found.append((step, f"{match[1]} {number}", path))
    shown = _spread(sorted(grid for grid in found if grid[0] <= last_step), MOST_GRIDS)
    if not shown:
        return None
    images = []
    for _, _, path in shown:
        with PILImage.open(path) as grid:
            images.append(_narrow(grid.convert("RGB")))
    return image_grid(images, columns=len(images), column_titles=[title for _, title, _ in shown])


def session_report(
    metrics_file: Path,
    state: RunState,
    steps_per_epoch: int,
    command: str,
    complete: bool,
    most_epochs: int | None = None,
) -> str:
    """The run so far in Markdown: what is done, a table of its epochs, and what to type next.

    Args:
        metrics_file: metrics.csv.
        command: what was typed for the session that ends.
        complete: whether the run reached its goal, export included, so that only more epochs go on with it.
        most_epochs: of the table; beyond, some in the middle are left out.
    """
    done, goal = (f"{step / steps_per_epoch:.4g}" for step in (state.step, state.goal_steps))
    sessions = "1 session" if state.sessions == 1 else f"{state.sessions} sessions"
    lines = [f"{done} of {goal} epochs ({state.step} steps) in {sessions}, {_clock(state.elapsed_seconds)} of training"]
    table = epoch_table(metrics_file, most_epochs)
    return "\n".join([*lines, *(["", *table] if table else []), "", f"To go on: {next_command(command, complete)}"])


def epoch_table(metrics_file: Path, most_epochs: int | None = None) -> list[str]:
    """Lines of a Markdown table: loss, validation figures and training time of each epoch; none before the first."""
    rows = [row for row in read_metrics(metrics_file) if row.get("epoch_loss_mean")] if metrics_file.is_file() else []
    if not rows:
        return []
    figures = [name for name in rows[0] if name.startswith("val_") and any(row[name] for row in rows)]
    before = [0.0, *(float(row["elapsed_seconds"]) for row in rows)]
    cells = [
        [
            f"{float(row['epoch']):g}",
            _figure(row["epoch_loss_mean"]),
            *(_figure(row[name]) for name in figures),
            _clock(float(row["elapsed_seconds"]) - earlier),
        ]
        for row, earlier in zip(rows, before)
    ]
    shown = _last(cells, most_epochs)
    header = ["epoch", "loss", *(name.replace("_", " ") for name in figures), "time"]
    widths = [max(len(row[i]) for row in [header, *shown]) for i in range(len(header))]
    aligned = [[cell.rjust(width) for cell, width in zip(row, widths)] for row in [header, *shown]]
    aligned.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return [f"| {' | '.join(row)} |" for row in aligned]


def next_command(command: str, complete: bool) -> str:
    """What goes on with the run: the command again, without what would start anew; a complete run takes epochs more."""
    words = shlex.split(command)
    kept: list[str] = []
    for word, before in zip(words, ["", *words]):
        switched = before == "--overwrite" and word in ("true", "false")
        if not switched and word.split("=")[0] != "--overwrite":
            kept.append(word)
    if complete and not any(word.split("=")[0] == "--extra_epochs" for word in kept):
        kept += ["--extra_epochs", "2"]
    return shlex.join(kept)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of `items`, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _last(rows: list[list[str]], most: int | None) -> list[list[str]]:
    """The first row and the last ones, an ellipsis between."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[0], ["…"] * len(rows[0]), *rows[2 - most :]]


def _narrow(grid: Image) -> Image:
    if grid.width <= GRID_WIDTH:
        return grid
    return grid.resize((GRID_WIDTH, max(1, round(grid.height * GRID_WIDTH / grid.width))))


def _figure(text: str) -> str:
    return f"{float(text):.4g}" if text else ""


def _clock(seconds: float) -> str:
    """75 → '1:15', 3700 → '1:01:40'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

"""Reports the progress of a run: progress bar, rows of metrics, curves, sample grids, trackers and the log.

Every process counts steps and images, because the counts are part of a checkpoint; only the main process writes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tools.cli import UserError
from pipelines.tools.commands import this_command
from pipelines.tools.private import without_private
from pipelines.tools.progress import Progress
from pipelines.tools.quiet import route_library_logs
from training.core.files import write_atomically
from training.core.informing import Informing
from training.core.memory import memory_mib, peak_memory_mib
from training.core.previews import Previews, save_png
from training.reporting.advice import Course, advice, too_long
from training.reporting.curves import draw_training_curves
from training.reporting.groups import NOISE_LEVELS, group_of
from training.reporting.sessions import MOST_EPOCHS, REPORT, STRIP, grid_name, progress_strip, session_report
from training.reporting.tracking import TrackerConfig, parse_report_to, start_trackers, wandb_options
from training.run.folder import RunFolder
from training.run.metrics_log import EpochLoss, MetricsLog, read_metrics
from training.run.state import EpochSummary, RunState

if TYPE_CHECKING:
    from training.core.stage import Stage

logger = logging.getLogger("halftone")

METRICS_IN_BAR = 5
# Drawing the curves takes half a second or more, which would slow down a run with short epochs.
SECONDS_BETWEEN_EPOCH_LINES = 30.0
SECONDS_BETWEEN_CURVES = 20.0
MOST_TIME_FOR_CURVES = 0.01
# The first steps of a session load data and choose kernels; they are not typical of the rest.
STEPS_UNTIL_SPEED_IS_KNOWN = 200
ROWS_WAIT = "its rows are kept in memory and written later"


class Reporter:
    """The reports of one session. It cuts metrics.csv at the step that the run resumes from; trackers continue there.

    Args:
        settings: the config of the run as plain values, for the trackers.
        course: facts about the run for the advice.
        is_main: whether this is the main process; on other processes the reporter only counts.
    """

    def __init__(
        self,
        stage: Stage,
        config: TrackerConfig,
        settings: Mapping[str, Any],
        folder: RunFolder,
        state: RunState,
        course: Course,
        is_main: bool,
    ):
        self.stage, self.folder, self.state = stage, folder, state
        self.course, self.steps_per_epoch, self.is_main = course, course.steps_per_epoch, is_main
        self._steps, self._seconds = 0, 0.0
        # While the events after the current step (validation, previews, ...) are pending, its row is not written yet.
        last_row = state.step - 1 if state.pending_events else state.step
        self.informing = Informing()
        if is_main:
            self.metrics_log = _open_metrics(folder.metrics_file, last_row)
        self.trackers = start_trackers(
            parse_report_to(config.report_to),
            project=config.tracker_project_name,
            run_name=folder.name,
            run_dir=folder.path,
            config=settings,
            wandb=wandb_options(vars(config)),
            previous_id=state.tracker_id,
            first_step=last_row + 1,
            notify=logger.info,
        )
        if is_main:
            state.tracker_id = self.trackers.run_id
        self._progress: Progress | None = None
        self._losses: dict[str, float] = {}
        self._clock = time.perf_counter()
        self._row_seconds, self._row_images = 0.0, 0
        self._curves_due = self._clock + SECONDS_BETWEEN_CURVES
        self._epoch_line_due = self._clock

    def progress(self) -> Progress:
        """Return the progress bar, which is a context manager. Without a terminal, it prints lines to the log."""
        route_library_logs()
        self._progress = Progress(
            self.state.goal_steps,
            "step",
            "step",
            done=self.state.step,
            shown=self.is_main,
            facts=self._facts,
            say=lambda line: logger.info("%s", line),
        )
        self.restart_clock()
        return self._progress

    def restart_clock(self) -> None:
        """Restart the clock, so that validation, previews and saving do not count towards images per second."""
        self._clock = time.perf_counter()

    def step_done(self, images: int) -> None:
        """Count the time and the images of a step, and show the progress."""
        self._row_images += images
        self._steps += 1
        self._count_time()
        if self._steps == STEPS_UNTIL_SPEED_IS_KNOWN:
            self._warn_if_slow()
        if self._progress is not None:
            self._progress.update()

    def values_read(self, values: dict[str, float]) -> None:
        """Count the time that reading the values of a step took; the progress shows the loss from now on."""
        self._count_time()
        self._losses = {"loss": values["loss"]} if "loss" in values else {}

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._row_seconds += now - self._clock
        self.state.elapsed_seconds += now - self._clock
        self._seconds += now - self._clock if self._steps > STEPS_UNTIL_SPEED_IS_KNOWN // 2 else 0.0
        self._clock = now

    def _facts(self) -> list[str]:
        """Return what the progress bar shows beside the time left, the most important first."""
        state, speed = self.state, self._row_images / max(self._row_seconds, 1e-9)
        epoch = max(state.step - 1, 0) // self.steps_per_epoch + 1
        last_epoch = -(-state.goal_steps // self.steps_per_epoch)
        measured = {**self._losses, **dict(self._bar_metrics())}
        losses = [f"{name} {measured.pop(name):.4f}" for name in ("loss", "val_loss") if name in measured]
        others = [f"{name} {value:.3g}" for name, value in measured.items()]
        return [*losses, *([f"{speed:.0f} images/s"] if speed else []), f"epoch {epoch}/{last_epoch}", *others]

    def _warn_if_slow(self) -> None:
        """Warn once in a session, when its speed is known, if the run will take days."""
        mean = self._seconds / (STEPS_UNTIL_SPEED_IS_KNOWN - STEPS_UNTIL_SPEED_IS_KNOWN // 2)
        if warning := too_long(self.state.step, mean, self.course):
            logger.warning("%s", warning)

    def _bar_metrics(self) -> list[tuple[str, float]]:
        """Return the first metrics of the last validation, as many as fit on the progress bar."""
        metrics = [
            (name, value) for name, value in self.state.last_validation.items() if group_of(name) != NOISE_LEVELS
        ]
        return metrics[:METRICS_IN_BAR]

    def log_row(self, validated: dict[str, float], epoch_end: bool) -> None:
        """Write a row of metrics for the step just done: means since the last row, and the validation metrics."""
        state = self.state
        epoch = state.step // self.steps_per_epoch
        row: dict[str, Any] = {
            "step": state.step,
            "epoch": round(state.step / self.steps_per_epoch, 4),
            "images_seen": state.images_seen,
            **state.means.means(),
        }
        state.means.reset()
        if epoch_end:
            row |= state.epoch_loss.summary()
            self._close_epoch(epoch, row, validated)
        row |= validated
        row["elapsed_seconds"] = round(state.elapsed_seconds, 2)
        row["images_per_second"] = round(self._row_images / max(self._row_seconds, 1e-9), 2)
        self._row_seconds, self._row_images = 0.0, 0
        if self.is_main:
            with self.informing(self.folder.metrics_file.name, ROWS_WAIT):
                self.metrics_log.write(row)
            self.trackers.log(self._for_trackers(row, validated), state.step)
            if validated or epoch_end:
                self._draw_curves()
                # The epochs of a small collection take seconds: a line for each of them would hide all others.
                if validated or time.perf_counter() >= self._epoch_line_due:
                    self._log_summary(epoch, row, validated)

    def _for_trackers(self, row: dict[str, Any], validated: dict[str, float]) -> dict[str, Any]:
        """Return a row for the trackers, with the memory in use, and after a validation the best one so far.

        A tracker shows the last value of each metric as the summary of the run, also if the run never ends.
        """
        state, device = self.state, self.stage.context.device
        values = {name: value for name, value in row.items() if name != "step"}
        values |= {"memory_mib": memory_mib(device), "peak_memory_mib": peak_memory_mib(device)}
        if validated and state.best_value is not None:
            name = state.best_metric or self.stage.best_metric
            values |= {f"best/{name}": state.best_value, "best/step": state.best_step}
        return values

    def settle(self) -> None:
        """Flush the rows of metrics to the disk, before a checkpoint is written and at the end of a session."""
        if self.is_main:
            with self.informing(self.folder.metrics_file.name, ROWS_WAIT):
                self.metrics_log.settle()

    def keep_previews(self, previews: Previews) -> None:
        """Save the preview grid, send it to the trackers, and warn if the generated images have collapsed."""
        from training.metrics.collapse import collapse_warnings

        step, spe = self.state.step, self.steps_per_epoch
        with self.informing("the grid of previews"):
            save_png(previews.grid(), self.folder.samples / grid_name(step, spe))
            if (strip := progress_strip(self.folder.samples, spe, step)) is not None:
                save_png(strip, self.folder.samples / STRIP)
        self.trackers.log_images(previews.images, previews.captions, step)
        if previews.references:
            shown = (previews.images, previews.references, previews.captions)
            for warning in collapse_warnings(*shown, conditions=self.stage.conditions):
                logger.warning("%s", warning)

    def end_session(self, complete: bool) -> None:
        """Log a report of the run so far, and write it to sessions.md.

        Args:
            complete: whether the run reached its goal, export included.
        """
        facts = (self.folder.metrics_file, self.state, self.steps_per_epoch, this_command(), complete)
        self.settle()
        sentences = self._conclusions() if complete and self.is_main else []
        with self.informing(REPORT):
            answer = "".join(f"\n{sentence}\n" for sentence in sentences)
            report = f"# {self.folder.title}\n\n{session_report(*facts)}\n{answer}"
            write_atomically(self.folder.path / REPORT, without_private(report))
        logger.info("%s", session_report(*facts, most_epochs=MOST_EPOCHS))
        for sentence in sentences:
            logger.info("%s", sentence)

    def _conclusions(self) -> list[str]:
        rows = read_metrics(self.folder.metrics_file) if self.folder.metrics_file.is_file() else []
        return self.stage.conclusions(rows, self.steps_per_epoch)

    def _close_epoch(self, epoch: int, row: dict[str, Any], validated: dict[str, float]) -> None:
        state = self.state
        state.epoch_loss = EpochLoss()
        if "epoch_loss_mean" not in row:  # every step of the epoch was skipped
            return
        state.epochs.append(
            EpochSummary(epoch, row["epoch_loss_mean"], validated.get("val_loss"), row.get("learning_rate", 0.0))
        )
        for sentence in advice(state.epochs, self.course):
            logger.warning("%s", sentence)

    def _draw_curves(self) -> None:
        ended = self.state.step >= self.state.goal_steps or self.state.stopped_early
        started = time.perf_counter()
        if ended or started >= self._curves_due:
            with self.informing(self.folder.curves_file.name):
                draw_training_curves(self.folder.metrics_file, self.folder.curves_file, self.folder.title)
            now = time.perf_counter()
            self._curves_due = now + max(SECONDS_BETWEEN_CURVES, (now - started) / MOST_TIME_FOR_CURVES)

    def _log_summary(self, epoch: int, row: dict[str, Any], validated: dict[str, float]) -> None:
        parts = []
        if "epoch_loss_mean" in row:
            low, high = row["epoch_loss_min"], row["epoch_loss_max"]
            parts.append(f"loss mean {row['epoch_loss_mean']:.4f} (min {low:.4f}, max {high:.4f})")
        parts += [f"{name} {value:.4g}" for name, value in validated.items() if group_of(name) != NOISE_LEVELS]
        logger.info("epoch %d, step %d: %s", epoch, row["step"], ", ".join(parts))
        self._epoch_line_due = time.perf_counter() + SECONDS_BETWEEN_EPOCH_LINES
        if self._progress is not None:
            self._progress.postpone()


def _open_metrics(path: Path, last_row: int) -> MetricsLog:
    try:
        return MetricsLog(path, last_row)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free space on its disk, or make it writable"
        ) from None

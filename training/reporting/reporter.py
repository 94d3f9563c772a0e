"""What a run tells while it goes: progress bar, rows of metrics, curves, sample grids, trackers and the log.

Every process counts, since counts are part of a checkpoint; only the main one writes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipelines.tools.commands import this_command
from training.core.files import write_atomically
from training.core.previews import Previews, save_png
from training.reporting.advice import advice
from training.reporting.curves import draw_training_curves
from training.reporting.sessions import MOST_EPOCHS, REPORT, STRIP, grid_name, progress_strip, session_report
from training.reporting.tracking import TrackerConfig, parse_report_to, start_trackers
from training.run.folder import RunFolder
from training.run.metrics_log import EpochLoss, MetricsLog
from training.run.state import EpochSummary, RunState

if TYPE_CHECKING:
    from training.core.stage import Stage

logger = logging.getLogger("halftone")

# Without a terminal there is no bar: a line now and then says that it is alive.
SECONDS_BETWEEN_LINES = 60.0
METRICS_IN_BAR = 5
# Drawing takes half a second or more, which short epochs would feel.
SECONDS_BETWEEN_CURVES = 20.0
MOST_TIME_FOR_CURVES = 0.01


class Reporter:
    """The reports of one session, from where its run stands: metrics.csv is cut there, and trackers continue there.

    Args:
        settings: the run's config as plain values, for the trackers.
        is_main: whether this is the main process; on others the reporter only counts.
    """

    def __init__(
        self,
        stage: Stage,
        config: TrackerConfig,
        settings: Mapping[str, Any],
        folder: RunFolder,
        state: RunState,
        steps_per_epoch: int,
        is_main: bool,
    ):
        self.stage, self.folder, self.state = stage, folder, state
        self.steps_per_epoch, self.is_main = steps_per_epoch, is_main
        # A row of the current step is still to be written when what falls due after it is.
        last_row = state.step - 1 if state.pending_events else state.step
        if is_main:
            self.metrics_log = MetricsLog(folder.metrics_file, last_row)
        self.trackers = start_trackers(
            parse_report_to(config.report_to),
            project=config.tracker_project_name,
            run_name=folder.name,
            run_dir=folder.path,
            config=settings,
            previous_id=state.tracker_id,
            first_step=last_row + 1,
            notify=logger.info,
        )
        if is_main:
            state.tracker_id = self.trackers.run_id
        self._bar: tqdm | None = None
        self._clock = time.perf_counter()
        self._row_seconds, self._row_images = 0.0, 0
        self._line_said = time.perf_counter()
        self._curves_due = self._line_said + SECONDS_BETWEEN_CURVES

    def progress(self) -> tqdm:
        """The progress bar, a context manager."""
        self._bar = tqdm(
            total=self.state.goal_steps,
            initial=self.state.step,
            unit="step",
            disable=None if self.is_main else True,
            dynamic_ncols=True,
            desc=f"epoch {self.state.step // self.steps_per_epoch + 1}",
        )
        self.restart_clock()
        return self._bar

    def restart_clock(self) -> None:
        """Validation, previews and saving do not count towards images per second."""
        self._clock = time.perf_counter()

    def step_done(self, values: dict[str, float], images: int) -> None:
        """Count a step's time and images, and show it."""
        now = time.perf_counter()
        self._row_images += images
        self._row_seconds += now - self._clock
        self.state.elapsed_seconds += now - self._clock
        self._clock = now
        speed = self._row_images / max(self._row_seconds, 1e-9)
        loss = f"loss {values['loss']:.4f}, " if "loss" in values else ""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description(f"epoch {(self.state.step - 1) // self.steps_per_epoch + 1}", refresh=False)
            figures = "".join(f", {name.removeprefix('val_')} {value:.3g}" for name, value in self._figures())
            self._bar.set_postfix_str(f"{loss}{speed:.0f} images/s{figures}", refresh=False)
            self._bar.update()
        elif now - self._line_said >= SECONDS_BETWEEN_LINES:
            self._line_said = now
            logger.info("step %d of %d: %s%.0f images/s", self.state.step, self.state.goal_steps, loss, speed)

    def _figures(self) -> list[tuple[str, float]]:
        """The first of the last validation's figures: what a bar has room for."""
        return list(self.state.last_validation.items())[:METRICS_IN_BAR]

    def log_row(self, validated: dict[str, float], epoch_end: bool) -> None:
        """A row of metrics for the step just done: means since the last one, and what was validated."""
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
            self.metrics_log.write(row)
            self.trackers.log({k: v for k, v in row.items() if k != "step"}, state.step)
            if validated or epoch_end:
                self._draw_curves()
                self._say_row(epoch, row, validated)

    def keep_previews(self, previews: Previews) -> None:
        """Save the grid, send it to the trackers, and warn of a collapse."""
        from training.metrics.collapse import collapse_warnings

        step, spe = self.state.step, self.steps_per_epoch
        save_png(previews.grid(), self.folder.samples / grid_name(step, spe))
        if (strip := progress_strip(self.folder.samples, spe, step)) is not None:
            save_png(strip, self.folder.samples / STRIP)
        self.trackers.log_images(previews.images, previews.captions, step)
        if previews.references:
            for warning in collapse_warnings(previews.images, previews.references, previews.captions):
                logger.warning("%s", warning)

    def end_session(self, complete: bool) -> None:
        """The run so far, on the terminal and in sessions.md; `complete`: it reached its goal, export included."""
        told = (self.folder.metrics_file, self.state, self.steps_per_epoch, this_command(), complete)
        write_atomically(self.folder.path / REPORT, f"# {self.folder.path.name}\n\n{session_report(*told)}\n")
        logger.info("%s", session_report(*told, most_epochs=MOST_EPOCHS))

    def _close_epoch(self, epoch: int, row: dict[str, Any], validated: dict[str, float]) -> None:
        state = self.state
        state.epoch_loss = EpochLoss()
        if "epoch_loss_mean" not in row:  # every step of the epoch was skipped
            return
        state.epochs.append(
            EpochSummary(epoch, row["epoch_loss_mean"], validated.get("val_loss"), row.get("learning_rate", 0.0))
        )
        final = state.goal_steps / self.steps_per_epoch
        for sentence in advice(state.epochs, self.stage.trivial_loss, final):
            logger.warning("%s", sentence)

    def _draw_curves(self) -> None:
        ended = self.state.step >= self.state.goal_steps or self.state.stopped_early
        started = time.perf_counter()
        if ended or started >= self._curves_due:
            draw_training_curves(self.folder.metrics_file, self.folder.curves_file, self.folder.path.name)
            now = time.perf_counter()
            self._curves_due = now + max(SECONDS_BETWEEN_CURVES, (now - started) / MOST_TIME_FOR_CURVES)

    def _say_row(self, epoch: int, row: dict[str, Any], validated: dict[str, float]) -> None:
        parts = []
        if "epoch_loss_mean" in row:
            low, high = row["epoch_loss_min"], row["epoch_loss_max"]
            parts.append(f"loss mean {row['epoch_loss_mean']:.4f} (min {low:.4f}, max {high:.4f})")
        parts += [f"{name} {value:.4g}" for name, value in validated.items()]
        logger.info("epoch %d, step %d: %s", epoch, row["step"], ", ".join(parts))
        self._line_said = time.perf_counter()

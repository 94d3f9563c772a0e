"""The training loop of all stages: the order of a step, and of the events after it.

A step is one optimizer step of every phase that has begun, on the same micro-batches. The loop does not depend on any
model: everything it uses is built in `training.py` and restored in `restoring.py` before the loop starts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.tools.cli import UserError
from training.core.stage import Batch, Evaluation
from training.engine.batch_fitting import BatchFitting
from training.engine.best import best_metric, check_evaluations
from training.engine.cadence import Cadence, CheckpointClock
from training.engine.launch import exchange_of, gather
from training.engine.phase_runner import MemoryFull, PhaseRunner
from training.engine.profiling import StepProfiler
from training.engine.run_config import RunConfig
from training.engine.saving import CheckpointWriter, holds_best
from training.engine.schedule import PhaseSchedule
from training.engine.signals import FIRST_STEP_PATIENCE, Interrupted, StopSignal
from training.engine.step_values import DoneStep, Requests, StepOutcome, StepValues, Waiting
from training.engine.threads import main_thread_on_its_core
from training.engine.training import Training
from training.engine.validation import validate
from training.reporting.reporter import Reporter

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")

MOST_ROWS_NAMED = 64


class Loop:
    """Trains from the restored step until the goal is reached, the run stops early, or it is interrupted."""

    def __init__(
        self,
        training: Training,
        config: RunConfig,
        accelerator: Accelerator,
        reporter: Reporter,
        writer: CheckpointWriter,
        stop: StopSignal,
        fitting: BatchFitting,
    ):
        self.training, self.config, self.accelerator = training, config, accelerator
        self.fitting = fitting
        self.state, self.stage = training.state, training.stage
        self.reporter, self.writer, self.stop = reporter, writer, stop
        self.cadence = Cadence(config, training.steps_per_epoch, self.state.goal_steps)
        check_evaluations(self.stage, config)
        self.holds_best = holds_best(training, self.cadence)
        self.best_metric = best_metric(self.stage, config, self.cadence)
        self.state.judge_by(self.best_metric.name, self.stage.best_metric)
        self.schedules = [
            PhaseSchedule(runner.phase, config, runner.learning_rate, self.state.goal_steps, self.state.most_warmup)
            for runner in training.runners
        ]
        # Clocks differ between processes, so that of the main process decides for all.
        self.clock = CheckpointClock(config.checkpointing_minutes if accelerator.is_main_process else 0.0)
        self.stop_agreed, self.save_agreed = False, False
        self.waiting = Waiting()

    def run(self) -> None:
        """Train until the run is over, or until all processes have agreed to stop (`stop_agreed`).

        Raises:
            Interrupted: the process was asked to stop during a long first step (compilation); nothing needs saving.
        """
        state, training = self.state, self.training
        with self.stop.at_once(FIRST_STEP_PATIENCE):
            for runner in training.runners:
                runner.settle_buckets(*training.batches.first())
        if training.ema is not None:
            # In reverse: for a parameter of several phases the first of these phases counts.
            begins = zip(reversed(training.runners), reversed(self.schedules), strict=True)
            training.ema.begin_at({p: schedule.first_step for runner, schedule in begins for p in runner.parameters})
        if state.pending_events:
            self.events()
        self._load_batches()
        first_step = state.step
        leaving: AbstractContextManager[None] = self.stop.at_once(FIRST_STEP_PATIENCE)
        with self.reporter.progress(), main_thread_on_its_core(training.device), self._profiler() as profiler:
            while not (state.is_over or self.stop_agreed):
                with leaving:
                    with self._saving_if_data_fail(state.step > first_step):
                        batches = next(self._steps)
                    self.step(batches)
                leaving = nullcontext()
                self.events()
                profiler.step_done()

    @contextmanager
    def _saving_if_data_fail(self, has_trained: bool) -> Iterator[None]:
        """Save the steps of this session before an error about the data, such as a server that is gone, ends the run.

        With several processes, the others wait in the next step for this one, and cannot save.
        """
        try:
            yield
        except UserError:
            if has_trained and self.accelerator.num_processes == 1:
                self.read_values()
                self._save(must_succeed=True)
            raise

    def _profiler(self) -> StepProfiler:
        steps = self.config.profile_steps if self.accelerator.is_main_process else 0
        remaining = max(0, self.state.goal_steps - self.state.step)
        return StepProfiler(steps, remaining, self.reporter.folder.path, self.training.device)

    def _load_batches(self) -> None:
        """Begin to load the batches of the next step and of those after it."""
        self._steps = self.training.batches.steps(self.state.step, self.state.goal_steps)

    def step(self, batches: list[Batch]) -> None:
        """Make one optimizer step of every phase that has begun. `batches` are this process's micro-batches.

        The values of the step stay on the device; `read_values` reads and counts them.
        """
        state = self.state
        outcomes: dict[int, StepOutcome] = {}
        self._batches = batches
        for place, (runner, schedule) in enumerate(zip(self.training.runners, self.schedules, strict=True)):
            if not schedule.has_begun(state.step):
                continue
            requests = Requests(self.stop.requested is not None, self.clock.is_due(), self.waiting.seconds)
            rate = schedule.learning_rate_at(state.step)
            outcomes[place] = self._step_of(runner, rate, requests)
        if self.training.ema is not None:
            self.training.ema.update(state.step + 1, _all_taken(outcomes.values()))
        self.waiting.add(DoneStep(state.step, self.schedules[0].learning_rate_at(state.step), outcomes))
        state.step_done(self.training.layout.global_batch_size)
        self.reporter.step_done(self.training.layout.global_batch_size)

    def _step_of(self, runner: PhaseRunner, learning_rate: float, requests: Requests) -> StepOutcome:
        """Make the step of one phase; if the memory runs out, again with smaller micro-batches, or raise UserError."""
        while True:
            try:
                return runner.step(self.state.step, self._batches, learning_rate, requests)
            except MemoryFull as error:
                full = error
            self._batches = []
            self.fitting.in_step(self.state.step, full)
            self._load_batches()
            self._batches = next(self._steps)

    def read_values(self) -> None:
        """Read the values of the steps since the last call, and count them in their order.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        state, runners = self.state, self.training.runners
        for done, phases in self.waiting.read():
            skipped = False
            values: dict[str, float] = {}
            for place, result in phases.items():
                self.stop_agreed |= result.requests.stop
                self.save_agreed |= result.requests.save
                values |= result.values
                if not result.finite:
                    skipped = True
                    self._report_nonfinite(runners[place], done.step, result)
            values["learning_rate"] = done.learning_rate
            self.reporter.values_read(values)
            state.count(values, skipped)
            if state.skipped_in_a_row >= self.config.max_nonfinite_steps:
                state.step = done.step + 1  # later steps may have been taken meanwhile; nothing of them is saved
                self._give_up()

    def _must_read(self) -> bool:
        """Return whether the values are needed after the last step: the same on every process."""
        step, alone = self.state.step, self.accelerator.num_processes == 1
        asked = alone and (self.stop.requested is not None or self.clock.is_due())
        return asked or self.waiting.is_full or step >= self.state.goal_steps or self.cadence.anything_due(step)

    def events(self) -> None:
        """Validate, preview, log and save, in this order, whatever is due after the last step.

        If the run is interrupted here, the checkpoint notes that these events are pending, and the next session begins
        with them.
        """
        state, last = self.state, self.state.step >= self.state.goal_steps
        if not self._must_read():
            state.pending_events = False
            return
        self.read_values()
        try:
            if self.stop_agreed:
                raise Interrupted
            with self._saving_if_data_fail(has_trained=True):
                validated = self.validate() if last or self.cadence.validation_due(state.step) else {}
                evaluation = self.evaluate()
                if last or self.cadence.preview_due(state.step):
                    self.show_previews()
        except Interrupted:
            self.stop_agreed = True
            self._save(must_succeed=True)
            return
        measured = {**validated, **(evaluation.metrics if evaluation else {})}
        self._require_best_metric(measured)
        if evaluation is not None and self._distances_due():
            self.state.note_limits(evaluation.beyond_limits)
        improved = self._judge(measured, evaluation is None or evaluation.may_be_best)
        if measured or last or self.cadence.row_due(state.step):
            self.reporter.log_row(measured, self.cadence.ends_epoch(state.step))
        state.pending_events = False
        over = last or state.stopped_early
        due = over or self.cadence.checkpoint_due(state.step)
        if due or self.save_agreed or (improved and not self.holds_best):
            self._save(must_succeed=over, by_time=not due)
        elif improved:
            self.writer.hold()
            self.clock.mark()
        self.reporter.restart_clock()
        self.waiting.restart_clock()

    def _save(self, *, must_succeed: bool, by_time: bool = False) -> None:
        self.reporter.settle()
        in_its_place = self.writer.write(must_succeed=must_succeed, by_time=by_time)
        self.save_agreed = False
        self.clock.restart(from_mark=in_its_place)

    def validate(self) -> dict[str, float]:
        """Compute the validation metrics with the EMA weights. Raises Interrupted on every process."""
        with self.training.evaluating():
            metrics = validate(
                self.stage,
                self.accelerator,
                seed=self.config.seed,
                batch_size=self.config.validation_batch_size or self.training.layout.train_batch_size,
                poll=self.stop.check,
            )
        if metrics:
            self.state.last_validation = metrics
        return metrics

    @property
    def _is_last_step(self) -> bool:
        return self.state.step >= self.state.goal_steps

    def _distances_due(self) -> bool:
        return self.cadence.evaluates and (self._is_last_step or self.cadence.evaluation_due(self.state.step))

    def _copies_due(self) -> bool:
        return self.cadence.searches_copies and (self._is_last_step or self.cadence.copies_due(self.state.step))

    def evaluate(self) -> Evaluation | None:
        """Measure generated images if that is due, with the EMA weights. Raises Interrupted on every process."""
        distances = self._distances_due()
        copies = distances or self._copies_due()
        if not copies:
            return None
        exchange = exchange_of(self.accelerator)
        started = time.monotonic()
        with self.training.evaluating():
            evaluation = self.stage.evaluate(exchange, distances=distances, copies=copies)
        if evaluation is not None:
            self.state.last_evaluation = {**self.state.last_evaluation, **evaluation.metrics}
            if exchange.is_main:
                shown = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
                logger.info("step %d: %s (%.0f s)", self.state.step, shown, time.monotonic() - started)
                for warning in evaluation.warnings:
                    logger.warning("step %d: %s", self.state.step, warning)
        return evaluation

    def show_previews(self) -> None:
        """Generate the previews with the EMA weights, and save them on the main process. Raises Interrupted on every
        process."""
        exchange = exchange_of(self.accelerator)
        with self.training.evaluating():
            previews = self.stage.previews(exchange)
        if previews is not None and exchange.is_main:
            self.reporter.keep_previews(previews)

    def _require_best_metric(self, measured: dict[str, float]) -> None:
        """Save the run and raise UserError if `--best_metric` names a metric that was not measured with its kind."""
        name = self.best_metric.name
        known = [one for one in measured if one.startswith(name[: name.index("_")])]
        if known and name not in measured and (name.startswith("val_") or self._distances_due()):
            self._save(must_succeed=True)
            raise UserError(
                f"--best_metric {self.config.best_metric}: the measurements of this run are {', '.join(known)}; choose "
                "one of them, or auto, and run the command again. Nothing is lost"
            )

    def _judge(self, measured: dict[str, float], may_be_best: bool) -> bool:
        """Return whether the deciding metric is the best so far; stop the run early if patience is exhausted."""
        name = self.best_metric.name
        if name not in measured:
            return False
        value = measured[name]
        if not math.isfinite(value):
            logger.warning(
                "%s is %s at step %d, so this step is not the best one; if it stays so, lower --learning_rate",
                name,
                value,
                self.state.step,
            )
        improved = self.state.note_validation(
            value, self.best_metric.lower_is_better, self.config, may_be_best=may_be_best
        )
        self.state.stopped_early = self.state.must_stop_early(self.config)
        return improved

    def _report_nonfinite(self, runner: PhaseRunner, step: int, result: StepValues) -> None:
        rows = self.training.batches.rows(step, result.bad_micro_batches)
        everywhere = sorted({row for share in gather(self.accelerator, rows) for row in share})
        shown = ", ".join(map(str, everywhere[:MOST_ROWS_NAMED])) + (" …" if len(everywhere) > MOST_ROWS_NAMED else "")
        logger.warning(
            "step %d: the loss or gradient of '%s' is not finite; the update is skipped. Rows of the batch: %s",
            step + 1,
            runner.phase.name,
            shown,
        )

    def _give_up(self) -> None:
        raise UserError(
            f"{self.state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, up to step "
            f"{self.state.step}; {self.writer.step_back()}. Lower --learning_rate, use --mixed_precision bf16 or no, "
            "or check the dataset rows named above, and run the command again"
        )


def _all_taken(outcomes: Iterable[StepOutcome]) -> Tensor | bool:
    """Return whether every phase has taken its optimizer step; a tensor if this is known only on the device."""
    flags = [outcome.taken for outcome in outcomes]
    if not all(flag for flag in flags if isinstance(flag, bool)):
        return False
    unread = [flag for flag in flags if not isinstance(flag, bool)]
    return torch.stack(unread).all() if unread else True

"""The end of a session: the run is complete, was already complete, or was interrupted."""

from __future__ import annotations

import functools
import logging
import signal
from typing import TYPE_CHECKING

from pipelines.tools.checkpoint_links import linked_checkpoint
from pipelines.tools.cli import UserError
from training.core.exchange import Exchange
from training.core.previews import Previews
from training.engine.launch import exchange_of, gather
from training.engine.run_config import RunConfig
from training.engine.signals import Interrupted, StopSignal
from training.engine.training import Training
from training.publishing.exporter import Exporter
from training.publishing.hub import Publisher
from training.reporting.reporter import Reporter
from training.reporting.tracking import STOPPING_SECONDS
from training.run.folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")


def is_complete(training: Training, folder: RunFolder) -> bool:
    """Return whether a restored run is trained and exported; called on the main process only."""
    state = training.state
    return state.is_over and not state.pending_events and folder.is_exported(state.step)


def log_complete(training: Training, folder: RunFolder) -> None:
    """Log that the run is complete, and how to extend it."""
    state = training.state
    why = "its images became worse than its limits allow" if state.is_beyond_limits else "validation no longer improved"
    how = f"complete (stopped early: {why})" if state.stopped_early else "complete"
    logger.info(
        "the run in %s is %s: %d steps, %d images. The pipeline is in %s. "
        "To train further, add --extra_epochs N or a larger --num_train_epochs; to start again, add --overwrite",
        folder.path,
        how,
        state.step,
        state.images_seen,
        folder.pipeline,
    )


def push_missing(config: RunConfig, folder: RunFolder) -> int:
    """Upload what of a complete run should be on the Hub and is not; called on the main process only.

    Returns:
        The exit status.

    Raises:
        UserError: the token or the repository cannot be used, or the Hub cannot be reached.
    """
    return Publisher(config, folder=folder, notify=logger.info).push() if config.push_to_hub else 0


def finish(
    training: Training,
    folder: RunFolder,
    exporter: Exporter,
    reporter: Reporter,
    accelerator: Accelerator,
    stop: StopSignal,
) -> bool:
    """Let the stage finish, and export the pipeline of a trained and saved run; every process calls it.

    Returns:
        False when this was interrupted; the same command, run again, finishes it.

    Raises:
        UserError: on every process, if the pipeline could not be written.
        Interrupted: this process, or another one, was asked to stop, and there are several. A process that leaves an
            exchange cannot wait for the others: it ends, and they end because of that (`RankWatch`).
    """
    failure = ""
    if accelerator.is_main_process and accelerator.num_processes > 1:
        stop.on_leaving = functools.partial(_close_stopped, training, exporter, reporter)
    try:
        with training.evaluating(), stop.at_once():
            exchange = exchange_of(accelerator, stops_together=False)
            _choose_weights(training, folder, exchange)
            training.stage.finish(exchange)
            previews = _samples(training, exporter, exchange)
            if accelerator.is_main_process:
                failure = _export(training, exporter, previews)
            # Inside of `at_once`, which also ends a process that waits here for one that is gone.
            failure = gather(accelerator, failure)[0]
    except Interrupted:
        if accelerator.num_processes == 1:
            return False
        raise
    stop.on_leaving = None
    if failure:
        raise UserError(failure)
    if accelerator.is_main_process:
        reporter.trackers.summary(training.record())
        reporter.trackers.finish(stop_requested=lambda: stop.requested)
        reporter.end_session(complete=True)
    return True


def _choose_weights(training: Training, folder: RunFolder, exchange: Exchange) -> None:
    """Load the weights to export, unless they are the last ones; it is called inside `evaluating`."""
    state, stage = training.state, training.stage
    if not (state.stopped_early or stage.exports_best):
        return
    best = linked_checkpoint(folder.checkpoints, "best")
    # Without a metric that may be the best one, `best` is only the first checkpoint.
    if state.best_value is not None and best is not None:
        training.load_best(best)
    elif state.best_value is None and (measured := stage.without_best(exchange)) is not None:
        state.last_validation, state.last_evaluation = {}, dict(measured)


def _samples(training: Training, exporter: Exporter, exchange: Exchange) -> Previews | None:
    """Generate the samples that are published with the pipeline; every process calls it."""
    try:
        return training.stage.previews(exchange)
    except UserError as error:
        raise UserError(_not_exported(training, exporter, error)) from None


def _export(training: Training, exporter: Exporter, previews: Previews | None) -> str:
    """Export the pipeline; return what prevented it, or an empty text."""
    try:
        exporter.write(training.record(), previews)
    except (OSError, UserError) as error:
        return _not_exported(training, exporter, error)
    return ""


def _not_exported(training: Training, exporter: Exporter, error: OSError | UserError) -> str:
    # A UserError says itself what to do first.
    fix = "Run" if isinstance(error, UserError) else f"Free space on the disk of {exporter.folder.path} and run"
    return (
        f"the pipeline could not be exported ({getattr(error, 'strerror', None) or error}); the checkpoint of step "
        f"{training.state.step} is saved. {fix} the same command again, which only exports the pipeline"
    )


def leave(
    training: Training, exporter: Exporter, reporter: Reporter, accelerator: Accelerator, stop: StopSignal
) -> int:
    """Log how to resume an interrupted run that is saved; return the exit status, the same on every process."""
    if accelerator.is_main_process:
        _close_stopped(training, exporter, reporter)
    numbers = [number for number in gather(accelerator, stop.requested) if number is not None]
    return stop.exit_status(numbers[0] if numbers else signal.SIGTERM)


def _close_stopped(training: Training, exporter: Exporter, reporter: Reporter) -> None:
    state = training.state
    logger.info("stopped at step %d of %d; everything is saved", state.step, state.goal_steps)
    reporter.end_session(complete=False)
    reporter.trackers.finish(STOPPING_SECONDS)
    exporter.close()

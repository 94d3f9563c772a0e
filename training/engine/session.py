"""One session of a run, from the command to the exit status: open, restore, train, and finish or be interrupted."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from pipelines.tools.cli import keep_running_without_output, printable
from pipelines.tools.credentials import mask_credentials
from training.core.stage import Stage, StageContext
from training.engine import dry_run, ending, restoring
from training.engine.batch_fitting import BatchFitting, fitted_layout, reporting_full_memory
from training.engine.choices import kept_precision, pin_inputs, settle_choices
from training.engine.expectations import course, warnings_at_start
from training.engine.launch import close_process_group_at_exit, on_main, start_accelerator
from training.engine.loop import Loop
from training.engine.prepare import make_missing
from training.engine.ranks import RankWatch
from training.engine.run_config import RunConfig
from training.engine.saving import CheckpointWriter
from training.engine.signals import Interrupted, StopSignal
from training.engine.speed import fit_length
from training.engine.training import Training
from training.engine.validation import evaluating, print_metrics, validate
from training.engine.weights import freeze_parameters, load_initial_weights
from training.publishing import hub_resume
from training.publishing.exporter import Exporter
from training.publishing.hub import Publisher
from training.reporting.reporter import Reporter
from training.reporting.tracking import automatic_trackers, explain_automatic, is_automatic
from training.run import recovery
from training.run.folder import RunFolder
from training.run.output import start_logging

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")

BuildStage = Callable[[Any, StageContext], Stage]


def train(build_stage: BuildStage, config: RunConfig) -> int:
    """Train the stage that `build_stage` returns, starting from the last checkpoint in `config.output_dir`, if any.

    Args:
        build_stage: a Stage class, or a function that returns a stage. It is called with the config and a
            `StageContext` on every process, after the missing inputs in `config.prepare` are made.
        config: validated options; `config.output_dir` is the run folder.

    Returns:
        The exit status of the process.

    Raises:
        UserError: a mistake that the user can correct; most are detected before the first step.
    """
    started = time.perf_counter()
    keep_running_without_output()
    folder = RunFolder(config.output_dir, config.run_name)
    accelerator = start_accelerator(config, kept_precision(config, folder))
    ranks = (accelerator.process_index, accelerator.num_processes)
    with StopSignal() as stop:
        try:
            with RankWatch(*ranks, stop, patience=config.process_timeout):
                status = _session(build_stage, config, accelerator, folder, stop, started)
                # If one process exits first, gloo's threads sometimes abort another one, although its work is done.
                accelerator.wait_for_everyone()
            close_process_group_at_exit()
            return status
        except Interrupted:
            if accelerator.is_main_process:
                logger.info("stopped; run the same command again")
            return stop.exit_status(stop.requested or signal.SIGTERM)
        finally:
            folder.release()


def _session(
    build_stage: BuildStage,
    config: RunConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    stop: StopSignal,
    started: float,
) -> int:
    with stop.at_once():
        _open(folder, config, accelerator)
        if config.dry_run and (missing := dry_run.missing_inputs(config)):
            return _print_on_main(missing, accelerator)
    if accelerator.is_main_process and not config.dry_run:
        for line in config.announcements:
            logger.info("%s", printable(line))
    # The main process passes a request to stop on to the script that it runs, and then stops itself.
    with nullcontext() if accelerator.is_main_process else stop.at_once():
        on_main(accelerator, lambda: make_missing(config.recipes(), lambda: stop.requested))
    # Nothing here needs to be saved, although it may take long (data, compilation, a Hub or a tracker that is silent).
    with stop.at_once():
        pin_inputs(config, accelerator)
        resuming = folder.has_checkpoint()
        context = StageContext(
            accelerator.device,
            resuming=resuming,
            trains=config.trains,
            poll=stop.check,
            num_processes=accelerator.num_processes,
        )
        stage = build_stage(config, context)
        freeze_parameters(stage, config.freeze_parameters)
        if config.dry_run:
            return _print_on_main(dry_run.report(stage, config, accelerator.num_processes), accelerator)
        if config.validate_model:
            return _validate_model(stage, config, accelerator, stop)
        training = Training(stage, config, accelerator, fitted_layout(config, folder, accelerator))
        resumed = restoring.restore(training, config, folder, accelerator)
        if config.validate_only:
            return _validate(training, config, accelerator, stop)
        fitting = BatchFitting(training, config, accelerator, folder)
        if not training.state.is_over:
            fitting.try_a_step()
        if config.max_train_minutes:
            with reporting_full_memory(training):
                fit_length(training, config, folder, accelerator, stop, started)
        if on_main(accelerator, lambda: ending.is_complete(training, folder)):
            if accelerator.is_main_process:
                restoring.finish_saving(training, folder, config.checkpoints_total_limit)
                ending.log_complete(training, folder)
            return on_main(accelerator, lambda: ending.push_missing(config, folder))
        prepared = _prepare(training, config, accelerator, folder, resumed)
    with reporting_full_memory(training):
        return _train(training, config, accelerator, folder, stop, prepared, fitting)


def _open(folder: RunFolder, config: RunConfig, accelerator: Accelerator) -> None:
    """Open the run folder and its log. A dry run writes nothing, and `--validate_model` has no run folder."""
    own_folder = not (config.dry_run or config.validate_model)
    if own_folder:
        on_main(accelerator, lambda: restoring.open_run(folder, config, config.resume_from_checkpoint))
    start_logging(folder.log_file if accelerator.is_main_process and own_folder else None)
    if own_folder:
        on_main(accelerator, lambda: recovery.put_in_order(folder))
    if own_folder and hub_resume.is_on_hub(config.resume_from_checkpoint):
        on_main(accelerator, lambda: hub_resume.fetch(config.resume_from_checkpoint, folder, config, config))
        config.resume_from_checkpoint = "latest"  # the checkpoint is in the run folder now
    settle_choices(config, folder, accelerator)
    if not config.validate_model:
        on_main(accelerator, lambda: restoring.compare_configs(folder, config))


def _prepare(
    training: Training, config: RunConfig, accelerator: Accelerator, folder: RunFolder, resumed: str
) -> tuple[Exporter, Reporter]:
    """Make what a restored run reports and exports with; check the disk and the Hub before that."""
    is_main = accelerator.is_main_process
    publisher = Publisher(config, folder=folder, notify=logger.info) if config.push_to_hub and is_main else None
    on_main(accelerator, lambda: _check_before_start(training, config, folder, publisher))
    if is_automatic(config.report_to):
        config.report_to = _chosen_trackers(folder) if is_main else "none"
    settings = config.to_dict()
    exporter = Exporter(training.stage, settings, folder, publisher)
    reporter = Reporter(training.stage, config, settings, folder, training.state, course(training, config), is_main)
    if is_main:
        training.state.sessions += 1
        folder.save_config(settings)
        _log_start(training, folder, resumed)
        for sentence in warnings_at_start(training, config):
            logger.warning("%s", sentence)
    return exporter, reporter


def _chosen_trackers(folder: RunFolder) -> str:
    """Return what `--report_to auto` means on this machine, and say so."""
    trackers = automatic_trackers()
    logger.info("%s", explain_automatic(trackers, folder.path))
    return ",".join(trackers) or "none"


def _train(
    training: Training,
    config: RunConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    stop: StopSignal,
    prepared: tuple[Exporter, Reporter],
    fitting: BatchFitting,
) -> int:
    """Train a restored run until it is complete or interrupted; return the exit status."""
    exporter, reporter = prepared
    writer = CheckpointWriter(training, folder, exporter, accelerator, keep=config.checkpoints_total_limit)
    loop = Loop(training, config, accelerator, reporter, writer, stop, fitting)
    try:
        loop.run()
    except Interrupted:  # in the first step of this session: there is nothing to save
        if accelerator.num_processes > 1:
            raise
    else:
        if not loop.stop_agreed and ending.finish(training, folder, exporter, reporter, accelerator, stop):
            return on_main(accelerator, lambda: exporter.status)
    return ending.leave(training, exporter, reporter, accelerator, stop)


def _check_before_start(training: Training, config: RunConfig, folder: RunFolder, publisher: Publisher | None) -> None:
    """Check the disk space and the right to upload, which would otherwise fail after hours of training.

    What earlier sessions did not upload is queued.
    """
    restoring.finish_saving(training, folder, config.checkpoints_total_limit)
    restoring.check_disk(folder, training.checkpoint_bytes(), config.checkpoints_total_limit)
    if publisher is not None:
        publisher.check()
        publisher.catch_up()


def _log_start(training: Training, folder: RunFolder, resumed: str) -> None:
    logger.info(
        "%s in %s: %s. %d images, %d steps per epoch, global batch size %d, %.1f M trainable parameters, on %d × %s",
        training.stage.name,
        folder.path,
        resumed,
        training.num_images,
        training.steps_per_epoch,
        training.layout.global_batch_size,
        training.trained_parameters / 1e6,
        training.num_processes,
        training.device.type if training.shards is None else f"{training.device.type} with FSDP2",
    )


def _validate(training: Training, config: RunConfig, accelerator: Accelerator, stop: StopSignal) -> int:
    """Print the validation metrics of the restored run, with its EMA weights (`--validate_only`)."""
    with training.evaluating():
        _print_validation(training.stage, config, accelerator, stop)
    return 0


def _validate_model(stage: Stage, config: RunConfig, accelerator: Accelerator, stop: StopSignal) -> int:
    """Print the validation metrics of a model that need not belong to this run (`--validate_model`)."""
    assert config.validate_model is not None
    load_initial_weights(config.validate_model, stage.ema_of, "--validate_model")
    modules = [*stage.frozen, *stage.phases]
    for module in modules:
        module.to(accelerator.device)
    with evaluating(modules, None):
        _print_validation(stage, config, accelerator, stop)
    return 0


def _print_validation(stage: Stage, config: RunConfig, accelerator: Accelerator, stop: StopSignal) -> None:
    batch_size = config.validation_batch_size or config.train_batch_size
    print_metrics(validate(stage, accelerator, seed=config.seed, batch_size=batch_size, poll=stop.check), accelerator)


def _print_on_main(text: str, accelerator: Accelerator) -> int:
    if accelerator.is_main_process:
        print(mask_credentials(text))
    return 0

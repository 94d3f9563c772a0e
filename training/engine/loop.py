"""The loop that all stages share: steps, checks, averages, cadences, checkpoints, and nothing about any model.

A step is one optimizer step of every active phase, on the same micro-batches.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader

from pipelines.tools.cli import UserError
from training.core.batches import collate_function, fetch, to_device
from training.core.draws import Draws
from training.core.layout import BatchLayout, steps_per_epoch
from training.core.run_config import RunConfig
from training.core.stage import Batch, Stage
from training.engine import dry_run, resume
from training.engine.balance import balanced_strata
from training.engine.ema import EMA
from training.engine.launch import on_main, peak_memory_mib, start_accelerator
from training.engine.phase_runner import PhaseRunner, StepOutcome
from training.engine.prepare import interrupted_while_making
from training.engine.sampler import StepSampler
from training.engine.signals import Interrupted, StopSignal, ignore_interrupts
from training.engine.validation import evaluating, gather, print_metrics, validate, validate_only
from training.engine.weights import freeze_parameters, load_initial_weights
from training.publishing.exporter import Exporter
from training.reporting.reporter import Reporter
from training.reporting.tracking import parse_report_to
from training.run import checkpoint
from training.run.folder import RunFolder, start_logging
from training.run.state import RunState, due

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")


def train(build_stage: Callable[[], Stage], config: RunConfig) -> int:
    """Train what `build_stage` makes, from wherever the run in `config.output_dir` stands; returns the exit status.

    Args:
        build_stage: called on every process, once the inputs that `config.prepare` can make are there.
        config: validated; `config.output_dir` names the run folder.

    Raises:
        UserError: what the user can mend, before the first step.
    """
    parse_report_to(config.report_to)
    accelerator = start_accelerator(config)
    folder = RunFolder(config.output_dir)
    with StopSignal() as stop:
        try:
            status = _session(build_stage, config, accelerator, folder, stop)
            # When one process leaves first, gloo's threads in another now and then abort it, its work done.
            accelerator.wait_for_everyone()
            return status
        finally:
            # Without it a distributed script can abort after its work is done.
            accelerator.end_training()
            folder.release()


def _session(
    build_stage: Callable[[], Stage], config: RunConfig, accelerator: Accelerator, folder: RunFolder, stop: StopSignal
) -> int:
    own_folder = not (config.dry_run or config.validate_model)
    if own_folder:
        on_main(accelerator, lambda: resume.open_run(folder, config))
    start_logging(folder.log_file if accelerator.is_main_process and own_folder else None)
    if not config.validate_model:
        on_main(accelerator, lambda: resume.compare_configs(folder, config))
    if config.dry_run and (missing := dry_run.missing_inputs(config)):
        if accelerator.is_main_process:
            print(missing)
        return 0
    if on_main(accelerator, lambda: interrupted_while_making(config.recipes(), lambda: stop.requested)):
        return stop.exit_status(stop.requested or signal.SIGTERM)
    stage = build_stage()
    stage.poll = stop.check  # type: ignore[method-assign]
    freeze_parameters(stage, config.freeze_parameters)
    if config.dry_run:
        if accelerator.is_main_process:
            print(dry_run.report(stage, config, accelerator.num_processes))
        return 0
    if config.validate_model:
        load_initial_weights(config.validate_model, stage.ema_of, "--model")
        batch_size = config.validation_batch_size or config.train_batch_size
        done = validate_only(stage, accelerator, config.seed, batch_size)
        return 0 if done else stop.exit_status(stop.requested or signal.SIGTERM)
    return Trainer(stage, config, accelerator, folder, stop).run()


class Trainer:
    """One session of a run: restored, trained, saved."""

    def __init__(self, stage: Stage, config: RunConfig, accelerator: Accelerator, folder: RunFolder, stop: StopSignal):
        self.stage, self.config, self.accelerator, self.folder, self.stop = stage, config, accelerator, folder, stop
        self.data = stage.train_data()
        self.strata = balanced_strata(self.data, config.balance_by, config.balance_power)
        self.layout = BatchLayout(
            config.train_batch_size,
            accelerator.num_processes,
            config.gradient_accumulation_steps,
            accelerator.process_index,
        )
        self.steps_per_epoch = steps_per_epoch(len(self.data), self.layout)
        for module in stage.frozen:
            module.requires_grad_(False).eval().to(accelerator.device)
        self.runners = [
            PhaseRunner(phase, config, accelerator, self.layout, "" if i == 0 else f"{phase.name}_")
            for i, phase in enumerate(stage.phases)
        ]
        self.trained_parameters = sum(p.numel() for r in self.runners for p in r.parameters)
        self.ema = EMA(stage.ema_of, config.ema_decay, config.ema_update_every) if config.use_ema else None
        self.state = RunState()
        self.stop_agreed = False

    # --- a session -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        self.exporter = Exporter(self.stage, self.config, self.folder, self.accelerator, self._record)
        resumed_from = self._restore()
        self.reporter = Reporter(
            self.stage, self.config, self.folder, self.state, self.steps_per_epoch, self.accelerator.is_main_process
        )
        if self.config.validate_only:
            return self._validate_only()
        if self._is_complete():
            return self._say_complete()
        on_main(self.accelerator, self._check_before_start)
        self._start_outputs(resumed_from)
        for runner in self.runners:
            runner.settle_buckets(*self._first_batch())
        if self.state.pending_events:
            self._events()
        self._train()
        if self.stop_agreed:
            return self._leave()
        return self._finish()

    def _train(self) -> None:
        for runner in self.runners:
            runner.plan(self.state.goal_steps)
        if self.ema is not None:
            self.ema.plan({p: runner.first_step for runner in reversed(self.runners) for p in runner.parameters})
        batches = self._micro_batches()
        with self.reporter.progress():
            while self.state.step < self.state.goal_steps and not self.state.stopped_early and not self.stop_agreed:
                self._step([next(batches) for _ in range(self.config.gradient_accumulation_steps)])
                self._events()

    def _step(self, batches: list[Batch]) -> None:
        state = self.state
        values: dict[str, float] = {}
        skipped = False
        for runner in self.runners:
            if state.step < runner.first_step:
                continue
            outcome = runner.step(state.step, batches, stop=self.stop.requested is not None)
            self.stop_agreed |= outcome.stop
            values |= outcome.values
            if not outcome.finite:
                skipped = True
                self._report_nonfinite(runner, outcome)
        if self.ema is not None and not skipped:
            self.ema.update(state.step + 1)
        values["learning_rate"] = self.runners[0].learning_rate_at(state.step)
        state.step += 1
        state.images_seen += self.layout.global_batch_size
        state.pending_events = True
        self.reporter.step_done(values, self.layout.global_batch_size)
        if skipped:
            self._count_skipped()
            return
        state.skipped_in_a_row = 0
        state.means.add(values)
        if "loss" in values:  # the first phase may start late
            state.epoch_loss.add(values["loss"])

    def _events(self) -> None:
        """What falls due after the step just done. A stop leaves it for the next session, as a whole."""
        state, config, spe = self.state, self.config, self.steps_per_epoch
        last = state.step >= state.goal_steps
        epoch_end = state.step % spe == 0
        if self.stop_agreed:
            self._save()
            return
        row: dict[str, float] = {}
        improved = False
        if last or due(state.step, config.validation_steps, config.validation_epochs, spe):
            validated = self._validate()
            if validated is None:
                self._stop_in_events()
                return
            row |= validated
        if (last or due(state.step, config.preview_steps, config.preview_epochs, spe)) and not self._previews():
            self._stop_in_events()
            return
        if self.stage.best_metric in row:
            improved = state.note_validation(
                row[self.stage.best_metric], self.stage.best_is_lower, config.early_stopping_min_delta
            )
            if improved:
                state.best_validation = dict(state.last_validation)
            state.stopped_early = self._patience_is_spent()
        if row or epoch_end or last or state.step % config.logging_steps == 0:
            self.reporter.log_row(row, epoch_end)
        state.pending_events = False
        if (
            improved
            or last
            or state.stopped_early
            or due(state.step, config.checkpointing_steps, config.checkpointing_epochs, spe)
        ):
            self._save()
        self.reporter.restart_clock()

    def _finish(self) -> int:
        try:
            with evaluating(self._modules(), self.ema):
                self.exporter.run(use_best=self.state.stopped_early, load_best=self._load_best)
        except Interrupted:
            self.stop_agreed = True
        if any(gather(self.accelerator, self.stop_agreed)):
            return self._leave()
        if self.accelerator.is_main_process:
            self.reporter.trackers.summary(self._record())
            self.reporter.trackers.finish()
            self.reporter.end_session(complete=True)
        return 0

    def _leave(self) -> int:
        """After a stop: everything is saved; say how to go on."""
        number = self.stop.requested or signal.SIGTERM
        if self.accelerator.is_main_process:
            logger.info("stopped at step %d of %d; everything is saved", self.state.step, self.state.goal_steps)
            self.reporter.end_session(complete=False)
            self.reporter.trackers.finish()
            self.exporter.close()
        numbers = [n for n in gather(self.accelerator, self.stop.requested) if n is not None]
        return self.stop.exit_status(numbers[0] if numbers else number)

    # --- parts of a session ----------------------------------------------------------------------------------------

    def _restore(self) -> str:
        """Load what the run folder has; returns a sentence about it."""
        config = self.config
        wanted = config.resume_from_checkpoint
        found = None if wanted == "none" else self._agree_on_checkpoint(wanted)
        if found is None and config.validate_only:
            raise UserError(
                f"--validate_only: there is no checkpoint in {self.folder.path}; name the run with --output_dir, "
                "or a checkpoint with --resume_from_checkpoint"
            )
        if found is not None:
            self.state = RunState.from_json(checkpoint.load_json(found / "trainer_state.json"))
            resume.check_same_data(self.state, self.layout.global_batch_size, len(self.data))
            for runner in self.runners:
                resume.load_or_explain(runner.load, found)
            if self.ema is not None:
                resume.load_or_explain(lambda folder: self._load_ema(folder), found)
            if self.accelerator.scaler is not None and (found / "scaler.json").is_file():
                self.accelerator.scaler.load_state_dict(checkpoint.load_json(found / "scaler.json"))
        state = self.state
        state.global_batch_size, state.num_samples = self.layout.global_batch_size, len(self.data)
        exported = on_main(self.accelerator, lambda: self.exporter.is_exported(state.step))
        state.goal_steps = resume.goal_steps(config, state, self.steps_per_epoch, exported)
        if state.stopped_early and exported and config.extra_epochs:
            state.validations_without_improvement = 0
        if state.step < state.goal_steps and not self._patience_is_spent():
            state.stopped_early = False
        return f"resumed from {found.name} at step {state.step}" if found else "starting from scratch"

    def _agree_on_checkpoint(self, wanted: str) -> Path | None:
        name = on_main(self.accelerator, lambda: checkpoint.find_checkpoint(self.folder.checkpoints, wanted))
        return None if name is None else Path(name)

    def _load_ema(self, folder: Path) -> None:
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint.load_tensors(folder / "ema.safetensors"))

    def _load_best(self) -> None:
        """The averages of the best validation, for the export of a run that was stopped early."""
        best = self.folder.checkpoints / "best"
        self.state.last_validation = self.state.best_validation or self.state.last_validation
        if self.ema is None:
            for runner in self.runners:
                runner.load_weights(best)
            return
        for name, module in self.stage.ema_of.items():
            tensors = checkpoint.load_tensors(best / "ema.safetensors")
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            module.load_state_dict(own, strict=False)

    def _patience_is_spent(self) -> bool:
        patience = self.config.early_stopping_patience
        return bool(patience) and self.state.validations_without_improvement >= patience

    def _is_complete(self) -> bool:
        state = self.state
        ended = state.step >= state.goal_steps or state.stopped_early
        exported = on_main(self.accelerator, lambda: self.exporter.is_exported(state.step))
        return ended and not state.pending_events and exported

    def _say_complete(self) -> int:
        if self.accelerator.is_main_process:
            how = "stopped early, its validation did not improve any more" if self.state.stopped_early else "complete"
            logger.info(
                "the run in %s is %s: %d steps, %d images. The pipeline is in %s. "
                "To train on: --extra_epochs N, or a larger --num_train_epochs; to start anew: --overwrite",
                self.folder.path,
                how,
                self.state.step,
                self.state.images_seen,
                self.folder.pipeline,
            )
        return 0

    def _check_before_start(self) -> None:
        checkpoint.relink_best(self.folder.checkpoints, self.state.best_step)
        size = sum(r.checkpoint_bytes() for r in self.runners)
        size += 2 * sum(p.numel() * p.element_size() for m in self.stage.ema_of.values() for p in m.parameters())
        size += sum(p.numel() * p.element_size() for m in self.stage.frozen for p in m.parameters())
        resume.check_disk(self.folder, size, self.config.checkpoints_total_limit)
        self.exporter.check_hub()

    def _start_outputs(self, resumed_from: str) -> None:
        if not self.accelerator.is_main_process:
            return
        self.state.sessions += 1
        self.folder.save_config(self.config.to_dict())
        self.reporter.start()
        logger.info(
            "%s in %s: %s. %d images, %d steps an epoch, batch %d, %.1f M parameters trained, on %d × %s",
            self.stage.name,
            self.folder.path,
            resumed_from,
            len(self.data),
            self.steps_per_epoch,
            self.layout.global_batch_size,
            self.trained_parameters / 1e6,
            self.accelerator.num_processes,
            self.accelerator.device.type,
        )

    def _micro_batches(self) -> Iterator[Batch]:
        sampler = self._sampler(self.state.step, self.state.goal_steps)
        workers = self.config.dataloader_num_workers
        loader = DataLoader(
            self.data,  # type: ignore[arg-type]
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=collate_function(self.data),
            num_workers=workers,
            worker_init_fn=ignore_interrupts if workers else None,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        for batch in loader:
            yield to_device(batch, self.accelerator.device)

    def _sampler(self, start: int, stop: int) -> StepSampler:
        return StepSampler(len(self.data), self.layout, self.config.seed, start, stop, self.strata)

    def _first_batch(self) -> tuple[Batch, Draws]:
        batch = fetch(self.data, self._sampler(0, 1).keys(0, 0))
        draws = Draws(self.config.seed, 0, self.layout.positions(0), self.accelerator.device)
        return to_device(batch, self.accelerator.device), draws

    # --- events ----------------------------------------------------------------------------------------------------

    def _modules(self) -> list[nn.Module]:
        return [*self.stage.phases, *self.stage.ema_of.values()]

    def _validate(self) -> dict[str, float] | None:
        batch_size = self.config.validation_batch_size or self.config.train_batch_size
        with evaluating(self._modules(), self.ema):
            metrics = validate(self.stage, self.accelerator, self.config.seed, batch_size)
        if metrics:
            self.state.last_validation = metrics
        return metrics

    def _validate_only(self) -> int:
        metrics = self._validate()
        print_metrics(metrics, self.accelerator)
        return 0 if metrics is not None else self.stop.exit_status(self.stop.requested or signal.SIGTERM)

    def _previews(self) -> bool:
        """Draw and save the previews; False when a stop came between."""
        interrupted = False
        if self.accelerator.is_main_process:
            try:
                with evaluating(self._modules(), self.ema):
                    previews = self.stage.previews()
            except Interrupted:
                interrupted, previews = True, None
            if previews is not None:
                self.reporter.keep_previews(previews)
        return not any(gather(self.accelerator, interrupted))

    def _save(self) -> None:
        """A checkpoint of this moment; on a full disk the earlier ones stay and training goes on."""
        if self.accelerator.is_main_process:
            try:
                path = checkpoint.write_checkpoint(self.folder.checkpoints, self.state.step, self._write_files)
            except OSError as error:
                logger.error("the checkpoint of step %d could not be written: %s", self.state.step, error)
                if self.stop_agreed or self.state.step >= self.state.goal_steps:
                    raise UserError(
                        f"the checkpoint of step {self.state.step} could not be written ({error}); make room on the "
                        f"disk of {self.folder.path} and type the command again: it goes on from the one before"
                    ) from error
            else:
                if self.state.best_step == self.state.step or not (self.folder.checkpoints / "best").exists():
                    checkpoint.link(self.folder.checkpoints, "best", path)
                checkpoint.prune(self.folder.checkpoints, self.config.checkpoints_total_limit)
                self.exporter.checkpoint_saved(path)
        self.accelerator.wait_for_everyone()

    def _write_files(self, folder: Path) -> None:
        with evaluating(self._modules(), self.ema):
            self.stage.pipeline().save_pretrained(folder / "pipeline")
        for runner in self.runners:
            runner.save(folder)
        if self.ema is not None:
            checkpoint.save_tensors(self.ema.state_dict(), folder / "ema.safetensors")
        if self.accelerator.scaler is not None:
            checkpoint.save_json(self.accelerator.scaler.state_dict(), folder / "scaler.json")
        checkpoint.save_json(self.state.to_json(), folder / "trainer_state.json")

    # --- small things ----------------------------------------------------------------------------------------------

    def _stop_in_events(self) -> None:
        self.stop_agreed = True
        self._save()

    def _report_nonfinite(self, runner: PhaseRunner, outcome: StepOutcome) -> None:
        sampler = self._sampler(0, 1)
        rows = [k.index for m in outcome.bad_micro_batches for k in sampler.keys(self.state.step, m)]
        everywhere = sorted({row for share in gather(self.accelerator, rows) for row in share})
        logger.warning(
            "step %d: the loss or gradient of '%s' is not finite; the update is skipped. Rows of its batch: %s",
            self.state.step + 1,
            runner.phase.name,
            ", ".join(map(str, everywhere[:64])) + (" …" if len(everywhere) > 64 else ""),
        )

    def _count_skipped(self) -> None:
        state = self.state
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise UserError(
                f"{state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite (the last at step "
                f"{state.step}); the last good checkpoint is untouched in {self.folder.checkpoints}. Lower "
                "--learning_rate, use --mixed_precision bf16 or no, or look at the rows named above"
            )

    def _record(self) -> dict[str, Any]:
        """The run's own record: what the card and the trackers' summary are made from."""
        state = self.state
        return {
            "stage": self.stage.name,
            "steps": state.step,
            "epochs": round(state.step / self.steps_per_epoch, 2),
            "images_seen": state.images_seen,
            "num_train_images": len(self.data),
            "global_batch_size": self.layout.global_batch_size,
            "elapsed_seconds": round(state.elapsed_seconds, 1),
            "skipped_steps": state.skipped_steps,
            "trained_parameters": self.trained_parameters,
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
            "hardware": f"{self.accelerator.num_processes} × {self.accelerator.device.type}",
            "metrics": state.last_validation,
            "best": {"metric": self.stage.best_metric, "value": state.best_value, "step": state.best_step},
        }

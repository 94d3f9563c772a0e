"""Everything that a run trains, counts and saves, built from a stage and a config before a checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from training.core.draws import NEWEST
from training.core.layout import BatchLayout, steps_per_epoch
from training.core.memory import peak_memory_mib
from training.core.stage import Stage
from training.engine.balance import balanced_strata
from training.engine.ema import EMA, EMA_FILE
from training.engine.launch import device_name, shards_weights
from training.engine.loading import MicroBatches
from training.engine.phase_runner import PhaseRunner
from training.engine.run_config import RunConfig
from training.engine.schedule import MOST_WARMUP
from training.engine.sharding import check_shardable
from training.engine.validation import evaluating
from training.run.checkpoint import Contents, load_json, load_tensors, save_contents
from training.run.state import RunState

if TYPE_CHECKING:
    from accelerate import Accelerator


class CheckpointPart(Protocol):
    """Part of a checkpoint: `contents` returns its files, and `load` restores it exactly from a checkpoint's folder."""

    def contents(self) -> Contents: ...

    def load(self, folder: Path) -> None: ...


class Training:
    """The stage on its device, with its data, optimizers, EMA weights and counters.

    Args:
        layout: the split of the global batch; by default that of the flags.
    """

    def __init__(self, stage: Stage, config: RunConfig, accelerator: Accelerator, layout: BatchLayout | None = None):
        self.stage = stage
        self.device = accelerator.device
        self.num_processes = accelerator.num_processes
        data = stage.train_data()
        self.layout = layout or BatchLayout(
            config.train_batch_size,
            accelerator.num_processes,
            config.gradient_accumulation_steps,
            accelerator.process_index,
        )
        self.num_images = len(data)
        self.steps_per_epoch = steps_per_epoch(len(data), self.layout, getattr(data, "batch_groups", None))
        self.batches = MicroBatches(
            data,
            self.layout,
            seed=config.seed,
            strata=balanced_strata(data, config),
            num_workers=config.dataloader_num_workers,
            device=accelerator.device,
        )
        self.state = RunState(
            global_batch_size=self.layout.global_batch_size,
            num_samples=len(data),
            most_warmup=MOST_WARMUP,
            draws_version=NEWEST,
        )
        _freeze(stage, accelerator.device)
        sharded = shards_weights()
        if sharded:
            check_shardable(stage, config, accelerator)
        self.runners = [
            PhaseRunner(
                phase,
                config,
                accelerator,
                self.layout,
                seed=config.seed,
                state=self.state,
                prefix="" if i == 0 else f"{phase.name}_",
                sharded=sharded,
                frozen=stage.frozen,
            )
            for i, phase in enumerate(stage.phases)
        ]
        self.shards = self.runners[0].shards
        settings = (config.ema_decay, config.ema_update_every, self.shards)
        self.ema = EMA(stage.ema_of, *settings) if config.use_ema else None
        # Everything that checkpoints save and restore. Any other state is lost when the process ends.
        self.checkpoint_parts: list[CheckpointPart] = [self.state, *self.runners]
        if self.ema is not None:
            self.checkpoint_parts.append(self.ema)
        if accelerator.scaler is not None:
            self.checkpoint_parts.append(ScalerPart(accelerator.scaler))
        self._is_main = accelerator.is_main_process
        self._gathered: Contents | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that are put into eval mode and get their EMA weights during evaluation."""
        return [*self.stage.phases, *self.stage.ema_of.values()]

    @property
    def trained_parameters(self) -> int:
        return sum(runner.trained_parameters for runner in self.runners)

    def divide_batches(self, layout: BatchLayout) -> None:
        """Use another split of the same global batch from the next call of `batches.steps` on."""
        self.layout = self.batches.layout = layout
        for runner in self.runners:
            runner.divide(layout)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Give the modules of the stage their EMA weights, eval mode and no gradients inside the block.

        Every process enters it at the same time, because sharded weights are put together for it.
        """
        if self.shards is None:
            with evaluating(self.modules, self.ema):
                yield
            return
        value_of = (lambda tensor: tensor) if self.ema is None else self.ema.average_of
        with evaluating(self.modules, None), self.shards.filled(value_of):
            yield

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Put together what a checkpoint contains on the main process, if weights are sharded.

        Every process enters it at the same time. Outside of it, sharded weights cannot be saved.
        """
        if self.shards is None:
            yield
            return
        contents: Contents = {}
        for part in self.checkpoint_parts:
            if isinstance(part, PhaseRunner | EMA):
                contents |= part.contents(self._keep)
            else:
                contents |= part.contents()
        self._gathered = contents
        try:
            yield
        finally:
            self._gathered = None

    def _keep(self, tensor: Tensor) -> Tensor:
        """Return a whole tensor in the memory of the main process; the others give it up at once."""
        return tensor.detach().to("cpu", copy=True) if self._is_main else tensor.new_empty(0)

    def contents(self) -> Contents:
        """Return what a checkpoint contains besides the pipeline. The weights are the tensors in use, not copies."""
        if self._gathered is not None:
            return self._gathered
        return {name: content for part in self.checkpoint_parts for name, content in part.contents().items()}

    def write_files(self, folder: Path, held: Contents | None = None) -> None:
        """Write what a checkpoint contains into `folder`: the pipeline with the EMA weights, and every part.

        Args:
            held: copy of the contents of an earlier step, whose checkpoint is written; None for the current state.
        """
        # The pipeline is a function of the weights: a resumed run has nothing else to make it from.
        if self.shards is not None:
            self._write_sharded(folder, held or self.contents())
            return
        with nullcontext() if held is None else self._weights_of(held), evaluating(self.modules, self.ema):
            self.stage.save_pipeline(folder / "pipeline")
        save_contents(self.contents() if held is None else held, folder)

    def _write_sharded(self, folder: Path, contents: Contents) -> None:
        assert self.shards is not None
        with evaluating(self.modules, None), self.shards.filled_with(self._whole_weights(contents)):
            self.stage.save_pipeline(folder / "pipeline")
        save_contents(contents, folder)

    def _whole_weights(self, contents: Contents) -> dict[str, Tensor]:
        """Return the weights of the sharded phase in a checkpoint, by name: its EMA weights, where it has any."""
        assert self.shards is not None
        weights = {**contents[self.runners[0].weights_file]}
        if self.ema is not None:
            names = {id(part): name for name, part in self.shards.parts.items()}
            parts = {name: id(part) for name, part in self.shards.named_weights(self.stage.ema_of).items()}
            weights |= {names[parts[n]]: mean for n, mean in contents[EMA_FILE].items() if parts[n] in names}
        return weights

    @contextmanager
    def _weights_of(self, held: Contents) -> Iterator[None]:
        """Give the phases and the EMA the weights in `held` inside the block; meanwhile, `held` has the current ones.

        As values are exchanged, both are exactly the same as before after the block, and no second copy is needed.
        """
        weights = {runner.weights_file: runner.phase.state_dict() for runner in self.runners}
        if self.ema is not None:
            weights[EMA_FILE] = self.ema.state_dict()
        pairs = [(tensor, held[file][name]) for file, tensors in weights.items() for name, tensor in tensors.items()]
        _exchange(pairs)
        try:
            yield
        finally:
            # Tied weights are one tensor with two names, so the last exchange is undone first.
            _exchange(reversed(pairs))

    @torch.no_grad()
    def diverged_modules(self) -> list[str]:
        """Return the names of the phases with weights that are not finite, and "the EMA" if its weights are not."""
        if self._gathered is not None:
            files = {runner.phase.name: runner.weights_file for runner in self.runners}
            files |= {} if self.ema is None else {"the EMA": EMA_FILE}
            groups = {name: [*self._gathered[file].values()] for name, file in files.items()}
            return [name for name, tensors in groups.items() if not _all_finite(tensors)]
        groups = {runner.phase.name: [*runner.phase.state_dict().values()] for runner in self.runners}
        if self.ema is not None:
            groups["the EMA"] = [*self.ema.state_dict().values()]
        return [name for name, tensors in groups.items() if not _all_finite(tensors)]

    def checkpoint_bytes(self) -> int:
        """Estimate the size of a checkpoint: phases, EMA weights, and a pipeline with its frozen components."""
        size = sum(runner.checkpoint_bytes() for runner in self.runners)
        size += 2 * sum(p.numel() * p.element_size() for m in self.stage.ema_of.values() for p in m.parameters())
        return size + sum(p.numel() * p.element_size() for m in self.stage.frozen for p in m.parameters())

    def load_best(self, checkpoint: Path) -> None:
        """Load the weights with the best validation metric, to export a run that stopped early.

        It is called inside `evaluating`.
        """
        self.state.last_validation = self.state.best_validation or self.state.last_validation
        self.state.last_evaluation = self.state.best_evaluation or self.state.last_evaluation
        if self.shards is not None:
            files = [self.runners[0].weights_file, *([EMA_FILE] if self.ema is not None else [])]
            whole = self._whole_weights({file: load_tensors(checkpoint / file) for file in files})
            self.shards.fill_with(whole)
            return
        if self.ema is not None:
            self.ema.load_live(checkpoint)
            return
        for runner in self.runners:
            runner.load_weights(checkpoint)

    def record(self) -> dict[str, Any]:
        """Return the results and settings of the run for record.json, the model card and the trackers' summary."""
        state, validation_data = self.state, self.stage.validation_data()
        return {
            "stage": self.stage.name,
            "steps": state.step,
            "epochs": round(state.step / self.steps_per_epoch, 2),
            "images_seen": state.images_seen,
            "num_train_images": self.num_images,
            "num_validation_images": len(validation_data) if validation_data is not None else None,
            "global_batch_size": self.layout.global_batch_size,
            "elapsed_seconds": round(state.elapsed_seconds, 1),
            "skipped_steps": state.skipped_steps,
            "trained_parameters": self.trained_parameters,
            "peak_memory_mib": peak_memory_mib(self.device),
            "hardware": f"{self.num_processes} × {device_name(self.device)}",
            "device_type": self.device.type,
            "num_processes": self.num_processes,
            "metrics": {**state.last_validation, **state.last_evaluation},
            "best": {
                "metric": state.best_metric or self.stage.best_metric,
                "value": state.best_value,
                "step": state.best_step,
            },
        }


def _freeze(stage: Stage, device: torch.device) -> None:
    """Freeze the models that no phase trains, and put them on the device."""
    trained = {parameter for phase in stage.phases for parameter in phase.parameters()}
    for module in stage.frozen:
        # A frozen model may have an adapter, whose parameters a phase trains.
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter in trained)
        module.eval().to(device)


@torch.no_grad()
def _exchange(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Exchange the values of the tensors of each pair, which may be on different devices."""
    for one, other in pairs:
        kept = one.detach().clone()
        one.copy_(other)
        other.copy_(kept)


def _all_finite(tensors: list[Tensor]) -> bool:
    """Return whether all values are finite; computed on the device, with a single exchange with it."""
    finite = [torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point()]
    return not finite or bool(torch.stack(finite).all())


class ScalerPart:
    """The gradient scaler of fp16 in a checkpoint. A checkpoint without one leaves the scaler unchanged."""

    FILE = "scaler.json"

    def __init__(self, scaler: Any):
        self._scaler = scaler

    def contents(self) -> Contents:
        return {self.FILE: self._scaler.state_dict()}

    def load(self, folder: Path) -> None:
        if (folder / self.FILE).is_file():
            self._scaler.load_state_dict(load_json(folder / self.FILE))

"""Runs one phase: device, DDP or FSDP2, autocast, compilation, gradient accumulation and optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.tools.cli import one_line
from training.core.draws import Draws, mix
from training.core.layout import BatchLayout
from training.core.memory import is_out_of_memory
from training.core.options import option
from training.core.stage import Batch, Phase
from training.engine import optimizers
from training.engine.optimizers import OptimizerConfig
from training.engine.sharding import Shards
from training.engine.step_draws import StepDraws
from training.engine.step_values import Requests, StepOutcome
from training.run import checkpoint
from training.run.state import RunState

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class PhaseConfig(OptimizerConfig):
    """Options for running and optimizing each phase."""

    compile: bool = option(False, on_resume="warn")
    """Compile the model and its loss with torch.compile"""
    gradient_checkpointing: bool = option(False, on_resume="warn")
    """Recompute activations in the backward pass, which saves memory and takes more time"""


class MemoryFull(Exception):
    """The memory ran out in the forward or backward pass of a phase; nothing was changed but its gradients.

    It is raised without the error that it is made from, whose traceback would hold the tensors of the attempt.

    Args:
        reason: the message of the allocator.
        batch: the shapes of the tensors of the micro-batch.
    """

    def __init__(self, phase: str, reason: str, batch: str):
        super().__init__(phase, reason, batch)
        self.phase, self.reason, self.batch = phase, reason, batch


class PhaseRunner:
    """Forward, backward, checks, clipping and optimizer step of one phase.

    Args:
        state: the counters of the run; its checkpoint may record an earlier version of the draws.
        prefix: prefix of the names of the phase's metrics; empty for the first phase.
        sharded: whether each process trains a part of every weight (FSDP2), and not all of them (DDP).
        frozen: modules that no phase trains, which are never sharded.
    """

    def __init__(
        self,
        phase: Phase,
        config: PhaseConfig,
        accelerator: Accelerator,
        layout: BatchLayout,
        *,
        seed: int,
        state: RunState,
        prefix: str = "",
        sharded: bool = False,
        frozen: Sequence[nn.Module] = (),
    ):
        self.phase = phase
        self.config = config
        self.seed, self.state = seed, state
        self.accelerator = accelerator
        self.layout = layout
        self.prefix = prefix
        self.learning_rate = phase.learning_rate or config.learning_rate
        self._draws = StepDraws(seed, state, layout, accelerator.device, compiled=config.compile)
        if config.gradient_checkpointing:
            _enable_gradient_checkpointing(phase)
        # A sharded phase may be too large for one device: only its parts are put there.
        self.shards = Shards(phase, frozen, accelerator) if sharded else None
        if self.shards is None:
            phase.to(accelerator.device)
        # What the optimizer changes: the weights of the phase, or this process's parts of them.
        own: Iterable[nn.Parameter] = phase.parameters() if self.shards is None else self.shards.parts.values()
        self.parameters = [p for p in own if p.requires_grad]
        optimizer = optimizers.build_optimizer(config, self.parameters, self.learning_rate)
        if config.compile:
            phase.compile()  # in place, without a wrapper, so that saved names have no `_orig_mod.`
        # Accelerate replaces the phase's `forward` by one with autocast; the phase itself is still what is saved.
        with warnings.catch_warnings():
            # Newer versions of torch rename `broadcast_buffers`, and warn.
            warnings.simplefilter("ignore", category=FutureWarning)
            self.wrapped = accelerator.prepare_model(phase) if self.shards is None else self.shards.module
        self.optimizer = accelerator.prepare_optimizer(optimizer)

    def settle_buckets(self, batch: Batch, draws: Draws) -> None:
        """Run two backward passes and discard their gradients; under DDP with several processes only.

        DDP rearranges its gradient buckets after the first backward pass, which changes the order of summation. A
        resumed run would do this at another step than an uninterrupted one, and their results would differ in the last
        bits (seen with three or more processes).
        """
        if self.wrapped is self.phase or self.shards is not None or self.accelerator.num_processes == 1:
            return
        for _ in range(2):
            loss, _ = self.wrapped(batch, draws)
            loss.backward()
        self.optimizer.zero_grad()

    def divide(self, layout: BatchLayout) -> None:
        """Use another split of the same global batch from the next step on."""
        self.layout = layout
        self._draws.divide(layout)

    def try_step(self, batch: Batch, draws: Draws) -> MemoryFull | None:
        """Run a forward and a backward pass and discard their gradients; return whether the memory ran out.

        No gradients are exchanged, so it may run out on some processes only. A sharded phase cannot be tried in this
        way, as its weights are exchanged in every pass.
        """
        if self.shards is not None:
            return None

        def attempt() -> None:
            with self.accelerator.no_sync(self.wrapped):
                loss, _ = self.wrapped(batch, draws)
                self.accelerator.backward(loss)

        full = self._within_memory(attempt, batch)
        self.zero_grad()
        return full

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        if self.shards is not None:
            self.shards.zero_grad()

    def _within_memory(self, attempt: Callable[[], None], batch: Batch) -> MemoryFull | None:
        """Call `attempt`; return whether the memory ran out in it."""
        try:
            attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return MemoryFull(self.phase.name, one_line(error, 200), _shapes_of(batch))
        return None

    @property
    def waits(self) -> bool:
        """Whether this process has to read the gradient norm in each step, before the optimizer.

        It need not if the optimizer itself can leave out a step. Runs of earlier versions go on as they began, and the
        scaler of fp16 reads whether there is an overflow.
        """
        return (
            self.state.draws_version == 1
            or self.accelerator.scaler is not None
            or not optimizers.can_leave_out_steps(self.optimizer)
        )

    def step(self, step: int, batches: Sequence[Batch], learning_rate: float, requests: Requests) -> StepOutcome:
        """Make one optimizer step; if a loss or gradient is not finite on any process, change nothing.

        Args:
            step: number of the step (from 0) in the run.
            batches: the micro-batches of this process.
            requests: what this process asks for; the values of the outcome tell what any process asks for.

        Raises:
            MemoryFull: the memory of this process does not suffice for one of the micro-batches.
        """
        # Before the step, not after it: another phase's backward pass may have left gradients in these parameters.
        self.zero_grad()
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        full = self._within_memory(lambda: self._accumulate(step, batches, losses, metrics), batches[0])
        if full is not None:
            raise full
        if self.shards is not None:
            self.shards.take_gradients()
        gradient_norm = self._gradient_norm()
        names, row = self._reduce(losses, metrics, gradient_norm, requests)
        outcome = StepOutcome(names, row, torch.isfinite(torch.stack(losses)), True, requests)
        if self.waits:
            self._step_after_reading(outcome, gradient_norm, learning_rate)
            return outcome
        loss, norm = row[0], row[len(names) - 1]
        outcome.taken = torch.isfinite(loss) & torch.isfinite(norm)
        optimizers.set_learning_rate(self.optimizer, learning_rate)
        most = self.config.max_grad_norm
        clipped = norm > optimizers.float32_up_to(most) if most else None
        optimizers.step_if(outcome.taken, self.optimizer, self.parameters, gradient_norm, clipped, most)
        return outcome

    def _step_after_reading(self, outcome: StepOutcome, gradient_norm: Tensor, learning_rate: float) -> None:
        values = dict(zip(outcome.names, outcome.row.tolist(), strict=False))
        loss, norm = values[f"{self.prefix}loss"], values[f"{self.prefix}grad_norm"]
        scaler = self.accelerator.scaler
        # An fp16 overflow affects the gradient only; the scaler then skips the step and lowers its scale.
        finite = math.isfinite(loss) and (math.isfinite(norm) or (scaler is not None and scaler.get_scale() >= 1))
        outcome.taken = finite
        if finite:
            optimizers.set_learning_rate(self.optimizer, learning_rate)
            if self.config.max_grad_norm and norm > self.config.max_grad_norm:
                optimizers.clipped_step(self.optimizer, self.parameters, gradient_norm, self.config.max_grad_norm)
            else:
                self.optimizer.step()
        elif scaler is not None:
            scaler.update()
        if scaler is not None:
            outcome.known[f"{self.prefix}grad_scale"] = scaler.get_scale()

    def _accumulate(
        self, step: int, batches: Sequence[Batch], losses: list[Tensor], metrics: dict[str, Tensor]
    ) -> None:
        """Add the gradients of the micro-batches; append their losses, and add up the means of their metrics."""
        for micro_batch, batch in enumerate(batches):
            positions = self.layout.positions(micro_batch)
            # Dropout in models uses the global generator, whose state data loaders and previews change.
            torch.manual_seed(mix(self.seed, "model", step, positions[0], self.phase.name))
            draws = self._draws.at(step, micro_batch)
            last = micro_batch == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss, values = self.wrapped(batch, draws)
                self._draws.prepare(step + 1, micro_batch, draws.asked)
                self.accelerator.backward(loss / len(batches))
            losses.append(loss.detach())
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0) + value.detach() / len(batches)  # type: ignore[assignment]

    def _gradient_norm(self) -> Tensor:
        """Return the global norm of the gradients, without the scale of fp16."""
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.shards is None:
            return norm
        return self.accelerator.reduce(norm.to(self.accelerator.device).square(), reduction="sum").sqrt()

    def _reduce(
        self, losses: list[Tensor], metrics: dict[str, Tensor], gradient_norm: Tensor, requests: Requests
    ) -> tuple[list[str], Tensor]:
        """Average metric values over the processes; return their names, and `StepOutcome.row`.

        The requests are part of the same exchange. A value that is NaN on any process is NaN on all of them.
        """
        loss = torch.stack(losses).mean()
        names = [f"{self.prefix}loss", *(self.prefix + n for n in metrics), f"{self.prefix}grad_norm"]
        row = torch.stack([v.float().reshape(()) for v in (loss, *metrics.values(), gradient_norm)])
        if self.accelerator.num_processes == 1:
            return names, row
        # `new_tensor` would copy from this process's memory to a GPU, and wait for that.
        told = [row.new_full((1,), float(value)) for value in (requests.stop, requests.save, requests.seconds)]
        return names, self.accelerator.reduce(torch.cat([row, *told]), reduction="mean")

    @property
    def weights_file(self) -> str:
        """Name of the file with the phase's weights in a checkpoint."""
        return f"phase_{self.phase.name}.safetensors"

    def contents(self, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> checkpoint.Contents:
        """Return what a checkpoint contains of the phase: its weights, and the state of its optimizer.

        If the phase is sharded, every process calls it, and `keep` returns what is kept of each whole tensor.
        """
        tensors, rest = optimizers.flatten_optimizer(self.optimizer)
        weights = self.phase.state_dict() if self.shards is None else self.shards.state_dict(keep)
        if self.shards is not None:
            whole = self.shards.whole
            tensors = self._of_optimizer(tensors, lambda part, state: keep(whole(part, state)))
        return {
            self.weights_file: weights,
            f"optimizer_{self.phase.name}.safetensors": tensors,
            f"optimizer_{self.phase.name}.json": rest,
        }

    def _of_optimizer(
        self, tensors: dict[str, Tensor], change: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Call `change(part, state)` for the states of a sharded optimizer; numbers such as its step are whole."""
        return {
            key: change(self.parameters[int(key.split("/", 1)[0])], state) if state.ndim else state
            for key, state in tensors.items()
        }

    def load_weights(self, folder: Path) -> None:
        """Load the phase's weights from a checkpoint, without its optimizer."""
        (self.phase if self.shards is None else self.shards).load_state_dict(
            checkpoint.load_tensors(folder / self.weights_file)
        )

    def load(self, folder: Path) -> None:
        self.load_weights(folder)
        tensors = checkpoint.load_tensors(folder / f"optimizer_{self.phase.name}.safetensors")
        if self.shards is not None:
            tensors = self._of_optimizer(tensors, self.shards.part_of)
        rest = checkpoint.load_json(folder / f"optimizer_{self.phase.name}.json")
        optimizers.unflatten_optimizer(self.optimizer, tensors, rest)

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that the phase trains, on all processes together."""
        return sum(p.numel() for p in self.phase.parameters() if p.requires_grad)

    def checkpoint_bytes(self) -> int:
        """Return the size of the phase in a checkpoint: its weights, and two moments for each trained weight."""
        weights = sum(t.numel() * t.element_size() for t in self.phase.state_dict().values())
        return weights + 2 * sum(p.numel() * p.element_size() for p in self.phase.parameters() if p.requires_grad)


def _shapes_of(batch: Batch) -> str:
    """Return the shapes of the images, latents and so on of a micro-batch, such as "image 16×3×64×64"."""
    shapes = {name: value.shape for name, value in batch.items() if isinstance(value, Tensor) and value.ndim > 1}
    return ", ".join(f"{name.replace('_', ' ')} {'×'.join(map(str, shape))}" for name, shape in shapes.items())


def _enable_gradient_checkpointing(phase: Phase) -> None:
    for module in phase.modules():
        # Diffusers' models have the first method and Transformers' the second. Diffusers' raises an error in models
        # that do not support it, hence the check.
        if hasattr(module, "enable_gradient_checkpointing") and getattr(
            module, "_supports_gradient_checkpointing", False
        ):
            module.enable_gradient_checkpointing()
        elif hasattr(module, "gradient_checkpointing_enable"):
            module.gradient_checkpointing_enable()

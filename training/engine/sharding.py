"""FSDP2: each process holds and trains a part of every weight. This module is the only place that knows how.

A copy of the phase is trained, whose weights `fully_shard` divides among the processes; a process's parts are ordinary
tensors for its optimizer and its EMA weights. The phase itself and the modules of the stage stay what validation,
previews, pipelines and checkpoints use: their weights are on the device `meta`, and are filled with whole tensors where
they are needed. Therefore nothing else of a stage or of the loop is different.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines.tools.cli import UserError
from training.core.stage import Phase, Stage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.engine.phase_runner import PhaseConfig


class Shards:
    """The copy of a phase that is trained, and the parts of its weights that this process holds.

    Args:
        phase: with the whole initial weights, not on its device yet; afterwards it has none (see `filled`).
        frozen: modules that no phase trains; the copy uses the same ones.

    Attributes:
        module: the sharded copy, which is called instead of the phase.
        parts: this process's part of each weight, by its name in the phase. Optimizers and EMA weights may change them.
    """

    def __init__(self, phase: Phase, frozen: Sequence[nn.Module], accelerator: Accelerator):
        self.phase = phase
        borrowed = [value for value in vars(phase).values() if isinstance(value, nn.Module)]
        memo: dict[int, Any] = {id(module): module for module in [*frozen, *borrowed]}
        self.module: Any = copy.deepcopy(phase, memo)
        # Only for the autocast: it would put the whole copy on the device, and wrap it with DDP.
        prepared = accelerator.prepare_model(self.module, device_placement=False, evaluation_mode=True)
        _divide(prepared, accelerator)
        self._weights: dict[str, Any] = dict(self.module.named_parameters())
        self.parts = {
            name: nn.Parameter(weight.to_local().detach(), requires_grad=weight.requires_grad)
            for name, weight in self._weights.items()
        }
        self._weight_of = {id(part): self._weights[name] for name, part in self.parts.items()}
        self._places = self._empty(accelerator.device)

    def _empty(self, device: torch.device) -> list[tuple[nn.Module, str, str]]:
        """Take the weights from the phase; return each place of one (its module and attribute), and its name there.

        Buffers are small and stay, on the device.
        """
        first_names = {id(parameter): name for name, parameter in self.phase.named_parameters()}
        places = []
        for module in self.phase.modules():
            for attribute, buffer in module._buffers.items():
                module._buffers[attribute] = None if buffer is None else buffer.to(device)
            for attribute, parameter in module._parameters.items():
                if parameter is not None:  # tied weights have several places, and one name
                    places.append((module, attribute, first_names[id(parameter)]))
                    module._parameters[attribute] = nn.Parameter(
                        torch.empty_like(parameter, device="meta"), parameter.requires_grad
                    )
        return places

    def take_gradients(self) -> None:
        """Give the parts the gradients of the last backward pass, which are averaged over the processes."""
        for name, weight in self._weights.items():
            self.parts[name].grad = None if weight.grad is None else weight.grad.to_local()

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def has(self, part: Tensor) -> bool:
        """Return whether a tensor is one of `parts`."""
        return id(part) in self._weight_of

    def whole(self, part: Tensor, value: Tensor) -> Tensor:
        """Return a whole tensor, of which every process has a `value` of the size of a part, such as its EMA.

        Every process calls it, for the same tensors in the same order.
        """
        from torch.distributed.tensor import DTensor

        weight = self._weight_of[id(part)]
        tensor = DTensor.from_local(
            value.detach(), weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
        )
        return tensor.full_tensor()

    def part_of(self, part: Tensor, whole: Tensor) -> Tensor:
        """Return what this process has of a whole tensor, which has the size of the weight of a part."""
        from torch.distributed.tensor import distribute_tensor

        weight = self._weight_of[id(part)]
        whole = whole.to(weight.device)
        # Every process has the whole tensor, so none has to send it.
        return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None).to_local()

    def state_dict(self, keep: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the whole state dict of the phase; every process calls it.

        Args:
            keep: called with each tensor as soon as it is whole; what it returns is kept.
        """
        state = self.module.state_dict()
        return {
            name: keep(value.full_tensor() if _is_sharded(value) else value)  # type: ignore[attr-defined]
            for name, value in state.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a whole state dict. Raises RuntimeError if it is of another model."""
        own = self.module.state_dict()
        shapes = {name: value.shape for name, value in own.items()}
        if shapes != {name: value.shape for name, value in state.items()}:
            raise RuntimeError(f"other weights than those of {type(self.phase).__name__}")
        for name, value in own.items():
            if name in self._weights:
                self.parts[name].copy_(self.part_of(self.parts[name], state[name]))
            elif not _is_sharded(value):
                value.copy_(state[name])

    def named_weights(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Return the parts and buffers of modules inside the phase, by the names that they have there with a prefix."""
        paths = {id(module): path for path, module in self.phase.named_modules()}
        named: dict[str, Tensor] = {}
        for prefix, module in modules.items():
            path = paths.get(id(module))
            inside = module if path is None else self.module.get_submodule(path)
            for name, tensor in [*inside.named_parameters(), *inside.named_buffers()]:
                full_name = f"{path}.{name}" if path else name
                named[f"{prefix}.{name}"] = self.parts.get(full_name, tensor) if path is not None else tensor
        return named

    @contextmanager
    def filled(self, value_of: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Give the phase whole weights inside the block; every process enters it.

        Args:
            value_of: returns this process's part of the value to use for a part, such as that of the EMA weights.
        """
        values = {name: self.whole(part, value_of(part)) for name, part in self.parts.items()}
        buffers = dict(self.phase.named_buffers())
        for name, buffer in self.module.named_buffers():
            buffers[name].copy_(value_of(buffer))
        with self.filled_with(values):
            yield

    @contextmanager
    def filled_with(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the phase the whole weights `values` inside the block, by their names."""
        empty = [module._parameters[attribute] for module, attribute, _ in self._places]
        self.fill_with(values)
        try:
            yield
        finally:
            for (module, attribute, _), parameter in zip(self._places, empty, strict=True):
                module._parameters[attribute] = parameter

    def fill_with(self, values: Mapping[str, Tensor]) -> None:
        """Give the phase other whole weights, inside of `filled` or `filled_with`."""
        device = next(iter(self.parts.values())).device
        made: dict[str, nn.Parameter] = {}
        for module, attribute, name in self._places:
            if name not in made:
                made[name] = nn.Parameter(values[name].detach().to(device), self.parts[name].requires_grad)
            module._parameters[attribute] = made[name]


def _divide(module: nn.Module, accelerator: Accelerator) -> None:
    """Shard a phase: each repeated block of a network is gathered when it is called, and the rest with the phase."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false"
    for block in _blocks(module):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of the outermost lists of a network that have weights, such as the levels of a U-Net."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child.children() if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def _is_sharded(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def check_shardable(stage: Stage, config: PhaseConfig, accelerator: Accelerator) -> None:
    """Raise UserError for what FSDP2 cannot be combined with."""
    instead = "use configs/accelerate/multi_gpu.yaml (DDP) instead"
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise UserError(
            "FSDP2 needs a launcher that starts its processes; "
            "use: accelerate launch --config_file configs/accelerate/fsdp2.yaml training/train_X.py …"
        )
    if len(stage.phases) > 1:
        names = ", ".join(phase.name for phase in stage.phases)
        raise UserError(
            f"FSDP2 shards the weights of one phase, and this run has {len(stage.phases)} that use each other's "
            f"weights ({names}); {instead}"
        )
    trained = set(stage.phases[0].parameters())
    if any(parameter in trained for module in stage.frozen for parameter in module.parameters()):
        raise UserError(f"FSDP2 cannot shard an adapter inside of a frozen model (--lora_rank); {instead}")
    scalars = [name for name, parameter in stage.phases[0].named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UserError(f"FSDP2 cannot shard weights that are single numbers ({', '.join(scalars)}); {instead}")
    if config.optimizer == "adamw_8bit":
        raise UserError("FSDP2 cannot shard the states of --optimizer adamw_8bit; use adamw")
    if config.compile:
        raise UserError("FSDP2 and --compile true cannot be combined; leave one of them out")
    if accelerator.scaler is not None:
        raise UserError("FSDP2 and --mixed_precision fp16 cannot be combined; use bf16 or no")

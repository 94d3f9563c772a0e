"""Optimizers: building them, a step with gradient clipping, and their state as flat tensors for safetensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.tools.cli import UserError
from pipelines.tools.commands import install_command
from training.core.options import Options, option

OPTIMIZERS = ("adamw", "adamw_8bit", "adam", "sgd")


@dataclass
class OptimizerConfig(Options):
    """Options for the optimizers; every phase has its own."""

    learning_rate: float = option(1e-4, on_resume="warn", above=0, usual="1e-4", essential=True)
    """Peak learning rate"""
    optimizer: str = option("adamw", choices=OPTIMIZERS)
    """Optimizer: adamw, adamw_8bit (needs bitsandbytes), adam or sgd"""
    adam_beta1: float = option(0.9, on_resume="warn", at_least=0, below=1)
    """Adam's beta1, the decay rate of the first moment"""
    adam_beta2: float = option(0.999, on_resume="warn", at_least=0, below=1)
    """Adam's beta2, the decay rate of the second moment"""
    adam_epsilon: float = option(1e-8, on_resume="warn", at_least=0)
    """Adam's epsilon, added to the denominator for numerical stability"""
    weight_decay: float = option(0.01, on_resume="warn", at_least=0)
    """Weight decay of adamw, adamw_8bit and sgd"""
    max_grad_norm: float = option(1.0, on_resume="warn", at_least=0)
    """Maximum gradient norm for gradient clipping; 0 disables it"""


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter], learning_rate: float):
    """Build the optimizer of one phase. Raises UserError when it needs bitsandbytes, which is not installed."""
    parameters = list(parameters)
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adamw_8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise UserError(
                f"--optimizer adamw_8bit needs bitsandbytes: {install_command('cuda', 'bitsandbytes')}"
            ) from None
        return bitsandbytes.optim.AdamW8bit(
            parameters, lr=learning_rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
        )
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            betas=betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=config.weight_decay, foreach=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clipped_step(optimizer: Any, parameters: list[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale the gradients, whose global norm is `norm`, down to `max_norm`, and call `optimizer.step()`.

    Args:
        optimizer: an optimizer wrapped by Accelerate.
    """
    inner = optimizer.optimizer
    fused = getattr(inner, "_step_supports_amp_scaling", False) and norm.dtype == torch.float32
    if fused and optimizer.scaler is None:
        # Fused kernels divide by grad_scale (meant for a GradScaler) as they read: no extra pass over all gradients.
        inner.grad_scale = (norm + 1e-6) / max_norm  # the 1e-6 as in clip_grads_with_norm_
        try:
            optimizer.step()
        finally:
            del inner.grad_scale
        return
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    optimizer.step()


def can_leave_out_steps(optimizer: Any) -> bool:
    """Return whether an optimizer wrapped by Accelerate reads from a tensor on its device that it is to do nothing."""
    return bool(getattr(optimizer.optimizer, "_step_supports_amp_scaling", False))


def step_if(
    taken: Tensor,
    optimizer: Any,
    parameters: list[nn.Parameter],
    norm: Tensor,
    clipped: Tensor | None,
    max_norm: float,
) -> None:
    """Make an optimizer step where `taken` is true, without reading anything from the device.

    The weights get the same bits as by `clipped_step` where `clipped` is true, and by `optimizer.step()` elsewhere.

    Args:
        taken, clipped: scalars, bool; without `clipped`, gradients are not clipped.
        optimizer: an optimizer wrapped by Accelerate, for which `can_leave_out_steps` is true.
        norm: the global norm of the gradients.
    """
    inner = optimizer.optimizer
    # Fused kernels have both arguments for a GradScaler: they divide by grad_scale, and do nothing if found_inf is 1.
    inner.found_inf = (~taken).float()
    if clipped is not None and norm.dtype == torch.float32:
        inner.grad_scale = torch.where(clipped, (norm + 1e-6) / max_norm, 1.0)
    elif clipped is not None:
        factor = torch.where(clipped, (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
    try:
        optimizer.step()
    finally:
        del inner.found_inf
        if hasattr(inner, "grad_scale"):
            del inner.grad_scale


def float32_up_to(limit: float) -> float:
    """Return the largest float32 number that is not above `limit`.

    A float32 number is above `limit` if it is above this one, which PyTorch compares it with without rounding.
    """
    nearest = np.float32(limit)
    return float(nearest if float(nearest) <= limit else np.nextafter(nearest, np.float32("-inf")))


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as named tensors, and the rest as JSON values; the inverse is `unflatten_optimizer`.

    Names are paths such as `0/exp_avg`; they are longer for bitsandbytes, which nests its quantized states.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}

    def put(prefix: str, values: Mapping[Any, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                put(f"{prefix}{name}/", value)
            elif isinstance(value, Tensor):
                # bitsandbytes shares its quantization maps between parameters; safetensors does not save shared memory.
                tensors[f"{prefix}{name}"] = value.detach().clone().contiguous()
            else:
                scalars[f"{prefix}{name}"] = value

    put("", state["state"])
    return tensors, {"scalars": scalars, "param_groups": state["param_groups"]}


def unflatten_optimizer(optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Load the state in the results of `flatten_optimizer`; the settings of `optimizer` stay as they are.

    Raises:
        ValueError: they are of another model or optimizer.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["scalars"].items()]:
        index, *path, name = key.split("/")
        place = state.setdefault(int(index), {})
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    # Betas, weight decay and so on are those of this session, which may have changed them.
    own = optimizer.state_dict()["param_groups"]
    groups = [{**ours, "params": saved["params"]} for ours, saved in zip(own, rest["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})

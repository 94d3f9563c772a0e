"""LoRA: small trained matrices beside the frozen weights of a model (Hu et al. 2022, Low-Rank Adaptation).

A layer with the weight W (O × I) then computes W + alpha / rank · B A, with A (rank × I) and B (O × rank). B begins at
zero, so that the model begins as it was. PEFT adds the layers; this module says where, and keeps their weights apart
from those of the model, so that checkpoints, EMA weights and optimizers contain the adapter alone.

A stage passes the models to `Phase.borrow`, makes the adapter an attribute of the phase, names it in `ema_of`, and
lists the models in `frozen`. Its pipeline has `fused` copies of the models.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.tools.cli import UserError
from pipelines.tools.commands import install_command
from training.core.options import Options, option
from training.run.checkpoint import load_tensors

ADAPTER_NAME = "default"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"  # as in Diffusers
# The layers of the U-Net of Diffusers, of PatchTransformer2DModel, of DesignBriefEncoder, and of text encoders of
# Transformers.
TARGETS = {
    "attention": r"to_[qkv]|to_out(\.0)?|to_qkv|to_text_kv|[qkv]_proj|out_proj",
    "feed_forward": r"ff\.net\.(0\.proj|2)|blocks\.\d+\.(into|out_of)|fc[12]",
    "conditioning": r"modulation(_out)?|time_emb_proj|(time|add|text|class)_embedding\..*"
    r"|numbers\.\d+|color|mlp\.\d+|whole\.\d+",
    "convolutions": r"conv_in|conv_out|conv\d?|conv_shortcut|convolutions\..*",
    "all": r".*",
}


@dataclass
class LoRAConfig(Options):
    """Options for training a LoRA adapter instead of the whole model."""

    lora_rank: int = option(0, at_least=0, usual="8")
    """Train a LoRA adapter of this rank for the model of --init_from, whose own weights stay as they are; 0 trains all
    weights"""
    lora_alpha: float | None = option(None, above=0)
    """Scale of the adapter, which is multiplied by lora_alpha / lora_rank; if unset, lora_rank"""
    lora_targets: list[str] = option(["attention"], choices=tuple(TARGETS))
    """Layers that the adapter changes: attention (its projections), feed_forward, conditioning (what the timestep and
    the condition enter through), convolutions or all"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.lora_alpha is not None and not self.lora_rank:
            raise UserError(f"--lora_alpha {self.lora_alpha:g} has no effect without --lora_rank; add --lora_rank 8")


class LoRAAdapter(nn.Module):
    """Adds LoRA layers to models in place, and contains their weights and nothing else.

    The names in its `state_dict` are those of Diffusers, such as `unet.mid_block.….to_q.lora_A.weight`.

    Args:
        models: the models by their names in the pipeline; all of their own weights are frozen.
        config: rank, alpha and layers.
        seed: seed of the initial weights.

    Raises:
        UserError: PEFT is not installed, or none of the models has such layers.
    """

    def __init__(self, models: Mapping[str, nn.Module], config: LoRAConfig, seed: int = 0):
        super().__init__()
        self.rank, self.alpha = config.lora_rank, float(config.lora_alpha or config.lora_rank)
        self.model_parameters = sum(p.numel() for model in models.values() for p in model.parameters())
        self.targets = {name: matching_layers(model, config.lora_targets) for name, model in models.items()}
        if not any(self.targets.values()):
            raise UserError(
                f"--lora_targets {config.lora_targets}: {', '.join(models)} has no such layers; add one of "
                f"{', '.join(TARGETS)}"
            )
        for name, model in models.items():
            model.requires_grad_(False)
            if self.targets[name]:
                self._inject(name, model, seed)

    def _inject(self, name: str, model: nn.Module, seed: int) -> None:
        peft = import_peft()
        settings = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.targets[name])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(settings, model, ADAPTER_NAME)
        for path, parameter in model.named_parameters():
            if f".{ADAPTER_NAME}." in path and ".lora_" in path:
                self._register(f"{name}.{path}".replace(f".{ADAPTER_NAME}.", "."), parameter)

    def _register(self, path: str, parameter: nn.Parameter) -> None:
        """Register a parameter under a path with dots, in modules that exist for their names only."""
        *parents, last = path.split(".")
        node: nn.Module = self
        for part in parents:
            if part not in dict(node.named_children()):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(last, parameter)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def describe(self) -> str:
        """Return the size of the adapter and of the model as a phrase for the log."""
        share = 100 * self.num_parameters / self.model_parameters
        return (
            f"LoRA of rank {self.rank}: {self.num_parameters:,} parameters are trained, {share:.2g} % of the "
            f"{self.model_parameters:,} of the model, which are frozen"
        )

    def metadata(self) -> dict[str, Any]:
        """Return rank, alpha and layers of each model as Diffusers reads them, e.g. {"unet.r": 8, …}."""
        return {
            f"{name}.{key}": value
            for name, layers in self.targets.items()
            if layers
            for key, value in (("r", self.rank), ("lora_alpha", self.alpha), ("target_modules", layers))
        }

    def save(self, folder: Path, **facts: str) -> Path:
        """Write the adapter alone into `folder`, as Diffusers' `load_lora_weights` reads it, and return the file.

        Args:
            **facts: further metadata of the file, such as the fingerprint of the base model.
        """
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(self.metadata(), sort_keys=True), **facts}
        save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
        return folder / WEIGHTS_FILE

    def load(self, folder: Path, flag: str) -> None:
        """Load the weights that `save` wrote.

        Args:
            flag: the flag that `folder` comes from, for error messages.

        Raises:
            UserError: the adapter is missing, or has other layers or another rank.
        """
        file = folder / WEIGHTS_FILE
        if not file.is_file():
            raise UserError(f"{flag} {folder} has no {WEIGHTS_FILE}; name the folder of a LoRA adapter")
        tensors = load_tensors(file)
        if (difference := first_difference(self.state_dict(), tensors)) is not None:
            raise UserError(f"{flag} {folder}: the adapter was made for another model or rank ({difference})")
        self.load_state_dict(tensors)


def first_difference(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    """Return the first tensor whose name or shape differs, as a phrase; None if there is none."""
    for name in sorted(own.keys() | other.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (own, other)]
        if shapes[0] != shapes[1]:
            return f"{name}: {shapes[1]} instead of {shapes[0]}"
    return None


def import_peft() -> Any:
    """Return the library PEFT. Raises UserError when it is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError(f"--lora_rank needs PEFT: {install_command('lora', 'peft')}") from None
    return peft


def matching_layers(model: nn.Module, targets: list[str]) -> list[str]:
    """Return the names of the linear and convolutional layers of a model that `targets` (keys of TARGETS) name."""
    patterns = [re.compile(rf"(.*\.)?({TARGETS[target]})") for target in targets]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(pattern.fullmatch(name) for pattern in patterns)
    ]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and layers to which PEFT added an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


@torch.no_grad()
def fused(model: nn.Module) -> nn.Module:
    """Return a copy of a model without LoRA layers, whose weights include those of the adapter.

    The copy has the names of the model before the adapter was added, and shares all weights that it does not change.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    result: Any = copy.deepcopy(model, shared)
    for name, layer in [*lora_layers(result)]:
        base = layer.get_base_layer()
        base.weight = nn.Parameter(base.weight + layer.get_delta_weight(ADAPTER_NAME), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(result.get_submodule(parent), last, base)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(result).pop(attribute, None)
    return result

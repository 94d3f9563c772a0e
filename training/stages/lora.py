"""A LoRA adapter that a stage trains for the model of `--init_from`: its base model, its export, and what a card says.

The base model is loaded in every session, as checkpoints contain the adapter alone. Its fingerprint is one of the
inputs of the run, so that a run does not resume with another base model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pipelines.tools.cli import UserError
from training.data.fingerprints import module_fingerprint
from training.engine.weights import load_initial_weights
from training.models.lora import LoRAAdapter, LoRAConfig, fused
from training.publishing.content import ADAPTER_FOLDER
from training.publishing.upload_record import published_as

logger = logging.getLogger("halftone")


@dataclass
class LoRAStageConfig(LoRAConfig):
    """Options of a stage that can train a LoRA adapter of the model of `--init_from`."""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        own: Any = self  # a stage's config has the options of its other parts as well
        if not self.lora_rank:
            return
        if not own.init_from:
            raise UserError(
                f"--lora_rank {self.lora_rank} trains an adapter for the model of --init_from, which is not set; give "
                "a run, a pipeline folder or a Hub id"
            )
        if own.validate_model:
            raise UserError("--validate_model measures a whole model; leave out --lora_rank")


class LoRATraining:
    """The adapter that a run trains, and the frozen models that it belongs to.

    Args:
        models: the models by their names in the pipeline, with any weights; they get those of `--init_from`.
        adapted: names of the models that get an adapter where they have layers of `lora_targets`; the others are only
            frozen.
        base: run, checkpoint, pipeline folder or Hub id of the base model; if unset, `--init_from`.

    Raises:
        UserError: the base model lacks a model, or has one of another architecture.
    """

    def __init__(self, config: Any, models: Mapping[str, nn.Module], adapted: Sequence[str], base: str | None = None):
        self.models, self.base = dict(models), base or config.init_from
        load_initial_weights(self.base, self.models)
        self.fingerprint = module_fingerprint(*self.models.values())
        for model in self.models.values():
            model.requires_grad_(False)
        self.adapter = LoRAAdapter({name: self.models[name] for name in adapted}, config, config.seed)
        logger.info("%s", self.adapter.describe())
        if config.gradient_checkpointing:
            # The engine does this for the models of a phase, to which the base model does not belong.
            for name in adapted:
                if getattr(self.models[name], "_supports_gradient_checkpointing", False):
                    self.models[name].enable_gradient_checkpointing()

    def fused(self, name: str) -> nn.Module:
        """Return a copy of a model with the adapter in its weights, see `fused` in training/models/lora.py."""
        return fused(self.models[name])

    def save(self, pipeline: Path) -> None:
        """Write the adapter alone into the folder of a saved pipeline."""
        self.adapter.save(pipeline / ADAPTER_FOLDER, base_fingerprint=self.fingerprint)

    def card_facts(self) -> dict[str, Any]:
        adapter = self.adapter
        return {
            "adapter": {
                "rank": adapter.rank,
                "alpha": adapter.alpha,
                "parameters": adapter.num_parameters,
                "model_parameters": adapter.model_parameters,
                "base": self.base,
                "base_model_id": published_as(self.base),
                "base_fingerprint": self.fingerprint,
            }
        }

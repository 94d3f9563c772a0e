"""What the stages that train the poster decoder share: the denoising loss, the previews and the pipeline.

B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from pipelines.tools.commands import command_with
from training.core.draws import Draws
from training.core.exchange import Exchange
from training.core.options import Options, option
from training.core.previews import Previews
from training.core.stage import Batch, Phase
from training.data.briefs import drop_fields
from training.metrics.images import to_pil
from training.models.attention import attention_kernel, most_attention_tokens
from training.objectives.diffusion import Diffusion, noise_level_sums
from training.stages.generating import GeneratingStage
from training.stages.image_stage import loss_sums


@dataclass
class FieldDropoutConfig(Options):
    """How sparse the briefs of the training are."""

    field_dropout: float = option(0.1, on_resume="warn", at_least=0, at_most=1, usual="0.1")
    """Average fraction of a brief's fields dropped in training; most briefs lose few or none, some lose most"""


class PosterDecoderPhase(Phase):
    """Denoising loss on pixels, with some fields of the briefs dropped.

    Args:
        config: has `field_dropout`, `cfg_dropout` and `gradient_checkpointing`.
        kind: name of the network that denoises, as in the pipeline: unet or transformer.
        adapter: trained instead of the networks, which are frozen.
    """

    name = "decoder"

    brief_encoder: nn.Module

    def __init__(
        self,
        config: Any,
        kind: str,
        denoiser: nn.Module,
        brief_encoder: nn.Module,
        diffusion: Diffusion,
        adapter: nn.Module | None = None,
    ):
        super().__init__()
        networks = {kind: denoiser, "brief_encoder": brief_encoder}
        if adapter is not None:
            self.adapter = adapter
            self.borrow(**networks)
        else:
            for name, network in networks.items():
                setattr(self, name, network)
        self.config, self.kind, self.diffusion = config, kind, diffusion

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self, self.kind)

    def predict(self, x_t: Tensor, timesteps: Tensor, tokens: Tensor, vector: Tensor) -> Tensor:
        """Return the prediction of the network for noisy posters and encoded briefs. B 3 H W."""
        kernel: AbstractContextManager = nullcontext()
        if self.kind == "unet":
            kernel = attention_kernel(most_attention_tokens(self.denoiser), self.config.gradient_checkpointing)
        with kernel:
            return self.denoiser(x_t, timesteps, encoder_hidden_states=tokens, class_labels=vector).sample

    def losses(self, batch: Batch, draws: Draws, brief: dict[str, Tensor], sampling: str | None = None) -> Tensor:
        """Compute the loss of each sample. B."""
        noisy = self.diffusion.corrupt(batch["pixel_values"], draws, sampling=sampling)
        tokens, vector = self.brief_encoder(**brief)
        return noisy.loss(self.predict(noisy.x_t, noisy.timesteps, tokens, vector))

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        brief = drop_fields(batch["brief"], draws, self.config.field_dropout, self.config.cfg_dropout)
        return self.losses(batch, draws, brief).mean(), {}


class DecodingStage(GeneratingStage):
    """A stage that trains a poster decoder. A subclass sets `diffusion` and `phase`."""

    card_template = "poster_decoder.md.jinja"
    conditions = ("briefs",)
    diffusion: Diffusion
    phase: PosterDecoderPhase

    def validation_step(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        losses = self.phase.losses(batch, draws, batch["brief"], sampling="uniform")
        return loss_sums(losses) | noise_level_sums(losses, draws)

    def previews(self, exchange: Exchange) -> Previews:
        pipeline = self.pipeline()

        def generate(batch: Batch, rows: Sequence[int]) -> list[tuple[Image.Image, str, Image.Image]]:
            briefs = [self.shown_data.brief(row) for row in rows]
            images = self.sample(pipeline, briefs, seeds=[self.config.seed + row for row in rows])
            references = [to_pil(image) for image in batch["pixel_values"]]
            return list(zip(images, [brief.describe() for brief in briefs], references, strict=True))

        images, captions, references = zip(*self.shown(exchange, generate, self.config.num_previews), strict=True)
        return Previews(list(images), list(captions), list(references))

    def usage(self, model: str) -> str:
        return command_with("pipelines/sample.py", {"model": model, "brief": "random", "output": "grid.png"})

    def networks(self) -> dict[str, Any]:
        """Return the networks of the pipeline by their names in it, with their current weights."""
        return {self.phase.kind: self.phase.denoiser, "brief_encoder": self.phase.brief_encoder}

    def pipeline(self) -> Any:
        from pipelines.common.schedulers import sampling_scheduler
        from pipelines.poster_decoder import PosterDecoderPipeline

        return PosterDecoderPipeline(
            **{"unet": None, **self.networks()}, scheduler=sampling_scheduler(self.diffusion.scheduler)
        )

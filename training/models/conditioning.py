"""The condition of a latent diffusion model: in training, where it is sometimes dropped, and for its pipeline.

B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.core.stage import Batch


def caption_and_class(
    denoiser: Any, text_encoder: nn.Module | None, empty_ids: Tensor | None, batch: Batch, dropped: Tensor
) -> dict[str, Tensor | None]:
    """Return the arguments of the denoiser other than latents and timesteps.

    Args:
        empty_ids: token ids of the empty caption, 1 L, on the batch's device; None for a model without text.
        dropped: B, bool; True for samples that get the empty caption and the null class.
    """
    from pipelines.latent_diffusion import encode_captions, null_class

    # The stock U-Net requires this argument even without cross-attention.
    arguments: dict[str, Tensor | None] = {"encoder_hidden_states": None}
    if empty_ids is not None:
        input_ids = torch.where(dropped[:, None], empty_ids, batch["input_ids"])
        arguments["encoder_hidden_states"] = encode_captions(text_encoder, input_ids)
    if denoiser.config.num_class_embeds:
        arguments["class_labels"] = torch.where(dropped, null_class(denoiser), batch["label"])
    return arguments


def pipeline_conditions(
    count: int, texts: Sequence[str] | None, labels: Sequence[int] | None, id2label: Mapping[int, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments with which a pipeline generates images, and the captions to show under them.

    Args:
        count: number of images if there is neither a text nor a label.
        texts: prompts; None for a model without captions.
        labels: class ids, one for each text; None for a model without classes. The pipeline gets their names, because
            an integer is a name where all names are whole numbers.
        id2label: names of the classes; a class without a name is shown by its id.
    """
    if texts is None and labels is None:
        return {"num_images_per_prompt": count}, [f"sample {i + 1}" for i in range(count)]
    conditions: dict[str, Any] = {}
    names = [id2label.get(label, f"class {label}") for label in labels or ()]
    if labels is not None:
        conditions["class_labels"] = [id2label.get(label, label) for label in labels]
    if texts is None:
        return conditions, names
    captions = list(texts)
    if names:
        captions = [f"{text} [{name}]" for text, name in zip(texts, names, strict=True)]
    return {**conditions, "prompt": list(texts)}, captions

"""Which weight files a folder of Diffusers or Transformers contains. Pickled weights are never loaded."""

from __future__ import annotations

import re
from pathlib import Path

from .cli import UserError

# `diffusion_pytorch_model.fp16-00001-of-00002.safetensors`: a name, a variant, a shard; only the name is always there.
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
"""Patterns of files that can run code when they are loaded; they are not downloaded either."""


def weights_variant(folder: Path) -> str | None:
    """Return the variant (such as "fp16") of the weights in a model's folder, or None if there are weights without one.

    Raises:
        UserError: safetensors weights are missing, or several variants are there.
    """
    matches = [_WEIGHTS.fullmatch(file.name) for file in sorted(folder.iterdir())]
    variants = {match["variant"] for match in matches if match}
    if not variants:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        found = f" but only {pickles[0]}" if pickles else ""
        raise UserError(
            f"{folder} has no weights in the safetensors format{found}; pickled weights can run code when they are "
            "loaded, so they are never loaded: convert them to safetensors (`save_pretrained` of a model does it)"
        )
    if None not in variants and len(variants) > 1:
        raise UserError(f"{folder} has weights of the variants {', '.join(sorted(variants))}; keep one of them")
    return None if None in variants else variants.pop()


def pipeline_variant(folder: Path) -> str | None:
    """Return the variant that the models of a pipeline's folder need, or None if all have weights without one.

    Raises:
        UserError: a model has no safetensors weights, or the models need different variants.
    """
    variants = {weights_variant(config.parent) for config in sorted(folder.glob("*/config.json"))} - {None}
    if len(variants) > 1:
        raise UserError(
            f"{folder} has models of the variants {', '.join(sorted(map(str, variants)))}; keep one of them"
        )
    return variants.pop() if variants else None

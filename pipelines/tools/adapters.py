"""The flags of `pipelines/sample.py` for LoRA adapters."""

from __future__ import annotations

import argparse
from typing import Any

from .checkpoint_links import CHECKPOINTS, follow_links
from .cli import UserError
from .generated import model_name

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
ADAPTER_FOLDER = "lora"


def add_lora_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        help="LoRA adapters for the model: runs of training with --lora_rank, folders, or Hub ids; several add up",
    )
    parser.add_argument(
        "--lora_scale",
        nargs="+",
        type=float,
        help="Factor of what each adapter changes, from 0 for none of it (default: 1); one for all, or one for each",
    )


def load_adapters(pipeline: Any, options: argparse.Namespace) -> None:
    """Load the adapters of `--lora`, and add them to the weights of the model.

    Raises:
        UserError: an adapter does not exist or was made for another network, or the scales do not fit the adapters.
    """
    adapters, scales = options.lora or [], options.lora_scale or [1.0]
    if options.lora_scale and not adapters:
        raise UserError(f"--lora_scale {scales[0]:g} has no effect without an adapter; add --lora")
    if len(scales) not in (1, len(adapters)) and adapters:
        raise UserError(f"--lora_scale has {len(scales)} entries and --lora {len(adapters)}; give one, or equally many")
    if adapters and not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"{type(pipeline).__name__} does not accept --lora; leave it out")
    for adapter, scale in zip(adapters, scales * len(adapters) if len(scales) == 1 else scales, strict=True):
        try:
            pipeline.load_lora_weights(find_adapter(adapter), weight=scale)
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"--lora {adapter}: {' '.join(str(error).split())[:400]}") from error
    if adapters:
        pipeline.fuse_lora()


def find_adapter(path: str) -> str:
    """Return the folder of the adapter that `path` refers to, or a Hub id unchanged.

    Args:
        path: the folder of an adapter; a run, which gives the adapter of its final pipeline, or that of its best or
            latest checkpoint; a checkpoint; or a Hub id.
    """
    folder = follow_links(path)
    checkpoints = (follow_links(folder / CHECKPOINTS / name) for name in ("best", "latest"))
    pipelines = [folder, folder / "pipeline", *(checkpoint / "pipeline" for checkpoint in checkpoints)]
    candidates = [folder, *(pipeline / ADAPTER_FOLDER for pipeline in pipelines)]
    return str(next((one for one in candidates if (one / WEIGHT_NAME).is_file()), path))


def lora_texts(options: argparse.Namespace) -> dict[str, str]:
    """Return the adapters and their scales as texts, for the metadata of images; empty without adapters."""
    if not options.lora:
        return {}
    scales = [f"{scale:g}" for scale in options.lora_scale or [1.0]]
    return {"lora": ", ".join(model_name(one) for one in options.lora), "lora_scale": ", ".join(scales)}

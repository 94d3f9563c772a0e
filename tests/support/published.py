"""Save the outputs of published pipelines as arrays: `python published.py LOADER OUTPUT.npz FOLDER …`.

LOADER is a module of Halftone that has `load_pipeline`, or `diffusers`. No other module of Halftone is imported, so
that the script runs with any version of Halftone, and without it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PROMPT = "a minimalist poster, blue on cream, one picture"
BRIEF = {"style": "swiss", "palette": ["cream", "#d33"], "pictures": 2, "energy": 0.8}


def load(loader: str, folder: Path) -> Any:
    if loader == "diffusers":
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline = importlib.import_module(loader).load_pipeline(folder)
    module = type(pipeline).__module__
    assert module.startswith("pipelines."), f"{folder.name} was loaded with the code that it carries ({module})"
    return pipeline


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def image(side: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def controls(pipeline: Any) -> Any:
    """Return a random control for each ControlNet, 1 C H W: a tensor, or a list of them for several ControlNets."""
    side = pipeline.unet.config.sample_size * getattr(pipeline, "vae_scale_factor", 1)
    nets = list(getattr(pipeline.controlnet, "nets", [pipeline.controlnet]))
    channels = [net.config.conditioning_channels for net in nets]
    several = [(torch.rand(1, number, side, side, generator=seeded()) > 0.5).float() for number in channels]
    return several if len(nets) > 1 else several[0]


def outputs(pipeline: Any) -> dict[str, np.ndarray]:
    """Return the pipeline's outputs for fixed inputs, by name."""
    pipeline.set_progress_bar_config(disable=True)
    # Earlier versions used a single generator in another way than a list.
    options = {"num_inference_steps": 3, "generator": [seeded()], "output_type": "np"}
    name = type(pipeline).__name__
    if name == "AutoencoderPipeline":
        masks = {"masks": pipeline.segment(image(64), "np")} if pipeline.vae.config.get("num_mask_classes") else {}
        return {"images": pipeline(image(64), output_type="np").images, **masks}
    if name in ("LatentDiffusionPipeline", "FusionControlNetPipeline"):
        text = {} if pipeline.text_encoder is None else {"prompt": PROMPT}
        label = {} if pipeline.unet.config.num_class_embeds is None else {"class_labels": 1}
        control = {"control_image": controls(pipeline)} if name == "FusionControlNetPipeline" else {}
        return {"images": pipeline(**text, **label, **control, **options).images}
    if name == "PosterDecoderPipeline":
        return {"images": pipeline(BRIEF, **options).images}
    if name == "PosterControlNetPipeline":
        return {"images": pipeline(BRIEF, control_image=controls(pipeline), **options).images}
    if name == "LayoutAnalysisPipeline":
        reading = pipeline(image(48))
        grammar = {} if reading.grammar is None else {"grammar": np.array(list(reading.grammar[0].values()))}
        return {"features": reading.features[0], "overlay": np.asarray(reading.overlays[0]), **grammar}
    if name == "ImageCaptionPipeline":
        captions = pipeline.caption(image(32), num_beams=2)
        return {"images": pipeline.draw("a red circle", output_type="np").images, "captions": np.array(captions)}
    raise ValueError(f"no inputs for {name}")


def main() -> None:
    loader, output, *folders = sys.argv[1:]
    arrays = {}
    for folder in map(Path, folders):
        for name, value in outputs(load(loader, folder)).items():
            arrays[f"{folder.name}/{name}"] = value
    np.savez(output, **arrays)


if __name__ == "__main__":
    main()

"""The Python in every model card runs as it stands: copied from a repository on the Hub, without Halftone installed."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from tests.support.environments import environment_without_halftone
from tests.support.hub_server import HubServer, hub  # noqa: F401  (a fixture)
from tests.support.tiny_controlnets import CLASSES, PICTURE, tiny_controlled
from tests.support.tiny_published import PUBLISHED
from training import (
    train_abstractor,
    train_autoencoder,
    train_controlnet,
    train_decoder,
    train_encoder,
    train_image_caption,
    train_latent_diffusion,
)
from training.publishing.model_card import TEMPLATES, write_model_card

Make = Callable[[], Any]
COLUMNS = ["text_mask", "image_mask"]
# Model → how it is made, the stage whose card it gets, and the settings that the card depends on.
CARDS: dict[str, tuple[Make, Any, dict[str, Any]]] = {
    "captioned": (PUBLISHED["captioned"], train_latent_diffusion.LatentDiffusionStage, {}),
    "labelled": (PUBLISHED["labelled"], train_latent_diffusion.LatentDiffusionStage, {}),
    "captioned_and_labelled": (
        PUBLISHED["captioned_and_labelled"], train_latent_diffusion.LatentDiffusionStage, {}
    ),
    "unconditional": (PUBLISHED["unconditional"], train_latent_diffusion.LatentDiffusionStage, {}),
    "pretrained_text_encoder": (
        PUBLISHED["pretrained_text_encoder"], train_latent_diffusion.LatentDiffusionStage, {}
    ),
    "autoencoder": (PUBLISHED["autoencoder"], train_autoencoder.AutoencoderStage, {}),
    "autoencoder_heads": (PUBLISHED["autoencoder_heads"], train_autoencoder.AutoencoderStage, {}),
    "controlnet": (
        PUBLISHED["controlnet"], train_controlnet.ControlNetStage, {"conditioning_image_column": COLUMNS}
    ),
    "poster_controlnet": (
        PUBLISHED["poster_controlnet"], train_controlnet.ControlNetStage, {"conditioning_image_column": COLUMNS}
    ),
    "image_controlnet": (
        lambda: tiny_controlled("add", PICTURE), train_controlnet.ControlNetStage,
        {"conditioning_image_column": "conditioning_image"},
    ),
    "class_controlnet": (
        lambda: tiny_controlled("add", CLASSES), train_controlnet.ControlNetStage,
        {"conditioning_image_column": "color_role", "conditioning_classes": 3},
    ),
    "poster_decoder": (PUBLISHED["poster_decoder"], train_decoder.PosterDecoderStage, {}),
    "image_caption": (PUBLISHED["image_caption"], train_image_caption.ImageCaptionStage, {}),
    "layout_encoder": (PUBLISHED["layout_encoder"], train_encoder.LayoutEncoderStage, {}),
    "layout_analysis": (PUBLISHED["layout_analysis"], train_abstractor.AbstractorStage, {}),
}  # fmt: skip
RUN = """
import os, sys, traceback
from pathlib import Path

os.chdir(sys.argv[1])
failed = False
for file in sorted(Path("code").glob("*.py")):
    try:
        exec(compile(file.read_text(), file.name, "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        failed = True
        continue
    print("ran", file.stem)
sys.exit(failed)
"""


def blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def resolution(pipeline: Any) -> int:
    """Return the side of the images of a tiny pipeline in pixels."""
    network = getattr(pipeline, "unet", None)
    return network.config.sample_size * getattr(pipeline, "vae_scale_factor", 1) if network is not None else 64


def publish(name: str, folder: Path) -> None:
    """Push a tiny model with the card of its stage to ada/NAME on the Hub."""
    make, stage, settings = CARDS[name]
    pipeline = make()
    pipeline.save_pretrained(folder)
    record = {
        "stage": stage.name,
        "model_name": name,
        "hub_model_id": f"ada/{name}",
        "resolution": resolution(pipeline),
        "config": settings,
        "prompts": ["a red poster of circles"],
    }
    write_model_card(folder, stage.card_template, record)
    api = HfApi()
    api.create_repo(f"ada/{name}")
    api.upload_folder(repo_id=f"ada/{name}", folder_path=folder)


def test_every_stage_has_its_card_among_these():
    """The card of an adapter, which is uploaded without its base model, has its tests in tests/scripts/test_lora.py."""
    templates = {stage.card_template for _, stage, _ in CARDS.values()}
    assert templates == {path.name for path in TEMPLATES.glob("*.jinja")} - {"base.md.jinja", "lora.md.jinja"}


@pytest.fixture
def cards(hub: HubServer, tmp_path: Path) -> dict[str, str]:  # noqa: F811
    """Card of each model, as it is on the Hub."""
    for name in CARDS:
        publish(name, tmp_path / "published" / name)
    return {name: hub.files(f"ada/{name}")["README.md"].decode() for name in CARDS}


def test_the_code_of_every_card_runs(cards, hub, tmp_path):  # noqa: F811
    (tmp_path / "code").mkdir()
    for name, card in cards.items():
        sources = blocks(card)
        assert len(sources) == 1
        assert f'"ada/{name}"' in sources[0]
        (tmp_path / "code" / f"{name}.py").write_text(sources[0], encoding="utf-8")
    python = environment_without_halftone(tmp_path / "environment")
    variables = {**os.environ, **hub.env(token=None, home=tmp_path / "empty_cache"), "PYTHONPATH": ""}
    variables.pop("HF_TOKEN", None)
    done = subprocess.run([python, "-c", RUN, tmp_path], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert sorted(re.findall(r"^ran (\w+)$", done.stdout, re.MULTILINE)) == sorted(cards)

"""Folders with a variant such as fp16 are loaded as they are, and pickled weights never."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pipelines.sample import main as sample
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from tests.support.tiny_models import tiny_pipeline, tiny_vae
from tests.support.tiny_published import PUBLISHED
from training.models.text_encoder import load_text_encoder
from training.models.vae_loading import load_vae

PROMPT = "a red poster"


def draw(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, num_inference_steps=2, generator=generator, output_type="np").images


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A pipeline of all kinds of components, saved in float16 as the variant "fp16"."""
    folder = tmp_path_factory.mktemp("half")
    PUBLISHED["captioned_and_labelled"]().to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


def test_a_variant_is_loaded_as_it_is(half):
    names = sorted(path.name for path in half.rglob("*.safetensors"))
    assert set(names) == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    loaded = load_pipeline(half)
    assert loaded.unet.dtype == loaded.text_encoder.dtype == torch.float32
    expected = PUBLISHED["captioned_and_labelled"]().to(torch.float16).to(torch.float32)
    assert np.allclose(draw(loaded), draw(expected), atol=1e-5)
    with_code = DiffusionPipeline.from_pretrained(half, variant="fp16", trust_remote_code=True)
    assert with_code.unet.dtype in (torch.float16, torch.float32)
    assert np.allclose(draw(with_code.to(torch.float32)), draw(expected), atol=1e-5)


def test_sample_py_takes_a_variant(half, tmp_path):
    output = tmp_path / "grid.png"
    words = ("--model", half, "--prompt", PROMPT, "--num_images", 1, "--num_inference_steps", 2, "--device", "cpu")
    assert sample([str(word) for word in (*words, "--output", output)]) in (None, 0)
    with Image.open(output) as grid:
        assert np.asarray(grid).std() > 0


@pytest.mark.parametrize("where", [".", "vae"])
def test_a_vae_takes_a_variant(half, where):
    vae = load_vae(str(half / where) if where != "." else str(half))
    assert vae.dtype == torch.float32
    expected = PUBLISHED["captioned_and_labelled"]().vae.to(torch.float16).to(torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items())


def test_a_component_without_the_variant_is_loaded_too(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").rename(
        tmp_path / "unet/diffusion_pytorch_model.ema.safetensors"
    )
    assert np.allclose(draw(load_pipeline(tmp_path)), draw(pipeline), atol=1e-5)


def test_weights_in_shards_are_found(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    assert len(list(tmp_path.glob("unet/*.safetensors"))) > 1
    assert np.allclose(draw(load_pipeline(tmp_path)), draw(pipeline), atol=1e-5)


def test_different_variants_are_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    for folder, variant in (("unet", "ema"), ("vae", "fp16")):
        file = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    with pytest.raises(UserError, match="has models of the variants ema, fp16; keep one of them"):
        load_pipeline(tmp_path)
    shutil.copy(
        tmp_path / "unet/diffusion_pytorch_model.ema.safetensors",
        tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors",
    )
    with pytest.raises(UserError, match="unet has weights of the variants ema, fp16; keep one of them"):
        load_pipeline(tmp_path)


# --- pickles


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def set_trap(folder: Path, name: str, touched: Path) -> None:
    """Replace the weights in a model's folder by a pickle that runs code."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save(Trap(touched), folder / name)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.fp16.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_refused(component, name, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    set_trap(tmp_path / component, name, tmp_path / "ran")
    with pytest.raises(
        UserError, match=rf"{component} has no weights in the safetensors format but only {name}; pickled"
    ):
        load_pipeline(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_vae_or_text_encoder_is_refused(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    set_trap(tmp_path / "vae", "diffusion_pytorch_model.bin", tmp_path / "ran")
    with pytest.raises(
        UserError, match="has no weights in the safetensors format but only diffusion_pytorch_model.bin"
    ):
        load_vae(str(tmp_path / "vae"))
    tiny_pipeline().text_encoder.save_pretrained(tmp_path / "text")
    set_trap(tmp_path / "text", "pytorch_model.bin", tmp_path / "ran")
    with pytest.raises(UserError, match="the text encoder .* cannot be loaded"):
        load_text_encoder(str(tmp_path / "text"))
    assert not (tmp_path / "ran").exists()

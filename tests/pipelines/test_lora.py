"""LoRA adapters in pipelines: loaded, weighed, fused and unloaded as in Diffusers, and refused for other networks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from pipelines.common.schedulers import sampling_scheduler, training_scheduler
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.models.patch_transformer import PatchTransformer2DModel
from tests.support.tiny_models import TEXT_WIDTH, tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_vae
from training.models.lora import LoRAAdapter, LoRAConfig, fused

TOLERANCE = 1e-5  # images are in [0, 1]


def transformer_pipeline() -> LatentDiffusionPipeline:
    torch.manual_seed(5)
    model = PatchTransformer2DModel(
        4, 4, 4, patch_size=2, hidden_size=16, num_layers=1, num_attention_heads=2, cross_attention_dim=TEXT_WIDTH
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline = LatentDiffusionPipeline(
        vae=tiny_vae(),
        unet=None,
        transformer=model.eval(),
        scheduler=sampling_scheduler(training_scheduler("flow_prediction")),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINES = {"unet": tiny_pipeline, "transformer": transformer_pipeline}


def draw(pipeline) -> np.ndarray:
    return pipeline(
        "a red poster", num_inference_steps=3, generator=0, output_type="np", num_images_per_prompt=2
    ).images


def adapter_for(name: str, folder, seed: int = 0, **options) -> tuple[str, np.ndarray]:
    """Save an adapter of random weights, and return its folder and what the model draws with it, fused by `fused`."""
    pipeline = PIPELINES[name]()
    network = getattr(pipeline, name)
    adapter = LoRAAdapter({name: network}, LoRAConfig(**{"lora_rank": 2, "lora_alpha": 3.0, **options}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=generator, std=0.3)
    adapter.save(folder)
    pipeline.register_modules(**{name: fused(network)})
    return str(folder), draw(pipeline)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("target", ["attention", "all"])
def test_a_loaded_adapter_draws_what_the_trained_model_draws(name, target, tmp_path):
    folder, expected = adapter_for(name, tmp_path / "lora", lora_targets=[target])
    pipeline = PIPELINES[name]()
    before = draw(pipeline)
    assert np.abs(expected - before).max() > 0.01
    pipeline.load_lora_weights(folder, adapter_name="mine")
    assert np.abs(draw(pipeline) - expected).max() <= TOLERANCE
    pipeline.unload_lora_weights()
    assert np.array_equal(draw(pipeline), before)


@pytest.mark.parametrize("name", PIPELINES)
def test_fusing_and_unfusing_gives_the_images_of_the_base_again(name, tmp_path):
    folder, expected = adapter_for(name, tmp_path / "lora")
    pipeline = PIPELINES[name]()
    before = draw(pipeline)
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    assert pipeline.num_fused_loras == 1
    assert np.abs(draw(pipeline) - expected).max() <= TOLERANCE
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    assert np.abs(draw(pipeline) - before).max() <= TOLERANCE


def test_a_weight_of_0_is_the_base_and_others_lie_between(tmp_path):
    folder, expected = adapter_for("unet", tmp_path / "lora")
    images = {}
    for weight in (0.0, 0.5, 1.0):
        pipeline = tiny_pipeline()
        pipeline.load_lora_weights(folder, weight=weight)
        images[weight] = draw(pipeline)
    assert np.array_equal(images[0.0], draw(tiny_pipeline()))
    assert np.abs(images[1.0] - expected).max() <= TOLERANCE
    assert np.abs(images[0.5] - images[0.0]).max() > 0.001
    assert np.abs(images[0.5] - images[1.0]).max() > 0.001


def test_adapters_add_up_and_are_weighed_and_deleted_by_name(tmp_path):
    one, with_one = adapter_for("unet", tmp_path / "one", 1)
    two, with_two = adapter_for("unet", tmp_path / "two", 2, lora_targets=["attention", "feed_forward"])
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(one, "one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(two, "two")
    assert pipeline.get_list_adapters() == {"unet": ["one", "two"]}
    both = draw(pipeline)
    assert min(np.abs(both - single).max() for single in (with_one, with_two)) > 0.001
    pipeline.set_adapters("two")
    assert np.abs(draw(pipeline) - with_two).max() <= TOLERANCE
    pipeline.set_adapters(["one", "two"], [1.0, 1.0])
    assert np.array_equal(draw(pipeline), both)
    pipeline.delete_adapters("two")
    assert np.abs(draw(pipeline) - with_one).max() <= TOLERANCE
    with pytest.raises(ValueError, match="'one' is in use"):
        pipeline.load_lora_weights(two, "one")
    pipeline.load_lora_weights(two)
    assert pipeline.get_list_adapters() == {"unet": ["one", "default_0"]}


def test_an_adapter_of_another_network_is_refused_and_leaves_no_trace(tmp_path):
    folder, _ = adapter_for("unet", tmp_path / "lora")
    pipeline = transformer_pipeline()
    with pytest.raises(ValueError, match="another network: this model has no unet"):
        pipeline.load_lora_weights(folder)
    smaller = tiny_pipeline()
    config = {**smaller.unet.config, "block_out_channels": (4, 8)}
    smaller.register_modules(unet=type(smaller.unet).from_config(config).eval())
    before = draw(smaller)
    with pytest.raises(ValueError, match=r"another network: its layer .*to_.* has weights of the shape \(16, 16\)"):
        smaller.load_lora_weights(folder)
    unconditional = tiny_pipeline(text=False)
    with pytest.raises(ValueError, match="another network, which has a layer"):
        unconditional.load_lora_weights(folder)
    assert np.array_equal(draw(smaller), before)


def test_a_folder_without_an_adapter_and_a_missing_one_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no pytorch_lora_weights.safetensors"):
        tiny_pipeline().load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="nowhere/else does not exist"):
        tiny_pipeline().load_lora_weights(tmp_path / "nowhere/else")


def test_a_pipeline_with_loaded_adapters_is_saved_after_they_are_fused(tmp_path):
    folder, expected = adapter_for("unet", tmp_path / "lora")
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(folder)
    with pytest.raises(ValueError, match="fuse_lora"):
        pipeline.save_pretrained(tmp_path / "saved")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "saved")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.abs(draw(again) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("name", PIPELINES)
def test_a_published_base_loads_adapters_with_its_own_code(name, tmp_path):
    """The shipped files alone, as where Halftone is not installed."""
    folder, expected = adapter_for(name, tmp_path / "lora")
    PIPELINES[name]().save_pretrained(tmp_path / "base")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "base", trust_remote_code=True)
    assert type(pipeline).__module__.startswith("diffusers_modules")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder)
    assert np.abs(draw(pipeline) - expected).max() <= TOLERANCE

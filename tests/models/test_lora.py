"""LoRA adapters: what is trained and what is not, against the formula and against Diffusers' own loading."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pipelines.models.patch_transformer import PatchTransformer2DModel
from pipelines.tools.cli import UserError
from tests.support.tiny_models import TEXT_WIDTH, tiny_text_encoder, tiny_unet
from training.models.lora import WEIGHTS_FILE, LoRAAdapter, LoRAConfig, fused, lora_layers, matching_layers
from training.models.transformer import TransformerConfig, build_transformer
from training.models.unet import UNetConfig, build_unet


def transformer(**options) -> nn.Module:
    torch.manual_seed(0)
    model = PatchTransformer2DModel(
        sample_size=16, hidden_size=32, num_layers=2, num_attention_heads=2, cross_attention_dim=TEXT_WIDTH, **options
    )
    for parameter in model.parameters():  # its last layers begin at zero, which would hide every difference
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


MODELS = {"unet": tiny_unet, "transformer": transformer}


def config(**options) -> LoRAConfig:
    return LoRAConfig(**{"lora_rank": 2, **options})


def randomize(adapter: LoRAAdapter) -> None:
    """Give the adapter weights that change the model, as training does: B begins at zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=generator, std=0.2)


def output(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    side, channels = (4, 4) if hasattr(model, "down_blocks") else (16, 3)
    x = torch.randn(2, channels, side, side, generator=generator)
    text = torch.randn(2, 8, TEXT_WIDTH, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([5, 700]), encoder_hidden_states=text).sample


@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_changes_nothing(name):
    model = MODELS[name]()
    before, weights = output(model), copy.deepcopy(model.state_dict())
    adapter = LoRAAdapter({name: model}, config())
    assert torch.equal(output(model), before)
    own = {key.replace(".base_layer.", "."): value for key, value in model.state_dict().items() if ".lora_" not in key}
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[key], weights[key]) for key in weights)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["attention", "feed_forward", "conditioning", "convolutions", "all"])
def test_a_fused_copy_has_the_weights_of_the_formula(name, target):
    """W + alpha / rank · B A, computed here in float64; the model itself keeps its weights and its adapter."""
    model = MODELS[name](**({"conv_layers": 2} if name == "transformer" else {}))
    weights, names = copy.deepcopy(model.state_dict()), {n for n, _ in model.named_modules()}
    adapter = LoRAAdapter({name: model}, config(lora_alpha=6.0, lora_targets=[target]))
    randomize(adapter)
    with_adapter = output(model)
    result = fused(model)
    assert {n for n, _ in result.named_modules()} == names
    state, pairs = result.state_dict(), adapter.state_dict()
    assert state.keys() == weights.keys()
    for key, before in weights.items():
        path = f"{name}.{key.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" not in pairs:
            assert torch.equal(state[key], before)
            continue
        a, b = (pairs[f"{path}.lora_{x}.weight"].double() for x in "AB")
        expected = before.double() + 6 / 2 * (b.flatten(1) @ a.flatten(1)).view(before.shape)
        torch.testing.assert_close(state[key].double(), expected, rtol=1e-5, atol=1e-6)
    assert (output(result) - with_adapter).abs().max() <= 1e-4 * with_adapter.abs().max()
    assert torch.equal(output(model), with_adapter)
    assert any(lora_layers(model))
    assert not any(lora_layers(result))


def test_a_fused_copy_shares_what_the_adapter_does_not_change():
    model = tiny_unet()
    LoRAAdapter({"unet": model}, config())
    own = {p.data_ptr() for p in model.parameters()}
    layers = len(matching_layers(tiny_unet(), ["attention"]))
    assert sum(p.data_ptr() not in own for p in fused(model).parameters()) == layers


@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_an_adapter_of_rank_8_is_at_most_5_percent_of_a_default_network(name):
    with torch.device("meta"):
        if name == "unet":
            model = build_unet(UNetConfig(), 4, 16, 128, 0)
        else:
            model = build_transformer(TransformerConfig(), 3, 64, 128, 0)
    size = sum(p.numel() for p in model.parameters())
    adapter = LoRAAdapter({name: model}, LoRAConfig(lora_rank=8))
    assert adapter.num_parameters == sum(p.numel() for p in adapter.parameters())
    assert adapter.model_parameters == size
    assert 0 < adapter.num_parameters <= 0.05 * size
    assert f"{adapter.num_parameters:,}" in adapter.describe()
    assert f"{size:,}" in adapter.describe()


def test_the_optimizer_has_state_for_the_adapter_alone():
    model = tiny_unet()
    adapter = LoRAAdapter({"unet": model}, config())
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad])
    model(torch.randn(1, 4, 4, 4), 3, encoder_hidden_states=torch.randn(1, 8, TEXT_WIDTH)).sample.sum().backward()
    optimizer.step()
    held = sum(value["exp_avg"].numel() for value in optimizer.state.values())
    assert held == adapter.num_parameters
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in adapter.parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_adapter_is_loaded_exactly_and_says_its_scale(name, tmp_path):
    model = MODELS[name]()
    adapter = LoRAAdapter({name: model}, config(lora_alpha=4.0))
    randomize(adapter)
    file = adapter.save(tmp_path, base="abc")
    with safe_open(file, "pt") as opened:
        metadata, keys = opened.metadata(), set(opened.keys())
    assert file.name == WEIGHTS_FILE
    assert metadata["base"] == "abc"
    assert json.loads(metadata["lora_adapter_metadata"])[f"{name}.lora_alpha"] == 4
    assert all(key.startswith(f"{name}.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    other = MODELS[name]()
    again = LoRAAdapter({name: other}, config(lora_alpha=4.0), seed=9)
    again.load(tmp_path, "--x")
    assert torch.equal(output(other), output(model))


def test_an_adapter_of_another_model_or_rank_is_refused(tmp_path):
    LoRAAdapter({"unet": tiny_unet()}, config()).save(tmp_path)
    with pytest.raises(UserError, match=r"--x .*another model or rank .*lora_A"):
        LoRAAdapter({"unet": tiny_unet()}, config(lora_rank=3)).load(tmp_path, "--x")
    with pytest.raises(UserError, match="another model or rank"):
        LoRAAdapter({"transformer": transformer()}, config()).load(tmp_path, "--x")
    with pytest.raises(UserError, match=WEIGHTS_FILE):
        LoRAAdapter({"unet": tiny_unet()}, config()).load(tmp_path / "none", "--x")


def test_several_models_share_an_adapter_and_one_without_such_layers_is_only_frozen():
    models = {"unet": tiny_unet(text=False), "text_encoder": tiny_text_encoder()}
    adapter = LoRAAdapter(models, config())
    assert {key.split(".")[0] for key in adapter.state_dict()} == {"text_encoder"} | (
        {"unet"} if matching_layers(tiny_unet(text=False), ["attention"]) else set()
    )
    assert not any(p.requires_grad for name, p in models["unet"].named_parameters() if ".lora_" not in name)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UserError, match="--lora_targets .*all"):
        LoRAAdapter({"x": nn.Conv2d(2, 2, 1)}, config())


def test_the_seed_alone_decides_the_initial_weights():
    states = []
    for global_seed, seed in ((0, 5), (1, 5), (1, 6)):
        model = tiny_unet()
        torch.manual_seed(global_seed)
        states.append(LoRAAdapter({"unet": model}, config(), seed).state_dict())
    equal = [all(torch.equal(states[0][key], other[key]) for key in other) for other in states[1:]]
    assert equal == [True, False]

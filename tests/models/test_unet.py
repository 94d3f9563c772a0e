"""The decoder's U-Net: its size, and where it has attention, observed by hooks on the real default model at 256 px."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention

from pipelines.tools.cli import UserError
from training.models.unet import PixelUNetConfig, build_pixel_unet, feature_map_sides

TOKENS, TOKEN_WIDTH, GLOBAL_WIDTH = 19, 256, 512


def on_meta(resolution: int = 256, **options) -> torch.nn.Module:
    """Build the U-Net on the meta device, which computes shapes only: the 256 px default runs in a second."""
    with torch.device("meta"):
        return build_pixel_unet(PixelUNetConfig(**options), resolution, TOKEN_WIDTH, GLOBAL_WIDTH).eval()


def attention_calls(unet: torch.nn.Module, resolution: int = 256) -> list[tuple[str, str, int, int]]:
    """Return (part of the network, "self" or "cross", queries, keys) of each attention in one forward pass."""
    calls = []

    def note(name):
        def hook(module, args, kwargs, output):
            other = kwargs.get("encoder_hidden_states")
            kind = "self" if other is None else "cross"
            keys = args[0] if other is None else other
            calls.append((name.split("_blocks")[0].split("_block")[0], kind, args[0].shape[1], keys.shape[1]))

        return hook

    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            module.register_forward_hook(note(name), with_kwargs=True)
    x, tokens, whole = (torch.empty(1, *s, device="meta") for s in ((3, resolution, resolution), (19, 256), (512,)))
    with torch.no_grad():
        out = unet(x, torch.empty(1, device="meta"), encoder_hidden_states=tokens, class_labels=whole).sample
    assert out.shape == x.shape
    return calls


def test_the_default_has_about_sixty_million_parameters():
    unet = on_meta()
    assert 55e6 < sum(p.numel() for p in unet.parameters()) < 65e6
    assert feature_map_sides(PixelUNetConfig(), 256) == [256, 128, 64, 32]
    assert type(unet).__module__.startswith("diffusers.")


def test_default_attention_is_self_and_cross_attention_at_32_only():
    calls = attention_calls(on_meta())
    assert {queries for _, _, queries, _ in calls} == {32 * 32}
    assert {(part, kind) for part, kind, _, _ in calls} >= {
        ("down", "self"), ("down", "cross"), ("up", "self"), ("up", "cross"),
    }  # fmt: skip
    assert {part for part, *_ in calls} == {"down", "mid", "up"}  # the middle works at 32 × 32 here
    assert {keys for _, kind, _, keys in calls if kind == "cross"} == {TOKENS}
    assert {keys for _, kind, _, keys in calls if kind == "self"} == {32 * 32}


def test_attention_at_another_resolution_removes_it_from_the_middle():
    calls = attention_calls(on_meta(attention_resolutions=[64]))
    assert {queries for _, _, queries, _ in calls} == {64 * 64}
    assert {part for part, *_ in calls} == {"down", "up"}


def test_no_attention_at_all():
    assert attention_calls(on_meta(attention_resolutions=[])) == []


@pytest.mark.parametrize("resolution", [64, 128])
def test_other_sizes(resolution):
    calls = attention_calls(on_meta(resolution), resolution)
    assert {queries for _, _, queries, _ in calls} == {32 * 32}


def test_the_global_vector_reaches_every_residual_block():
    """It is added to the time embedding, which each block receives."""
    unet = build_pixel_unet(
        PixelUNetConfig(block_out_channels=[8, 16, 16], norm_num_groups=4, attention_head_dim=8), 32, 8, 6
    ).eval()
    seen: list[torch.Tensor] = []
    blocks = [m for name, m in unet.named_modules() if type(m).__name__ == "ResnetBlock2D"]
    for block in blocks:
        block.register_forward_hook(lambda m, args, kwargs, out: seen.append(args[1]), with_kwargs=True)
    x, tokens = torch.zeros(2, 3, 32, 32), torch.zeros(2, 5, 8)
    with torch.no_grad():
        unet(x, torch.zeros(2), encoder_hidden_states=tokens, class_labels=torch.randn(2, 6))
    assert len(seen) == len(blocks) == 2 * 3 + 1 + 3 * 3  # down, middle, up
    assert all(not torch.allclose(embedding[0], embedding[1]) for embedding in seen)


def test_a_resolution_that_the_network_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"has 48, but at --resolution 256 .* are 256, 128, 64, 32; choose among them"):
        PixelUNetConfig(attention_resolutions=[32, 48]).check_resolution(256)
    PixelUNetConfig(attention_resolutions=[]).check_resolution(256)
    with pytest.raises(UserError, match="must be multiples of --model.norm_num_groups 32"):
        PixelUNetConfig(block_out_channels=[40, 64]).validate("model.")

"""Fusion of a ControlNet's features with a U-Net's: no effect at step 0, trainable from then on, and compatible with
the stock ControlNet in the mode "add"."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from torch import Tensor

from pipelines.models.fusion_controlnet import (
    FUSION_MODES,
    CrossAttentionFusion,
    FusionControlNetModel,
    FusionControlNets,
    embedding_channels,
    places,
    steering,
)
from tests.support.tiny_models import TEXT_WIDTH, TOKENS, tiny_pipeline, tiny_unet

CONTROL_CHANNELS, DOWNSAMPLING = 2, 4
PIXELS = 4 * DOWNSAMPLING


def pixel_unet() -> UNet2DConditionModel:
    """A U-Net as build_pixel_unet builds it: a global vector as class embedding, attention at the lowest resolution."""
    torch.manual_seed(5)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=12,
        resnet_time_scale_shift="scale_shift",
    ).eval()


def controlnet_of(unet: UNet2DConditionModel, mode: str = "add", downsampling: int = DOWNSAMPLING):
    torch.manual_seed(6)
    return FusionControlNetModel.from_unet(
        unet,
        fusion_mode=mode,
        downsampling=downsampling,
        conditioning_channels=CONTROL_CHANNELS,
        control_kind="masks",
        control_names=("text", "picture"),
    )


def inputs(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "sample": torch.randn(batch, 4, 4, 4, generator=generator),
        "timestep": torch.tensor([10.0, 900.0, 400.0, 33.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, TOKENS, TEXT_WIDTH, generator=generator),
    }


def control(batch: int = 2, side: int = PIXELS) -> Tensor:
    return torch.rand(batch, CONTROL_CHANNELS, side, side, generator=torch.Generator().manual_seed(8)).round()


def steered(unet, nets, controls, scale=1.0, **given) -> Tensor:
    with steering(unet, nets, controls, lambda net, timestep: scale):
        return unet(**(given or inputs())).sample


def moved(net: FusionControlNetModel, seed: int = 9) -> FusionControlNetModel:
    """Change every parameter of `net`, as training does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


@pytest.mark.parametrize("mode", FUSION_MODES)
def test_at_step_0_the_output_is_exactly_that_of_the_base_model(mode: str):
    unet = tiny_unet(classes=3)
    given = {**inputs(), "class_labels": torch.tensor([0, 3])}
    base = unet(**given).sample
    assert torch.equal(steered(unet, [controlnet_of(unet, mode)], [control()], **given), base)
    pixels = pixel_unet()
    given = {
        "sample": torch.randn(2, 3, 16, 16),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(2, 5, TEXT_WIDTH),
        "class_labels": torch.randn(2, 12),
    }
    net = controlnet_of(pixels, mode, downsampling=1)
    assert torch.equal(steered(pixels, [net], [control()], **given), pixels(**given).sample)


@pytest.mark.parametrize("mode", FUSION_MODES)
def test_every_parameter_gets_a_gradient_in_the_first_steps(mode: str):
    """Those of the fusion by step 2, the others by step 3: the embedding's last convolution also starts at 0."""
    unet = tiny_unet().requires_grad_(False)
    net = controlnet_of(unet, mode)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    target, moved_by = torch.randn(2, 4, 4, 4), {}
    for step in range(4):
        optimizer.zero_grad()
        (steered(unet, [net], [control()]) - target).square().mean().backward()
        for name, parameter in net.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().max() > 0:
                moved_by.setdefault(name, step)
        optimizer.step()
    fusion = [name for name, _ in net.named_parameters() if name.startswith(("fusions.", "controlnet_"))]
    fusion = [name for name in fusion if not name.startswith("controlnet_cond_embedding")]
    assert fusion
    assert {name for name in fusion if moved_by.get(name, 9) > 1} <= {name for name in fusion if "key.bias" in name}
    # A bias of the keys shifts all scores of a query by the same value, which softmax cancels.
    silent = {name for name, _ in net.named_parameters() if name not in moved_by}
    assert {name for name in silent if "key.bias" not in name} == set()


@pytest.mark.parametrize("mode", FUSION_MODES)
def test_scale_0_gives_the_base_model_and_scale_1_uses_the_control(mode: str):
    unet = tiny_unet()
    net, base = moved(controlnet_of(unet, mode)), unet(**inputs()).sample
    assert torch.equal(steered(unet, [net], [control()], scale=0.0), base)
    with_control = steered(unet, [net], [control()])
    assert not torch.allclose(with_control, base, atol=1e-3)
    assert not torch.allclose(with_control, steered(unet, [net], [1 - control()]), atol=1e-4)
    assert torch.equal(unet(**inputs()).sample, base)  # nothing is left in the U-Net


def test_all_modes_give_different_outputs():
    unet = tiny_unet()
    outputs = [steered(unet, [moved(controlnet_of(unet, mode))], [control()]) for mode in FUSION_MODES]
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in outputs[:i])


def test_add_is_the_stock_controlnet():
    unet = tiny_unet()
    net = moved(controlnet_of(unet))
    stock = ControlNetModel.from_unet(
        unet, conditioning_channels=CONTROL_CHANNELS, conditioning_embedding_out_channels=embedding_channels(4)
    )
    stock.load_state_dict(net.state_dict())
    given = inputs()
    down, mid = stock(**given, controlnet_cond=control(), conditioning_scale=0.7, return_dict=False)
    expected = unet(**given, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    torch.testing.assert_close(steered(unet, [net], [control()], scale=0.7), expected, atol=1e-6, rtol=1e-5)


def test_film_and_concat_are_their_formulas():
    unet = tiny_unet()
    h, r = torch.randn(2, 16, 2, 2), torch.randn(2, 16, 2, 2)
    film = moved(controlnet_of(unet, "film")).fusions[-1]
    scale, shift = film.modulation(r).chunk(2, 1)
    torch.testing.assert_close(h + film(h, r, None), h * (1 + scale) + shift)
    concat = moved(controlnet_of(unet, "concat")).fusions[-1]
    torch.testing.assert_close(h + concat(h, r, None), concat.mix(torch.cat([h, r], 1)), atol=1e-5, rtol=1e-5)


def test_gates_depend_on_the_timestep():
    unet = tiny_unet()
    fusion = moved(controlnet_of(unet, "gated")).fusions[0]
    h = r = torch.randn(1, 8, 4, 4)
    early, late = (fusion(h, r, torch.full((1, 32), value)) for value in (-1.0, 2.0))
    assert not torch.allclose(early, late, atol=1e-3)


def test_the_encoding_of_places_does_not_depend_on_the_size_of_the_map():
    like = torch.zeros(1)
    coarse = places(16, (4, 4), like)
    fine = places(16, (12, 12), like).reshape(12, 12, 16)
    torch.testing.assert_close(fine[1::3, 1::3].flatten(0, 1), coarse)  # the middle cell of three has the same place
    assert (torch.cdist(coarse, coarse) + 10 * torch.eye(16)).min() > 0.5  # all places have different encodings


@pytest.mark.parametrize("side", [8, 16, 32])
def test_a_cell_attends_to_its_own_place_at_the_start(side: int):
    torch.manual_seed(0)
    fusion = CrossAttentionFusion(128, 32, 8)
    torch.nn.init.dirac_(fusion.value.weight)
    torch.nn.init.zeros_(fusion.value.bias)
    torch.nn.init.dirac_(fusion.output.weight)
    h, r = torch.randn(1, 128, side, side), torch.randn(1, 128, side, side)
    tokens = torch.nn.functional.adaptive_avg_pool2d(r, min(side, 16))
    there = torch.nn.functional.interpolate(fusion.norm_r(tokens), (side, side))
    with torch.no_grad():
        seen = fusion(h, r, None)
    similarity = torch.nn.functional.cosine_similarity(seen.flatten(2), there.flatten(2), dim=1)
    elsewhere = torch.nn.functional.cosine_similarity(seen.flatten(2), there.flip(-1).flatten(2), dim=1)
    assert similarity.mean() > 0.6  # of 32 × 32 cells, four share the 16 × 16 tokens
    assert elsewhere.mean() < 0.3


def test_several_nets_are_fused_one_after_another():
    unet = tiny_unet()
    one, other = moved(controlnet_of(unet, "add"), 1), moved(controlnet_of(unet, "add"), 2)
    controls = [control(), 1 - control()]
    both = steered(unet, [one, other], controls)
    torch.testing.assert_close(both, steered(unet, [other, one], controls[::-1]), atol=1e-5, rtol=1e-5)
    film = moved(controlnet_of(unet, "film"), 3)
    first = steered(unet, [film, one], controls)
    assert not torch.allclose(first, steered(unet, [one, film], controls[::-1]), atol=1e-4)
    # A new ControlNet has no effect, also beside one that has.
    torch.testing.assert_close(steered(unet, [one, controlnet_of(unet)], controls), steered(unet, [one], controls[:1]))


def test_guidance_repeats_the_control_for_both_halves():
    unet = tiny_unet()
    net, given = moved(controlnet_of(unet, "gated")), inputs(2)
    doubled = {name: torch.cat([value, value]) for name, value in given.items()}
    halves = steered(unet, [net], [control()], **doubled).chunk(2)
    torch.testing.assert_close(halves[0], halves[1])
    torch.testing.assert_close(halves[0], steered(unet, [net], [control()], **given), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("factor", "halvings"), [(1, 0), (4, 2), (8, 3), (16, 4), (32, 5)])
def test_the_embedding_fits_the_downsampling(factor: int, halvings: int):
    net = controlnet_of(tiny_unet(), downsampling=factor)
    assert len(net.config.conditioning_embedding_out_channels) == halvings + 1
    assert net.downsampling == factor
    assert net.controlnet_cond_embedding(control(1, 4 * factor)).shape == (1, 8, 4, 4)
    assert embedding_channels(8) == (16, 32, 96, 256)


def test_wrong_sizes_factors_and_modes_are_refused():
    unet = tiny_unet()
    with pytest.raises(ValueError, match="must be 16×16 pixels for each of 2 inputs"):
        steered(unet, [controlnet_of(unet)], [control(side=32)])
    with pytest.raises(ValueError, match="power of two, but is 6"):
        controlnet_of(unet, downsampling=6)
    with pytest.raises(ValueError, match="`fusion_mode` must be one of add, gated, .*'multiply'"):
        controlnet_of(unet, "multiply")


@pytest.mark.parametrize("mode", ["add", "cross_attention"])
def test_a_saved_and_loaded_net_gives_the_same_output(mode: str, tmp_path):
    unet = tiny_unet()
    net = moved(controlnet_of(unet, mode))
    net.save_pretrained(tmp_path / "one")
    again = FusionControlNetModel.from_pretrained(tmp_path / "one")
    assert again.config.fusion_mode == mode
    assert list(again.config.control_names) == ["text", "picture"]
    assert torch.equal(steered(unet, [again], [control()]), steered(unet, [net], [control()]))
    FusionControlNets.of([net, again]).save_pretrained(tmp_path / "two")
    both = FusionControlNets.from_pretrained(tmp_path / "two")
    assert torch.equal(steered(unet, list(both.nets), [control()] * 2), steered(unet, [net, again], [control()] * 2))


def test_add_runs_in_a_stock_pipeline():
    """The base model is stock as well: a VAE with scalar scaling, epsilon prediction, CLIP."""
    base = tiny_pipeline("epsilon")
    torch.manual_seed(0)
    net = FusionControlNetModel.from_unet(base.unet, downsampling=base.vae_scale_factor)
    pipeline = StableDiffusionControlNetPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        controlnet=moved(net),
        scheduler=base.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    control_image = torch.rand(1, 3, 8, 8)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent", "height": 8, "width": 8}
    noise = torch.randn(1, 4, 4, 4)
    stock = pipeline("a red poster", control_image, latents=noise.clone(), **call).images

    def ours() -> Tensor:
        with steering(base.unet, [net], [control_image]):
            return base("a red poster", latents=noise.clone(), **call).images

    torch.testing.assert_close(ours(), stock, atol=1e-4, rtol=1e-4)

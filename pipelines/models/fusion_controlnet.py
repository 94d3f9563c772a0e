"""ControlNet with a choice of how its features meet those of the U-Net it steers.

Shapes: B pictures, C control channels, H W control pixels, n skip features, c h w one skip feature (level by level), T
width of the time embedding, N control tokens.

The trunk is a copy of the U-Net's encoder that also sees the control image (Zhang, Rao and Agrawala 2023, "Adding
Conditional Control to Text-to-Image Diffusion Models"). Its feature r and the U-Net's feature h of the same place are
fused on the U-Net's skips and after its middle, with s the conditioning scale:

    add               h + s Z(r)                           Z a 1×1 convolution that starts at 0 (ibid.)
    gated             h + s tanh(G(t)) P(r)                G(t) from the time embedding, a gate per channel, starts at 0
    concat            h + s (W [h, r] - h)                 W a 1×1 convolution that starts as [identity, 0]
    film              h + s (scale(r) h + shift(r))        1×1 convolutions that start at 0 (Perez et al. 2018)
    cross_attention   h + s O(attention(h, tokens of r))   O starts at 0; tokens are r pooled to at most 16 × 16

so at step 0, and at s = 0 ever after, the output is the U-Net's own. In each mode one factor is zero at the start and
the other is not: both zero would never train.

`steering` hangs the fusion into a U-Net for the calls made inside it; the U-Net itself stays as it is. This file is
shipped beside the weights of published models, so it imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ControlNetModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

FUSION_MODES = ("add", "gated", "concat", "film", "cross_attention")
CONTROL_KINDS = ("image", "masks", "classes")
_EMBEDDING_CHANNELS = (16, 32, 96, 256)
_TOKEN_SIDE = 16
# How strongly a query prefers its own place at the start: over 16 × 16 tokens, most of its attention falls there.
_NEARNESS = 4.0
# What a ControlNet takes over from the U-Net's config; the rest of it is the trunk's own.
_FROM_UNET = (
    "in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type", "only_cross_attention",
    "block_out_channels", "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn",
    "norm_num_groups", "norm_eps", "cross_attention_dim", "transformer_layers_per_block", "encoder_hid_dim",
    "encoder_hid_dim_type", "attention_head_dim", "num_attention_heads", "use_linear_projection", "class_embed_type",
    "addition_embed_type", "addition_time_embed_dim", "num_class_embeds", "upcast_attention",
    "resnet_time_scale_shift", "projection_class_embeddings_input_dim", "addition_embed_type_num_heads",
)  # fmt: skip


class FusionControlNetModel(ControlNetModel):
    """A trunk that reads the control image, and the fusion of its features with a U-Net's.

    With `fusion_mode` "add" the weights, and what `forward` gives, are those of a stock `ControlNetModel`.

    Args:
        fusion_mode: one of `FUSION_MODES`.
        control_kind: what the control channels are: "image" (RGB), "masks" (grey, one a channel) or "classes" (one-hot
            by class id). All in [0, 1].
        control_names: of the control channels or classes, for those who use the model.
        **kwargs: those of `ControlNetModel`.

    Raises:
        ValueError: an unknown mode or kind.
    """

    controlnet_down_blocks: nn.ModuleList
    controlnet_mid_block: Any

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = ("DownBlock2D",),
        mid_block_type: str | None = "UNetMidBlock2D",
        only_cross_attention: bool | tuple[bool] = False,
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 64,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        projection_class_embeddings_input_dim: int | None = None,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = _EMBEDDING_CHANNELS,
        global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64,
        fusion_mode: str = "add",
        control_kind: str = "image",
        control_names: tuple[str, ...] = (),
    ):
        for name, value, known in (
            ("fusion_mode", fusion_mode, FUSION_MODES),
            ("control_kind", control_kind, CONTROL_KINDS),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, but is {value!r}")
        own = {"self", "fusion_mode", "control_kind", "control_names"}
        arguments = {name: value for name, value in locals().items() if name in _INIT_KEYS - own}
        super().__init__(**arguments)
        widths = [conv.in_channels for conv in (*self.controlnet_down_blocks, self.controlnet_mid_block)]
        self.fusions: nn.ModuleList | None = None
        if fusion_mode != "add":  # whose zero convolutions are the parent's
            maker = {
                "gated": GatedFusion, "concat": ConcatFusion, "film": FilmFusion,
                "cross_attention": CrossAttentionFusion,
            }[fusion_mode]  # fmt: skip
            time_width = self.time_embedding.linear_2.out_features
            self.fusions = nn.ModuleList(maker(width, time_width, norm_num_groups or 1) for width in widths)
            # The fusions have projections of their own; the trunk hands on its features as they are.
            self.controlnet_down_blocks = nn.ModuleList(nn.Identity() for _ in self.controlnet_down_blocks)
            self.controlnet_mid_block = nn.Identity()

    @classmethod
    def from_unet(  # type: ignore[override]
        cls,
        unet: Any,
        *,
        fusion_mode: str = "add",
        downsampling: int = 8,
        conditioning_channels: int = 3,
        control_kind: str = "image",
        control_names: Sequence[str] = (),
    ) -> FusionControlNetModel:
        """A ControlNet whose trunk starts as the encoder of `unet` (UNet2DConditionModel).

        Args:
            downsampling: pixels of the control image per cell of the U-Net's input, along a side: the VAE's factor for
                latent diffusion, 1 for a U-Net of pixels.

        Raises:
            ValueError: a factor that is no power of two.
        """
        config = {name: unet.config[name] for name in _FROM_UNET if name in unet.config}
        controlnet = cls(
            **config,
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=embedding_channels(downsampling),
            fusion_mode=fusion_mode,
            control_kind=control_kind,
            control_names=tuple(control_names),
        )
        for name in ("conv_in", "time_embedding", "class_embedding", "add_embedding", "down_blocks", "mid_block"):
            source = getattr(unet, name, None)
            if source is not None:
                getattr(controlnet, name).load_state_dict(source.state_dict())
        return controlnet

    @property
    def downsampling(self) -> int:
        """Pixels of the control image per cell of the U-Net's input, along a side."""
        return 2 ** (len(self.config.conditioning_embedding_out_channels) - 1)

    def features(self, sample: Tensor, timestep: Any, control: Tensor, condition: Mapping[str, Any]) -> TrunkFeatures:
        """What the trunk makes of a noisy input (B C h w) and a control (B C H W, in [0, 1]).

        Args:
            condition: the U-Net's own arguments `encoder_hidden_states`, `class_labels`, `added_cond_kwargs`.
        """
        known = ("encoder_hidden_states", "class_labels", "added_cond_kwargs")
        arguments = {name: condition.get(name) for name in known}
        skips, middle = self(sample, timestep, controlnet_cond=control.to(sample.dtype), return_dict=False, **arguments)
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        return TrunkFeatures([*skips, middle], self.time_embedding(self.time_proj(times).to(sample.dtype)))

    def fuse(self, place: int, h: Tensor, features: TrunkFeatures, scale: float = 1.0) -> Tensor:
        """`h` (B c h w), the U-Net's feature at `place` (skips in the order they are made, then the middle), steered
        with s = `scale`."""
        r = features.of_place[place]
        change = r if self.fusions is None else self.fusions[place](h, r, features.time)
        return h + scale * change.to(h.dtype)


_INIT_KEYS = set(FusionControlNetModel._get_init_keys(FusionControlNetModel))


@dataclass
class TrunkFeatures:
    """of_place: r of every skip, then of the middle, each B c h w; time: B T."""

    of_place: list[Tensor]
    time: Tensor


class FusionControlNets(ModelMixin, ConfigMixin):
    """Several ControlNets as one component of a pipeline; each fuses with what those before it have left.

    Of "add" and "gated" the order does not matter, of the others it does: they read the U-Net's feature as the nets
    before them have changed it. Every trunk sees the noisy input and its own control only.

    Args:
        configs: one for each net.
    """

    @register_to_config
    def __init__(self, configs: Sequence[dict[str, Any]] = ()):
        super().__init__()
        self.nets = nn.ModuleList(FusionControlNetModel.from_config(dict(config)) for config in configs)

    @classmethod
    def of(cls, nets: Sequence[FusionControlNetModel]) -> FusionControlNets:
        """These nets, their weights shared."""
        together = cls([{k: v for k, v in net.config.items() if not k.startswith("_")} for net in nets])
        together.nets = nn.ModuleList(nets)
        return together


def as_nets(controlnet: Any) -> list[FusionControlNetModel]:
    """The single nets of a FusionControlNetModel or FusionControlNets, in the order in which they fuse."""
    return list(controlnet.nets) if hasattr(controlnet, "nets") else [controlnet]


def embedding_channels(downsampling: int) -> tuple[int, ...]:
    """Channels of the control image's embedding, which halves the sides between one and the next; 8 gives the stock
    (16, 32, 96, 256).

    Raises:
        ValueError: no power of two.
    """
    halvings = int(math.log2(downsampling)) if downsampling >= 1 else -1
    if 2**halvings != downsampling:
        raise ValueError(f"`downsampling` must be a power of two, but is {downsampling}")
    widest = _EMBEDDING_CHANNELS[-1:] * max(0, halvings + 1 - len(_EMBEDDING_CHANNELS))
    return (_EMBEDDING_CHANNELS + widest)[: halvings + 1]


@contextmanager
def steering(
    unet: nn.Module,
    nets: Sequence[FusionControlNetModel],
    controls: Sequence[Tensor],
    scale_of: Callable[[int, Any], Any] = lambda net, timestep: 1.0,
) -> Iterator[None]:
    """Inside, every call of `unet` (a UNet2DConditionModel) is steered by `nets`, one after another.

    Args:
        controls: for each net B C H W in [0, 1]; a batch that is a multiple of B (classifier-free guidance) repeats it.
        scale_of: (number of the net, timestep) → s; a net with s = 0 does not run.

    Raises:
        ValueError: a control that does not fit the U-Net's input.
    """
    steered = _SteeredCall(unet, nets, controls, scale_of)
    with ExitStack() as stack:
        for hook in steered.hooks():
            stack.callback(hook.remove)
        yield


class _SteeredCall:
    """The hooks of `steering`. Trunks run before the U-Net does; skips are fused where an up block takes them."""

    def __init__(self, unet: Any, nets: Sequence[Any], controls: Sequence[Tensor], scale_of: Callable[[int, Any], Any]):
        self.unet, self.nets, self.controls, self.scale_of = unet, nets, controls, scale_of
        self.running: list[tuple[Any, TrunkFeatures, Any]] = []
        # The number of the first skip that each up block takes; the last are taken first.
        taken = [len(block.resnets) for block in unet.up_blocks]
        self.skips = sum(taken)
        self.first = [self.skips - sum(taken[: i + 1]) for i in range(len(taken))]

    def hooks(self) -> list[Any]:
        unet = self.unet
        hooks = [unet.register_forward_pre_hook(self._before, with_kwargs=True)]
        hooks.append(unet.mid_block.register_forward_hook(lambda module, args, h: self._fused(self.skips, h)))
        for first, block in zip(self.first, unet.up_blocks, strict=True):
            hooks.append(block.register_forward_pre_hook(self._at_up_block(first), with_kwargs=True))
        return hooks

    def _before(self, unet: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)), **kwargs}
        sample, timestep = given.pop("sample"), given.pop("timestep")
        self.running = []
        for number, (net, control) in enumerate(zip(self.nets, self.controls, strict=True)):
            expected = tuple(side * net.downsampling for side in sample.shape[-2:])
            if tuple(control.shape[-2:]) != expected or len(sample) % len(control):
                raise ValueError(
                    f"the control must be {expected[0]}×{expected[1]} pixels for each of {len(sample)} inputs, but is "
                    f"{tuple(control.shape)}"
                )
            scale = self.scale_of(number, timestep)
            if scale:
                control = control.to(sample.device).repeat(len(sample) // len(control), 1, 1, 1)
                self.running.append((net, net.features(sample, timestep, control, given), scale))

    def _fused(self, place: int, h: Tensor) -> Tensor:
        for net, features, scale in self.running:
            h = net.fuse(place, h, features, scale)
        return h

    def _at_up_block(self, first: int) -> Callable[..., Any]:
        def fuse_skips(block: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            skips = kwargs["res_hidden_states_tuple"]
            fused = tuple(self._fused(first + i, h) for i, h in enumerate(skips))
            return args, {**kwargs, "res_hidden_states_tuple": fused}

        return fuse_skips


def _zero(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GatedFusion(nn.Module):
    """tanh(G(t)) P(r): a gate per channel that depends on the timestep and starts at 0."""

    def __init__(self, width: int, time_width: int, groups: int):
        super().__init__()
        self.projection = nn.Conv2d(width, width, 1)
        self.gate = _zero(nn.Linear(time_width, width))

    def forward(self, h: Tensor, r: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(self.gate(F.silu(time)))[:, :, None, None] * self.projection(r)


class ConcatFusion(nn.Module):
    """W [h, r] - h with a 1×1 convolution W."""

    def __init__(self, width: int, time_width: int, groups: int):
        super().__init__()
        self.mix = _zero(nn.Conv2d(2 * width, width, 1))
        with torch.no_grad():
            self.mix.weight[:, :width, 0, 0] = torch.eye(width)

    def forward(self, h: Tensor, r: Tensor, time: Tensor) -> Tensor:
        # (W_h - 1) h + W_r r rather than W [h, r] - h, which would round to something else than 0 at the start.
        weight, width = self.mix.weight, h.shape[1]
        identity = torch.eye(width, dtype=weight.dtype, device=weight.device)[:, :, None, None]
        change = torch.cat([weight[:, :width] - identity, weight[:, width:]], 1)
        return F.conv2d(torch.cat([h, r.to(h.dtype)], 1), change.to(h.dtype), self.mix.bias.to(h.dtype))


class FilmFusion(nn.Module):
    """scale(r) h + shift(r), per channel and cell."""

    def __init__(self, width: int, time_width: int, groups: int):
        super().__init__()
        self.modulation = _zero(nn.Conv2d(width, 2 * width, 1))

    def forward(self, h: Tensor, r: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulation(r).chunk(2, dim=1)
        return scale * h + shift


class CrossAttentionFusion(nn.Module):
    """Every cell of h attends to tokens of r.

    Queries and keys carry sinusoidal places, in each head, so that a cell looks at its own place at the start; from
    there it learns where else to look. Without that, all cells get the mean of all tokens, and it takes long to leave.
    """

    def __init__(self, width: int, time_width: int, groups: int):
        super().__init__()
        self.norm_h, self.norm_r = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.query, self.key, self.value = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.output = _zero(nn.Conv2d(width, width, 1))
        self.heads = next(heads for heads in (width // 32, width // 16, width // 8, 1) if heads and width % heads == 0)
        self.nearness = nn.Parameter(torch.full((self.heads, 1, 1), _NEARNESS))

    def forward(self, h: Tensor, r: Tensor, time: Tensor) -> Tensor:
        tokens = self.norm_r(F.adaptive_avg_pool2d(r, [min(side, _TOKEN_SIDE) for side in r.shape[-2:]])).to(h.dtype)
        query = self._heads(self.query(self.norm_h(h).to(h.dtype)))
        key, value = self._heads(self.key(tokens)), self._heads(self.value(tokens))
        of_cells, of_tokens = (places(query.shape[-1], x.shape[-2:], query) for x in (h, tokens))
        query = query + self.nearness.to(query.dtype) * of_cells
        attended = F.scaled_dot_product_attention(query, key + of_tokens, value).transpose(2, 3).reshape(h.shape)
        return self.output(attended)

    def _heads(self, x: Tensor) -> Tensor:
        """B c h w → B heads (h w) c/heads."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)


def places(channels: int, size: Sequence[int], like: Tensor) -> Tensor:
    """Sinusoidal encoding of the places of h × w cells, in [-1, 1]; (h w) × channels, on the device of `like`.

    A quarter of the channels each for sin and cos of row and column; frequencies from half a period over the picture
    up to one every two of 16 cells. Places alike in maps of another size are alike.
    """
    count = max(1, channels // 4)
    frequencies = math.pi * _TOKEN_SIDE ** torch.linspace(0, 1, count, device=like.device)
    height, width = size
    rows, columns = ((torch.arange(n, device=like.device) + 0.5) / n for n in (height, width))
    angles_y = (rows[:, None] * frequencies)[:, None].expand(-1, width, -1)
    angles_x = (columns[:, None] * frequencies)[None].expand(height, -1, -1)
    encoded = torch.cat([angles_y.sin(), angles_y.cos(), angles_x.sin(), angles_x.cos()], -1).flatten(0, 1)
    return F.pad(encoded[:, :channels], (0, max(0, channels - 4 * count))).to(like.dtype)

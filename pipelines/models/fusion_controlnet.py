"""ControlNet with a choice of how its features are fused with those of the U-Net that it steers.

Shapes: B images, C control channels, H W control pixels, c h w one feature of the U-Net, T width of the time embedding.

The trunk is a copy of the U-Net's encoder that also sees the control image (Zhang, Rao and Agrawala 2023, "Adding
Conditional Control to Text-to-Image Diffusion Models"). The trunk's feature r and the U-Net's feature h of the same
place are fused on the U-Net's skip connections and after its middle block. With the conditioning scale s:

    add               h + s Z(r)                           Z a 1×1 convolution that starts at 0 (as in that paper)
    gated             h + s tanh(G(t)) P(r)                G(t) from the time embedding, a gate per channel, starts at 0
    concat            h + s (W [h, r] - h)                 W a 1×1 convolution that starts as [identity, 0]
    film              h + s (scale(r) h + shift(r))        1×1 convolutions that start at 0 (Perez et al. 2018)
    cross_attention   h + s O(attention(h, tokens of r))   O starts at 0; tokens are r pooled to at most 16 × 16

At step 0, and at s = 0 also later, the output is therefore exactly that of the U-Net alone. In each mode one factor is
zero at the start and the other is not; if both were zero, neither would get a gradient.

`steering` attaches the fusion to a U-Net for the calls inside its context; the U-Net itself is not changed. This file
is shipped beside the weights of published models, so it imports no other file of Halftone.
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
# How strongly a query prefers its own place at the start: most of its attention over 16 × 16 tokens is then there.
_NEARNESS = 4.0
# What a ControlNet copies from the U-Net's config.
_FROM_UNET = (
    "in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type", "only_cross_attention",
    "block_out_channels", "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn",
    "norm_num_groups", "norm_eps", "cross_attention_dim", "transformer_layers_per_block", "encoder_hid_dim",
    "encoder_hid_dim_type", "attention_head_dim", "num_attention_heads", "use_linear_projection", "class_embed_type",
    "addition_embed_type", "addition_time_embed_dim", "num_class_embeds", "upcast_attention",
    "resnet_time_scale_shift", "projection_class_embeddings_input_dim", "addition_embed_type_num_heads",
)  # fmt: skip


class FusionControlNetModel(ControlNetModel):
    """A trunk that reads the control image, and the fusion of its features with those of a U-Net.

    With `fusion_mode` "add", the weights and the output of `forward` are those of a stock `ControlNetModel`.

    Args:
        fusion_mode: one of `FUSION_MODES`.
        control_kind: meaning of the control channels: "image" (RGB), "masks" (one grey mask per channel) or "classes"
            (one-hot class ids). All values are in [0, 1].
        control_names: names of the control channels or classes, for users of the model.
        **kwargs: arguments of `ControlNetModel`.

    Raises:
        ValueError: `fusion_mode` or `control_kind` is unknown.
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
        if fusion_mode != "add":  # "add" uses the zero convolutions of the parent class
            maker = {
                "gated": GatedFusion, "concat": ConcatFusion, "film": FilmFusion,
                "cross_attention": CrossAttentionFusion,
            }[fusion_mode]  # fmt: skip
            time_width = self.time_embedding.linear_2.out_features
            self.fusions = nn.ModuleList(maker(width, time_width, norm_num_groups or 1) for width in widths)
            # The fusions have their own projections, so the trunk returns its features unprojected.
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
                latent diffusion, 1 for a U-Net on pixels.

        Raises:
            ValueError: `downsampling` is not a power of two.
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
        """Run the trunk on a noisy input (B C h w) and a control (B C H W, in [0, 1]).

        Args:
            condition: the U-Net's own arguments `encoder_hidden_states`, `class_labels`, `added_cond_kwargs`.
        """
        known = ("encoder_hidden_states", "class_labels", "added_cond_kwargs")
        arguments = {name: condition.get(name) for name in known}
        skips, middle = self(sample, timestep, controlnet_cond=control.to(sample.dtype), return_dict=False, **arguments)
        times = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep)
        times = times.to(sample.device).reshape(-1).expand(sample.shape[0])
        return TrunkFeatures([*skips, middle], self.time_embedding(self.time_proj(times).to(sample.dtype)))

    def fuse(self, place: int, h: Tensor, features: TrunkFeatures, scale: float = 1.0) -> Tensor:
        """Fuse the U-Net's feature `h` (B c h w) with the trunk's feature of the same place, with s = `scale`.

        Args:
            place: number of the skip, in the order in which the encoder makes them; the middle block comes after them.
        """
        r = features.of_place[place]
        change = r if self.fusions is None else self.fusions[place](h, r, features.time)
        return h + scale * change.to(h.dtype)


_INIT_KEYS = set(FusionControlNetModel._get_init_keys(FusionControlNetModel))


@dataclass
class TrunkFeatures:
    """Output of a trunk. of_place: r of every skip and then of the middle, each B c h w; time: its embedding, B T."""

    of_place: list[Tensor]
    time: Tensor


class FusionControlNets(ModelMixin, ConfigMixin):
    """Several ControlNets as one component of a pipeline, whose features are fused with the U-Net's one after another.

    The order does not matter for "add" and "gated". It matters for the other modes, which read the U-Net's feature as
    the ControlNets before them have changed it. Each trunk sees only the noisy input and its own control.

    Args:
        configs: one config for each ControlNet.
    """

    @register_to_config
    def __init__(self, configs: Sequence[dict[str, Any]] = ()):
        super().__init__()
        self.nets = nn.ModuleList(FusionControlNetModel.from_config(dict(config)) for config in configs)

    @classmethod
    def of(cls, nets: Sequence[FusionControlNetModel]) -> FusionControlNets:
        """Combine these ControlNets; their weights are shared, not copied."""
        together = cls([{k: v for k, v in net.config.items() if not k.startswith("_")} for net in nets])
        together.nets = nn.ModuleList(nets)
        return together


def as_nets(controlnet: Any) -> list[FusionControlNetModel]:
    """Return a FusionControlNetModel, or each one of FusionControlNets, as a list in the order of fusion."""
    return list(controlnet.nets) if hasattr(controlnet, "nets") else [controlnet]


def embedding_channels(downsampling: int) -> tuple[int, ...]:
    """Return the channels of the control image's embedding; its sides are halved between one entry and the next.

    A `downsampling` of 8 gives the stock channels (16, 32, 96, 256).

    Raises:
        ValueError: `downsampling` is not a power of two.
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
    """Steer every call of `unet` (a UNet2DConditionModel) inside this context by `nets`, one after another.

    Args:
        controls: the control of each net, B C H W in [0, 1]. It is repeated if the batch of the U-Net's input is a
            multiple of B, as with classifier-free guidance.
        scale_of: (index of the net, timestep) → conditioning scale s; a net with s = 0 does not run.

    Raises:
        ValueError: a control does not fit the U-Net's input.
    """
    steered = _SteeredCall(unet, nets, controls, scale_of)
    with ExitStack() as stack:
        for hook in steered.hooks():
            stack.callback(hook.remove)
        yield


class _SteeredCall:
    """The hooks of `steering`: one before the U-Net, one after its middle block, and one before each up block.

    A stock U-Net can only add a ControlNet's features to its own (`down_block_additional_residuals`). The fusion modes
    other than "add" also have to read the U-Net's features, which exist only during its forward pass; hooks reach them
    without a U-Net class of our own, so that any stock U-Net can be steered and published unchanged.
    """

    def __init__(self, unet: Any, nets: Sequence[Any], controls: Sequence[Tensor], scale_of: Callable[[int, Any], Any]):
        self.unet, self.nets, self.controls, self.scale_of = unet, nets, controls, scale_of
        self.running: list[tuple[Any, TrunkFeatures, Any]] = []
        # The index of the first skip that each up block takes. Up blocks take the skips from the last to the first.
        taken = [len(block.resnets) for block in unet.up_blocks]
        self.skips = sum(taken)
        self.first = [self.skips - sum(taken[: i + 1]) for i in range(len(taken))]

    def hooks(self) -> list[Any]:
        unet = self.unet
        # Trunks need the U-Net's own arguments, so they run when it is called.
        hooks = [unet.register_forward_pre_hook(self._before, with_kwargs=True)]
        # What a forward hook returns replaces the output of the block.
        hooks.append(unet.mid_block.register_forward_hook(lambda module, args, h: self._fused(self.skips, h)))
        # Skips are fused where they are used rather than where they are made: a skip is also the input of the next
        # down block, which must see the U-Net's own feature.
        for first, block in zip(self.first, unet.up_blocks, strict=True):
            hooks.append(block.register_forward_pre_hook(self._at_up_block(first), with_kwargs=True))
        return hooks

    def _before(self, unet: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        # Callers may give these arguments by position or by name.
        given = {**dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)), **kwargs}
        sample, timestep = given.pop("sample"), given.pop("timestep")
        self.running = []
        for number, (net, control) in enumerate(zip(self.nets, self.controls, strict=True)):
            expected = tuple(side * net.downsampling for side in sample.shape[-2:])
            if tuple(control.shape[-2:]) != expected or sample.shape[0] % control.shape[0]:
                raise ValueError(
                    f"the control must be {expected[0]}×{expected[1]} pixels for each of {len(sample)} inputs, but has "
                    f"shape {tuple(control.shape)}; resize it, or pass one control for each input"
                )
            scale = self.scale_of(number, timestep)
            # A tensor is an input of an exported graph, which has no value yet.
            if isinstance(scale, Tensor) or scale:
                control = control.to(sample.device).repeat(sample.shape[0] // control.shape[0], 1, 1, 1)
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
    """Mode "gated", tanh(G(t)) P(r): a gate per channel that depends on the timestep and starts at 0."""

    def __init__(self, width: int, time_width: int, groups: int):
        super().__init__()
        self.projection = nn.Conv2d(width, width, 1)
        self.gate = _zero(nn.Linear(time_width, width))

    def forward(self, h: Tensor, r: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(self.gate(F.silu(time)))[:, :, None, None] * self.projection(r)


class ConcatFusion(nn.Module):
    """Mode "concat", W [h, r] - h with a 1×1 convolution W."""

    def __init__(self, width: int, time_width: int, groups: int):
        super().__init__()
        self.mix = _zero(nn.Conv2d(2 * width, width, 1))
        with torch.no_grad():
            self.mix.weight[:, :width, 0, 0] = torch.eye(width)

    def forward(self, h: Tensor, r: Tensor, time: Tensor) -> Tensor:
        # Computed as (W_h - 1) h + W_r r, because rounding would make W [h, r] - h differ from 0 at the start.
        weight, width = self.mix.weight, h.shape[1]
        identity = torch.eye(width, dtype=weight.dtype, device=weight.device)[:, :, None, None]
        change = torch.cat([weight[:, :width] - identity, weight[:, width:]], 1)
        return F.conv2d(torch.cat([h, r.to(h.dtype)], 1), change.to(h.dtype), self.mix.bias.to(h.dtype))


class FilmFusion(nn.Module):
    """Mode "film", scale(r) h + shift(r), per channel and cell."""

    def __init__(self, width: int, time_width: int, groups: int):
        super().__init__()
        self.modulation = _zero(nn.Conv2d(width, 2 * width, 1))

    def forward(self, h: Tensor, r: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulation(r).chunk(2, dim=1)
        return scale * h + shift


class CrossAttentionFusion(nn.Module):
    """Mode "cross_attention": every cell of h attends to tokens of r.

    A sinusoidal encoding of positions is added to queries and keys in each head, so that a cell attends to its own
    place at the start and then learns where else to attend. Without it, all cells get the mean of all tokens at the
    start, and training takes long to change that.
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
        """Split the channels into heads: B c h w → B heads (h w) c/heads."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)


def places(channels: int, size: Sequence[int], like: Tensor) -> Tensor:
    """Return a sinusoidal encoding of the places of h × w cells, in [-1, 1]: (h w) × channels, on the device of `like`.

    The sin and cos of row and column have a quarter of the channels each. Frequencies reach from half a period over
    the image to one period per two of 16 cells. The same place in maps of different sizes has the same encoding.
    """
    count = max(1, channels // 4)
    frequencies = math.pi * _TOKEN_SIDE ** torch.linspace(0, 1, count, device=like.device)
    height, width = size
    rows, columns = ((torch.arange(n, device=like.device) + 0.5) / n for n in (height, width))
    angles_y = (rows[:, None] * frequencies)[:, None].expand(-1, width, -1)
    angles_x = (columns[:, None] * frequencies)[None].expand(height, -1, -1)
    encoded = torch.cat([angles_y.sin(), angles_y.cos(), angles_x.sin(), angles_x.cos()], -1).flatten(0, 1)
    return F.pad(encoded[:, :channels], (0, max(0, channels - 4 * count))).to(like.dtype)

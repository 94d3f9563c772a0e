"""PatchTransformer2DModel: a transformer that denoises images or latents as a sequence of square patches.

Shapes: B batch, C channels, H W sides of the input (pixels or latent cells), p patch side,
N = H/p * W/p patches,
D hidden size, L tokens of the text condition, E its width.

It is a diffusion transformer (Peebles and Xie 2023, DiT: scale, shift and gate of each layer are computed from the
timestep, the class and the pooled text), with four changes:

- It can predict the clean image and return the flow that follows from it (Li and He 2025, JiT). Clean images lie near a
  manifold of few dimensions and noise does not, so that large patches of pixels can be predicted without an
  autoencoder. A patch enters through a bottleneck, as there.
- Convolutions at half of the resolution can follow the layers. They see across the borders of patches, and the noisy
  sample (Bao et al. 2023, U-ViT, add one convolution in pixels for the same reason).
- Patches attend to the tokens of the text as well as to each other, in the same softmax.
- Normalizations have no weights, and queries and keys are normalized, which allows large learning rates.

Almost all of its work consists of products of large matrices, which processors with bfloat16 instructions compute
several times faster than in float32.

This file is shipped beside the weights of published models, so it imports no other file of Halftone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

TIME_FEATURES = 256
# A flow is (x_t - x_0) / sigma. Below this sigma, errors of the predicted x_0 are not magnified further (JiT).
LEAST_SIGMA = 0.05
# Up to this number of tokens, plain matrix products are faster than the fused attention on a CPU.
PLAIN_ATTENTION_TOKENS = 256


class PatchTransformerOutput(NamedTuple):
    """Output of `PatchTransformer2DModel`.

    Args:
        sample: B C H W.
    """

    sample: Tensor


def normalized(x: Tensor) -> Tensor:
    """Normalize the last dimension to mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[-1:])


class PatchAttention(nn.Module):
    """Attention of the patches to each other and to the tokens of the text."""

    def __init__(self, hidden_size: int, num_heads: int, text_width: Optional[int]):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.to_text_kv = nn.Linear(text_width, 2 * hidden_size, bias=False) if text_width else None
        self.to_out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, text: Optional[Tensor]) -> Tensor:
        """x: B N D; text: B L E, or None without text."""
        q, k, v = self._heads(self.to_qkv(x), 3)
        if self.to_text_kv is not None:
            text_k, text_v = self._heads(self.to_text_kv(text), 2)
            k, v = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)
        q, k = normalized(q), normalized(k)
        few = not torch.compiler.is_exporting() and k.shape[2] <= PLAIN_ATTENTION_TOKENS  # one graph has all sizes
        if q.device.type == "cpu" and few:
            # For few patches, the backward pass of PyTorch's fused kernel for CPUs takes several times as long.
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            attended = scores.softmax(dim=-1).to(v.dtype) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, parts: int) -> Any:
        """Split B N (parts D) into `parts` tensors of shape B heads N D/heads."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class PatchTransformerBlock(nn.Module):
    """Attention and a gated MLP (SwiGLU: Shazeer 2020), each with scale, shift and gate from the condition."""

    def __init__(self, hidden_size: int, num_heads: int, text_width: Optional[int]):
        super().__init__()
        inner = 8 * hidden_size // 3 // 32 * 32 or 32
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.attention = PatchAttention(hidden_size, num_heads, text_width)
        self.into = nn.Linear(hidden_size, 2 * inner)
        self.out_of = nn.Linear(inner, hidden_size)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, text: Optional[Tensor]) -> Tensor:
        """x: B N D; condition: B D; text: B L E."""
        modulation = self.modulation(condition)[:, None].to(x.dtype)
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = modulation.chunk(6, dim=-1)
        hidden = torch.addcmul(shift_a, normalized(x), 1 + scale_a)
        x = torch.addcmul(x, gate_a, self.attention(hidden, text).to(x.dtype))
        hidden = torch.addcmul(shift_m, normalized(x), 1 + scale_m)
        gate, value = self.into(hidden).chunk(2, dim=-1)
        return torch.addcmul(x, gate_m, self.out_of(F.silu(gate) * value).to(x.dtype))


class PatchConvolutions(nn.Module):
    """Residual convolutions (3×3, at half of the resolution) after the layers of the transformer.

    Args:
        features: channels F that the patches give to each cell of 2 × 2 pixels.
        in_channels, out_channels: channels of the noisy sample and of the prediction.
        condition_width: width D of the condition.
        width: channels of the convolutions.
        num_layers: number of convolutions with `width` output channels.
    """

    def __init__(
        self, features: int, in_channels: int, out_channels: int, condition_width: int, width: int, num_layers: int
    ):
        super().__init__()
        self.first = nn.Conv2d(features + 4 * in_channels, width, 3, padding=1)
        self.modulation = nn.Linear(condition_width, 2 * width)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(num_layers - 1))
        self.last = nn.Conv2d(width, 4 * out_channels, 3, padding=1)
        for zero in (self.modulation, self.last):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, features: Tensor, sample: Tensor, condition: Tensor) -> Tensor:
        """features: B F H/2 W/2; sample: B C H W; condition: B D; returns B C H W."""
        hidden = torch.cat([features, F.pixel_unshuffle(sample, 2).to(features.dtype)], dim=1)
        # The layout in which convolutions of few channels are fastest, on CPUs and on GPUs.
        hidden = self.first(hidden.contiguous(memory_format=torch.channels_last))
        scale, shift = self.modulation(condition)[:, :, None, None].to(hidden.dtype).chunk(2, dim=1)
        hidden = F.silu(torch.addcmul(shift, hidden, 1 + scale))
        for layer in self.layers:
            hidden = hidden + F.silu(layer(hidden))
        # Half precision has steps of one grey level of 256 near white, so this is not left to autocast.
        with torch.autocast(sample.device.type, enabled=False):
            return F.pixel_shuffle(self.last(hidden.to(self.last.weight.dtype)), 2)


class PatchTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A transformer on patches, with the arguments of Diffusers' UNet2DConditionModel.

    Args:
        sample_size: side of the inputs that the model is trained on, or (height, width); other sizes can be generated,
            less well.
        in_channels: channels of the input; if there are more than `out_channels`, the first ones are the noisy sample.
        out_channels: channels of the output.
        patch_size: side p of a patch.
        hidden_size: width D of the layers.
        num_layers: number of blocks.
        num_attention_heads: number of attention heads; D / heads is the width of a head.
        bottleneck_size: width through which the values of a patch enter; 0 connects them directly.
        cross_attention_dim: width E of the text condition; None for a model without text.
        num_class_embeds: number of classes, including the null class; None for a model without classes.
        class_embed_type: "projection" for a model whose `class_labels` are vectors, as in UNet2DConditionModel.
        projection_class_embeddings_input_dim: width of these vectors.
        predicts_sample: whether the network predicts the clean sample, from which the returned flow is computed.
            Without it, the network predicts what is returned.
        num_train_timesteps: timestep of pure noise.
        conv_layers: number of convolutions after the layers, for an even `patch_size`; 0 for none.
        conv_width: channels of these convolutions.
        least_noise_level: noise level (0 to 1) below which the model has hardly been trained. Pipelines call it at no
            lower one, and end with the clean sample that it predicts there.
        restart_levels: noise levels (0 to 1) from which pipelines denoise a finished sample again, in this order.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PatchTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: Union[int, tuple] = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 8,
        hidden_size: int = 256,
        num_layers: int = 6,
        num_attention_heads: int = 4,
        bottleneck_size: int = 128,
        cross_attention_dim: Optional[int] = None,
        num_class_embeds: Optional[int] = None,
        predicts_sample: bool = True,
        num_train_timesteps: int = 1000,
        conv_layers: int = 0,
        conv_width: int = 64,
        least_noise_level: float = 0.0,
        restart_levels: Sequence[float] = (),
        class_embed_type: Optional[str] = None,
        projection_class_embeddings_input_dim: Optional[int] = None,
    ):
        super().__init__()
        if conv_layers and patch_size % 2:
            raise ValueError(f"`conv_layers` is {conv_layers}, which needs an even `patch_size`, not {patch_size}")
        width, values = hidden_size, patch_size**2
        into, patch_width = in_channels * values, out_channels * values
        self.convolutions = None
        if conv_layers:
            features = conv_width // 2
            patch_width = features * (patch_size // 2) ** 2
            self.convolutions = PatchConvolutions(features, in_channels, out_channels, width, conv_width, conv_layers)
        self.patch_in: nn.Module = nn.Linear(into, width)
        if bottleneck_size:
            self.patch_in = nn.Sequential(
                nn.Linear(into, bottleneck_size, bias=False), nn.Linear(bottleneck_size, width)
            )
        self.time_features = Timesteps(TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME_FEATURES, width)
        self.class_embedding: Optional[nn.Module] = None
        if class_embed_type == "projection":
            self.class_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, width)
        elif num_class_embeds:
            self.class_embedding = nn.Embedding(num_class_embeds, width)
        self.text_weights = nn.Linear(cross_attention_dim, 1, bias=False) if cross_attention_dim else None
        self.text_embedding = TimestepEmbedding(cross_attention_dim, width) if cross_attention_dim else None
        self.blocks = nn.ModuleList(
            PatchTransformerBlock(width, num_attention_heads, cross_attention_dim) for _ in range(num_layers)
        )
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, patch_width)
        # With convolutions, the last of them begins at zero instead.
        for last in (self.modulation_out, *([] if conv_layers else [self.patch_out])):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: Tensor,
        timestep: Union[Tensor, float, int],
        encoder_hidden_states: Optional[Tensor] = None,
        class_labels: Optional[Tensor] = None,
        return_dict: bool = True,
    ) -> Union[PatchTransformerOutput, tuple]:
        """Denoise.

        Args:
            sample: B C H W, noisy; H and W are multiples of the patch side.
            timestep: B or a number; from 0 for a clean sample to `num_train_timesteps` for noise.
            encoder_hidden_states: B L E; required by a model with text.
            class_labels: B, or B V for vectors of width V; required by a model with classes or with vectors.

        Returns:
            The prediction, B C H W, in the dtype of `sample`.
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        condition = self._condition(timesteps, encoder_hidden_states, class_labels)
        rows, columns = (side // self.config.patch_size for side in sample.shape[-2:])
        hidden = self.patch_in(self._to_patches(sample, rows, columns))
        hidden = hidden.to(sample.dtype) + positions(rows, columns, hidden.shape[-1], sample)
        for block in self.blocks:
            arguments = (hidden, condition, encoder_hidden_states)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden = block(*arguments)
        scale, shift = self.modulation_out(condition)[:, None].to(hidden.dtype).chunk(2, dim=-1)
        patches = self.patch_out(torch.addcmul(shift, normalized(hidden), 1 + scale))
        predicted = self._from_patches(patches, rows, columns)
        if self.convolutions is not None:
            predicted = self.convolutions(predicted, sample, condition)
        if self.config.predicts_sample:
            sigma = (timesteps / self.config.num_train_timesteps).float().clamp(min=LEAST_SIGMA)[:, None, None, None]
            noisy = sample[:, : self.config.out_channels]
            predicted = (noisy.to(sigma) - predicted.to(sigma)) / sigma
        predicted = predicted.to(sample.dtype)
        return PatchTransformerOutput(predicted) if return_dict else (predicted,)

    def _condition(self, timesteps: Tensor, text: Optional[Tensor], class_labels: Optional[Tensor]) -> Tensor:
        """Return the vector that modulates the layers: timestep, class and pooled text. B D."""
        condition = self.time_embedding(self.time_features(timesteps).to(self.modulation_out.weight.dtype))
        if self.class_embedding is not None:
            condition = condition + self.class_embedding(class_labels)
        if self.text_embedding is not None and self.text_weights is not None and text is not None:
            weights = self.text_weights(text).softmax(dim=1)
            condition = condition + self.text_embedding((weights.to(text.dtype) * text).sum(1))
        return F.silu(condition)

    def _to_patches(self, sample: Tensor, rows: int, columns: int) -> Tensor:
        """B C H W → B N (C p p)."""
        p = self.config.patch_size
        grid = sample.unflatten(3, (columns, p)).unflatten(2, (rows, p))
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _from_patches(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """B N (C p p) → B C H W. With convolutions: B N (F p/2 p/2) → B F H/2 W/2."""
        side = self.config.patch_size // (1 if self.convolutions is None else 2)
        grid = patches.unflatten(-1, (-1, side, side)).unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
        return grid.flatten(4).flatten(2, 3)


def positions(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """Return sine and cosine features of the position of each patch, in row order: N D, in the dtype of `like`.

    Positions are counted from the centre of the image, so that the centre stays the centre in other sizes.
    """
    quarter = width // 4
    frequencies = 0.5 * 100.0 ** -(torch.arange(quarter, device=like.device) / quarter)
    angles = []
    for count in (rows, columns):
        places = torch.arange(1 - count, count, 2, device=like.device) / 2
        angles.append(places[:, None] * frequencies * torch.pi)
    features = torch.cat(
        [
            torch.cat([angles[0].sin(), angles[0].cos()], -1)[:, None].expand(rows, columns, -1),
            torch.cat([angles[1].sin(), angles[1].cos()], -1)[None].expand(rows, columns, -1),
        ],
        dim=-1,
    )
    return F.pad(features.flatten(0, 1), (0, width - 4 * quarter)).to(like.dtype)

"""ImageCaptionModel: autoencoders of images and of captions that share one latent vector.

Shapes: B pairs, H W pixels, p patch side, C h w the feature map between pixels and latent vector, D size of the latent
vector, L tokens of a caption (`<START>` and `<END>` included), P prefix tokens, V size of the vocabulary.

The encoders of images and of captions each predict a Gaussian posterior over one vector of D numbers. Each decoder
reads such a vector, whichever encoder it comes from. Posterior means are scaled to a root mean square of 1, that is to
the sphere of radius √D, near which standard normal vectors lie too. Noise of a given size therefore has the same effect
throughout training (an encoder cannot drown it by making its latents larger), and the latents have the scale that a
latent prior needs.

This file is shipped beside the weights of published models, so it imports no other file of Halftone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

LOGVAR_RANGE = (-12.0, 3.0)
INITIAL_LOGVAR = -4.0  # a standard deviation of about 0.14
INITIAL_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # of the similarities in the contrastive loss, as in CLIP


class LatentPosterior(NamedTuple):
    """Gaussian posterior over latent vectors. mean: B D, with a root mean square of 1; logvar: B D."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Draw latents (B D) with standard normal `noise` (B D)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class ImageEncoder(nn.Module):
    """Encode images (B 3 H W in [-1, 1]) as posterior parameters (B 2D) by convolutions on patches and a linear map.

    The linear map is learned within a few hundred steps, and the convolutions only have to learn the rest. The
    maximum of each channel over all positions is passed on as well: captions mostly say what an image shows, wherever
    it is in the image.
    """

    def __init__(self, patch_size: int, map_channels: int, cells: int, latent_size: int, **blocks: Any):
        super().__init__()
        levels = len(blocks["block_out_channels"])
        factor = patch_size * 2 ** (levels - 1)
        self.patches = nn.PixelUnshuffle(patch_size)
        self.body = Encoder(
            in_channels=3 * patch_size**2,
            out_channels=map_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            double_z=False,
            mid_block_add_attention=False,
            **blocks,
        )
        self.shortcut = nn.Conv2d(3, map_channels, factor, stride=factor)
        self.out = nn.Linear(map_channels * (cells**2 + 1), 2 * latent_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        latent_map = self.body(self.patches(pixel_values))
        anywhere = latent_map.amax((2, 3))
        latent_map = latent_map + self.shortcut(pixel_values)
        return self.out(torch.cat([latent_map.flatten(1), anywhere], dim=1))


class ImageDecoder(nn.Module):
    """Decode latent vectors (B D) to images (B 3 H W) with the mirrored layers of the encoder."""

    def __init__(self, patch_size: int, map_channels: int, cells: int, latent_size: int, **blocks: Any):
        super().__init__()
        levels = len(blocks["block_out_channels"])
        factor = patch_size * 2 ** (levels - 1)
        self.into = nn.Linear(latent_size, map_channels * cells**2)
        self.latent_map = nn.Unflatten(1, (map_channels, cells, cells))
        self.body = Decoder(
            in_channels=map_channels,
            out_channels=3 * patch_size**2,
            up_block_types=("UpDecoderBlock2D",) * levels,
            mid_block_add_attention=False,
            **blocks,
        )
        self.pixels = nn.PixelShuffle(patch_size)
        self.shortcut = nn.ConvTranspose2d(map_channels, 3, factor, stride=factor)

    def forward(self, latents: Tensor) -> Tensor:
        latent_map = self.latent_map(self.into(latents))
        return self.pixels(self.body(latent_map)) + self.shortcut(latent_map)


class CaptionEncoder(nn.Module):
    """Encode token ids and their mask (B L, 1 for tokens, 0 for padding) as posterior parameters (B 2D).

    The states of a BERT encoder are averaged over all tokens except padding.
    """

    def __init__(self, config: BertConfig, latent_size: int):
        super().__init__()
        self.body = BertModel(config, add_pooling_layer=False)
        self.out = nn.Linear(config.hidden_size, 2 * latent_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, has_padding: bool | None = None) -> Tensor:
        attended = self._attended(attention_mask, has_padding)
        states = self.body(input_ids=input_ids, attention_mask=attended).last_hidden_state
        counted = attention_mask[..., None].to(states.dtype)
        return self.out((states * counted).sum(1) / counted.sum(1))

    def _attended(self, attention_mask: Tensor, has_padding: bool | None) -> Tensor | None:
        """Return the mask that Transformers makes of a B L mask; it reads the mask to know whether it needs one.

        On a GPU, the process would wait for that; so it is made here if `has_padding` is known.
        """
        if has_padding is None or self.body.config._attn_implementation != "sdpa":
            return attention_mask
        batch_size, length = attention_mask.shape
        return attention_mask.bool()[:, None, None].expand(batch_size, 1, length, length) if has_padding else None


class CaptionDecoder(nn.Module):
    """Decode captions with GPT-2, which continues a prefix of P tokens made from the latent vector."""

    def __init__(self, config: GPT2Config, latent_size: int, prefix_length: int):
        super().__init__()
        self.prefix_length = prefix_length
        self.prefix = nn.Linear(latent_size, prefix_length * config.n_embd)
        nn.init.normal_(self.prefix.weight, std=config.initializer_range)
        nn.init.zeros_(self.prefix.bias)
        self.body = GPT2LMHeadModel(config)

    def embed(self, latents: Tensor, input_ids: Tensor) -> Tensor:
        """Return the embeddings of prefix and tokens, B (P + L) width."""
        prefix = self.prefix(latents).unflatten(1, (self.prefix_length, -1))
        tokens = self.body.transformer.wte(input_ids)
        return torch.cat([prefix.to(tokens.dtype), tokens], dim=1)

    def forward(self, latents: Tensor, input_ids: Tensor) -> Tensor:
        """Predict the token after each token: logits, B L V.

        Attention is causal, so padding after a caption changes nothing.
        """
        embeds = self.embed(latents, input_ids)
        states = self.body.transformer(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return self.body.lm_head(states[:, self.prefix_length :])


class ImageCaptionModel(ModelMixin, ConfigMixin):
    """An autoencoder of images and one of captions that share one latent vector.

    Args:
        vocab_size: size V of the vocabulary.
        max_length: maximum number of tokens L.
        sample_size: side of the images in pixels.
        latent_size: size D of the latent vector.
        patch_size: side p of the pixel patches that the convolutions work on.
        block_out_channels: channels of each level; every level after the first halves the side.
        layers_per_block: residual blocks per level.
        norm_num_groups: number of groups for group normalization.
        map_channels: channels C of the feature map between the convolutions and the latent vector.
        text_hidden_size, num_attention_heads: hidden size and attention heads of the caption encoder and decoder.
        num_encoder_layers, num_decoder_layers: layers of the caption encoder and decoder.
        prefix_length: number of prefix tokens P.
        pad_token_id, start_token_id, end_token_id, unknown_token_id: ids of the tokenizer's special tokens.

    Raises:
        ValueError: `sample_size` is not a multiple of the image encoder's downsampling.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 8000,
        max_length: int = 100,
        sample_size: int = 256,
        latent_size: int = 1024,
        patch_size: int = 4,
        block_out_channels: tuple[int, ...] = (128, 256, 384, 512),
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        map_channels: int = 32,
        text_hidden_size: int = 512,
        num_attention_heads: int = 8,
        num_encoder_layers: int = 4,
        num_decoder_layers: int = 6,
        prefix_length: int = 8,
        pad_token_id: int = 0,
        start_token_id: int = 1,
        end_token_id: int = 2,
        unknown_token_id: int | None = 3,
    ):
        super().__init__()
        factor = patch_size * 2 ** (len(block_out_channels) - 1)
        if sample_size % factor:
            raise ValueError(
                f"`sample_size` must be a multiple of {factor} (`patch_size` and a halving for each level after the "
                f"first), but is {sample_size}"
            )
        self._build_image_part(sample_size // factor)
        self._build_caption_part()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        self._start_with_narrow_posteriors()

    def _build_image_part(self, cells: int) -> None:
        config = self.config
        shape = (config.patch_size, config.map_channels, cells, config.latent_size)
        blocks = {
            "block_out_channels": tuple(config.block_out_channels),
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_num_groups,
        }
        self.image_encoder = ImageEncoder(*shape, **blocks)
        self.image_decoder = ImageDecoder(*shape, **blocks)

    def _build_caption_part(self) -> None:
        config = self.config
        width = config.text_hidden_size
        encoder = BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=width,
            num_hidden_layers=config.num_encoder_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=4 * width,
            max_position_embeddings=config.max_length,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=config.pad_token_id,
        )
        decoder = GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.prefix_length + config.max_length,
            n_embd=width,
            n_layer=config.num_decoder_layers,
            n_head=config.num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=config.start_token_id,
            eos_token_id=config.end_token_id,
            # `generate` feeds padding to captions that have ended; GPT-2 warns about that if it knows a padding token.
            pad_token_id=None,
            tie_word_embeddings=False,  # Diffusers does not save weights that share memory
        )
        self.caption_encoder = CaptionEncoder(encoder, config.latent_size)
        self.caption_decoder = CaptionDecoder(decoder, config.latent_size, config.prefix_length)

    @torch.no_grad()
    def _start_with_narrow_posteriors(self) -> None:
        """Initialize the posteriors' standard deviation to about 0.14; at about 1, noise drowns the first latents."""
        size = self.config.latent_size
        for out in (self.image_encoder.out, self.caption_encoder.out):
            out.weight[size:] *= 0.1
            out.bias[size:] = INITIAL_LOGVAR

    @apply_forward_hook
    def encode_image(self, pixel_values: Tensor) -> LatentPosterior:
        """Return the posterior of images `pixel_values` (B 3 H W in [-1, 1])."""
        return _posterior(self.image_encoder(pixel_values))

    @apply_forward_hook
    def encode_caption(
        self, input_ids: Tensor, attention_mask: Tensor, has_padding: bool | None = None
    ) -> LatentPosterior:
        """Return the posterior of captions.

        Args:
            input_ids, attention_mask: B L; the mask is 1 for tokens and 0 for padding.
            has_padding: whether the mask has a 0; None reads it, which makes the process wait for a GPU.
        """
        return _posterior(self.caption_encoder(input_ids, attention_mask, has_padding))

    @apply_forward_hook
    def decode_image(self, latents: Tensor) -> Tensor:
        """Decode latent vectors (B D) to images (B 3 H W), which are about in [-1, 1] but not clamped."""
        return self.image_decoder(latents.to(self.image_decoder.into.weight.dtype))

    @apply_forward_hook
    def caption_logits(self, latents: Tensor, input_ids: Tensor) -> Tensor:
        """Return the logits (B L V) of the token after each one of `input_ids` (B L), given latent vectors (B D)."""
        return self.caption_decoder(latents.to(self.caption_decoder.prefix.weight.dtype), input_ids)

    @apply_forward_hook
    def similarity_scale(self) -> Tensor:
        """Return the learned inverse temperature of the contrastive loss, capped as in CLIP."""
        # The excess over the cap is subtracted without a gradient. With `clamp`, the gradient would be 0 above the cap,
        # and the scale could never decrease again.
        above = (self.logit_scale - math.log(LARGEST_SCALE)).clamp(min=0).detach()
        return (self.logit_scale - above).exp()

    @apply_forward_hook
    @torch.no_grad()
    def generate_captions(
        self,
        latents: Tensor,
        max_length: int | None = None,
        min_length: int = 0,
        num_beams: int = 1,
        logits_processor: Sequence[Any] = (),
    ) -> Tensor:
        """Generate captions as token ids (B T), with the `generate` of Transformers and its cache of keys and values.

        Args:
            latents: B D.
            max_length: maximum number of tokens, including `<START>` and `<END>`; by default the model's maximum.
            min_length: minimum number of tokens before `<END>`, including `<START>`.
            num_beams: number of beams; 1 is greedy decoding.
            logits_processor: logits processors of Transformers, applied before each token is chosen.

        Returns:
            The ids after `<START>`: a caption, `<END>`, and padding.
        """
        config, decoder = self.config, self.caption_decoder
        start = torch.full((len(latents), 1), config.start_token_id, device=latents.device)
        embeds = decoder.embed(latents.to(decoder.prefix.weight.dtype), start)
        never = {config.pad_token_id, config.start_token_id, config.unknown_token_id} - {None, config.end_token_id}
        return decoder.body.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            max_new_tokens=(max_length or config.max_length) - 1,
            min_new_tokens=max(0, min_length - 1) or None,
            num_beams=num_beams,
            do_sample=False,
            logits_processor=list(logits_processor),
            suppress_tokens=sorted(never),
            renormalize_logits=True,  # after suppression, because beams are compared by their likelihoods
            eos_token_id=config.end_token_id,
            pad_token_id=config.pad_token_id,
        )

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[LatentPosterior, LatentPosterior]:
        """Return the posteriors of images and of captions."""
        return self.encode_image(pixel_values), self.encode_caption(input_ids, attention_mask)


def _posterior(numbers: Tensor) -> LatentPosterior:
    """Convert posterior parameters (B 2D) to a posterior in float32."""
    mean, logvar = numbers.float().chunk(2, dim=1)
    return LatentPosterior(F.normalize(mean, dim=1) * mean.shape[1] ** 0.5, logvar.clamp(*LOGVAR_RANGE))

"""Pictures to captions, captions to pictures, and new pairs of both, through one latent vector.

Shapes: B pictures or captions, R side of a picture in pixels, D latent vector, L tokens, V vocabulary.

Conventions: pictures are in [-1, 1]; a caption is `<START>`, its tokens, `<END>`, padded on the right; a posterior's
mean stands for a picture or a caption wherever nothing is drawn. The prior is a rectified flow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging
from PIL import Image, ImageOps
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, TemperatureLogitsWarper, TopPLogitsWarper

from .common.checks import check_output_type, check_positive_integers
from .common.generation import SamplersByName
from .common.pixels import pixel_channels, to_rgb
from .common.sampling import denoise, generator_per_image, initial_noise
from .common.schedulers import FLOW, check_scheduler
from .common.standalone import StandalonePipelineMixin

logger = logging.get_logger(__name__)

IMAGE_FITS = ("crop", "stretch")
CANDIDATES_AT_ONCE = 256  # bounds the memory of keys and values


@dataclass
class ImageCaptionOutput(BaseOutput):
    """New pairs: `images[i]` and `captions[i]` come from one latent vector."""

    images: Any
    captions: list[str]


class GumbelNoise(LogitsProcessor):
    """Makes taking the best token a draw from the softmax (Gumbel-max), each row from a generator of its own.

    Transformers' own sampling draws a batch's rows from one stream: what is drawn for a picture would depend on the
    pictures beside it.
    """

    def __init__(self, generators: list[torch.Generator] | None):
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.generators is None:
            uniform = torch.rand(scores.shape, device=scores.device)
        else:
            rows = [torch.rand(scores.shape[1], generator=g, device=g.device) for g in self.generators]
            uniform = torch.stack(rows).to(scores.device)
        return scores - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))


def consensus(captions: Sequence[str]) -> str:
    """The caption that shares most n-grams (one to four words) with all of them, on average over pairs.

    It is the one of least expected loss, as far as these are drawn as they should be (minimum Bayes risk: Kumar & Byrne
    2004). The likeliest caption is not, where a picture can be said many ways, each of them unlikely. What it says of
    the others' n-grams counts for more than what it says besides (F2, as in chrF: Popović 2016), or the shortest win.
    """
    if len(captions) == 1:
        return captions[0]
    counts = Counter(captions)
    grams = {text: [Counter(_grams(text.split(), size)) for size in (1, 2, 3, 4)] for text in counts}

    def likeness(one: str, other: str) -> float:
        found = 0.0
        for own, wanted in zip(grams[one], grams[other]):
            total = own.total() + 4 * wanted.total()
            found += 5 * (own & wanted).total() / total if total else 1.0  # of two without such n-grams, all
        return found

    return max(counts, key=lambda text: sum(likeness(text, other) * many for other, many in counts.items()))


def _grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]


def caption_ids(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of each caption between `<START>` and `<END>`, at most `max_length` in all; no padding."""
    found = tokenizer(list(captions), add_special_tokens=False, truncation=False, verbose=False).input_ids
    return [[tokenizer.bos_token_id, *ids[: max_length - 2], tokenizer.eos_token_id] for ids in found]


def padded_ids(ids: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids of captions as one tensor, B L int64, and its mask: 1 for tokens, 0 for padding, whatever id that has."""
    longest = max(map(len, ids))
    tensor = torch.full((len(ids), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for row, own in enumerate(ids):
        tensor[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
    return tensor, mask


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Raise a ValueError unless `tokenizer` is one that the model of `config` can have been trained with."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} tokens, but the model knows {config.vocab_size}: "
            "they do not belong together"
        )
    own = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    wanted = (config.pad_token_id, config.start_token_id, config.end_token_id)
    if own != wanted:
        raise ValueError(
            f"`tokenizer` has the ids {own} for padding, start and end, but the model was trained with {wanted}: "
            "they do not belong together"
        )


def fitted(image: Image.Image, size: int, image_fit: str, interpolation_mode: str = "lanczos") -> Tensor:
    """A picture of any mode and size as 3 R R in [-1, 1], on white where it is transparent, as in training.

    Args:
        size: R.
        image_fit: crop, to the middle square; or stretch, the whole picture into the square.
        interpolation_mode: nearest, bilinear, bicubic or lanczos.
    """
    image = to_rgb(ImageOps.exif_transpose(image))
    width, height = image.size
    side = min(width, height)
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    box = (0, 0, width, height) if image_fit == "stretch" else (left, top, left + side, top + side)
    if (box[2] - box[0], box[3] - box[1]) == (size, size):
        image = image.crop(box)
    else:
        image = image.resize((size, size), Image.Resampling[interpolation_mode.upper()], box=box)
    return pixel_channels(image).float().mul_(2 / 255).sub_(1)


class ImageCaptionPipeline(SamplersByName, StandalonePipelineMixin, DiffusionPipeline):
    """Captions pictures, draws captions, and invents pairs of both.

    Args:
        model: encoders and decoders of pictures and captions.
        tokenizer: with the ids that the model was trained with.
        scheduler: sampler of the prior; `set_scheduler("heun")` makes another.
        prior: noise to latent vectors; None for a model that invents nothing.
        image_fit: how pictures that are not square become so: crop (their middle) or stretch.
        aspect_ratio: width over height that drawings are given; pictures that were stretched come back.
        image_interpolation_mode: how pictures are resized: nearest, bilinear, bicubic or lanczos.

    Raises:
        ValueError: a tokenizer, prior or fit that does not suit.
    """

    model_cpu_offload_seq = "prior->model"
    _optional_components = ["prior"]
    scheduler: Any

    def __init__(
        self,
        model: ModelMixin,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin,
        prior: ModelMixin | None = None,
        image_fit: str = "crop",
        aspect_ratio: float = 1.0,
        image_interpolation_mode: str = "lanczos",
    ):
        super().__init__()
        check_tokenizer(tokenizer, model.config)
        if image_fit not in IMAGE_FITS:
            raise ValueError(f"`image_fit` must be one of {', '.join(IMAGE_FITS)}, but is {image_fit!r}")
        if prior is not None and prior.config.latent_size != model.config.latent_size:
            raise ValueError(
                f"`prior` makes vectors of {prior.config.latent_size} numbers, but the model's latents have "
                f"{model.config.latent_size}"
            )
        self.register_modules(model=model, tokenizer=tokenizer, scheduler=scheduler, prior=prior)
        self.register_to_config(
            image_fit=image_fit, aspect_ratio=aspect_ratio, image_interpolation_mode=image_interpolation_mode
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._own_scheduler = scheduler

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> ImagePipelineOutput | tuple:
        """The same as `draw`."""
        return self.draw(prompt, **options)

    @torch.no_grad()
    def caption(
        self,
        images: Any,
        num_beams: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        max_length: int | None = None,
        num_candidates: int = 1,
    ) -> list[str]:
        """A caption for each picture.

        Args:
            images: a picture or a sequence of them, of any size; or all as a tensor, B 3 R R, or an array, B R R 3, in
                [0, 1].
            num_beams: 1 takes the likeliest token each time (greedy); more is beam search.
            top_p: draw among the likeliest tokens that together have this probability (nucleus sampling, Holtzman et
                al. 2020); 1 draws among all.
            temperature: of the draws that `top_p` makes; below 1 keeps closer to the likeliest.
            generator: of the draws; one for all, from which each picture gets a stream of its own, or one each.
            max_length: tokens at most, `<START>` and `<END>` included; by default what the model was trained on.
            num_candidates: more than 1 draws so many captions (with `top_p` 1, unless it is given) and takes the one
                that is most like all of them (`consensus`): for pictures that can be said many ways.

        Raises:
            ValueError: an argument that cannot be used.
        """
        check_positive_integers(num_candidates=num_candidates)
        top_p = 1.0 if num_candidates > 1 and top_p is None else top_p
        self._check_decoding(num_beams, top_p, temperature, max_length)
        latents = self.encode_images(images)
        if num_candidates == 1:
            told = self._captions(latents, num_beams, top_p, temperature, generator, max_length)
        else:
            # Streams of their own for all draws: one goes on for as long as the longest caption of the batch.
            streams = [
                stream
                for one in generator_per_image(generator, len(latents)) or []
                for stream in generator_per_image(one, num_candidates) or []
            ]
            rows = latents.repeat_interleave(num_candidates, dim=0)
            drawn: list[str] = []
            for start in range(0, len(rows), CANDIDATES_AT_ONCE):
                part = slice(start, start + CANDIDATES_AT_ONCE)
                drawn += self._captions(rows[part], num_beams, top_p, temperature, streams[part] or None, max_length)
            told = [consensus(drawn[start : start + num_candidates]) for start in range(0, len(rows), num_candidates)]
        self.maybe_free_model_hooks()
        return told

    @torch.no_grad()
    def draw(
        self,
        prompts: str | Sequence[str],
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Pictures of captions: `num_images_per_prompt` for each, in that order.

        Args:
            generator: draws from each caption's posterior; one for all, or one for each picture. Without one the first
                picture is the posterior's mean, always the same, and the others are drawn.
            output_type: pil; np (B R R 3, in [0, 1]); or pt (B 3 R R, in [0, 1]).

        Raises:
            ValueError: an argument that cannot be used.
        """
        check_output_type(output_type)
        check_positive_integers(num_images_per_prompt=num_images_per_prompt)
        posterior = self._caption_posterior(prompts)
        # A posterior for each image, of the kind that the model gives.
        posterior = type(posterior)(*(part.repeat_interleave(num_images_per_prompt, dim=0) for part in posterior))
        latents = posterior.mean
        if generator is not None or num_images_per_prompt > 1:
            generators = generator_per_image(generator, len(latents))
            noise = initial_noise(latents.shape, generators, latents.device)
            if generator is None:
                noise[::num_images_per_prompt] = 0
            latents = posterior.sample(noise)
        images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def sample(
        self,
        num_pairs: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        num_beams: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        max_length: int | None = None,
        output_type: str = "pil",
    ) -> ImageCaptionOutput:
        """New pictures with captions, both decoded from one vector that the prior draws.

        Args:
            generator: one for all (each pair gets a stream of its own), or one for each pair.
            num_inference_steps: of the prior's flow.
            num_beams, top_p, temperature, max_length: of the captions, as in `caption`.
            output_type: pil; np (B R R 3, in [0, 1]); or pt (B 3 R R, in [0, 1]).

        Raises:
            ValueError: an argument that cannot be used, or a model without a prior.
        """
        check_output_type(output_type)
        self._check_decoding(num_beams, top_p, temperature, max_length)
        if self.prior is None:
            raise ValueError("this model has no latent prior, and cannot invent pairs")
        check_positive_integers(num_pairs=num_pairs, num_inference_steps=num_inference_steps)
        check_scheduler(self.scheduler, FLOW)
        generators = generator_per_image(generator, num_pairs)
        latents = self._invented(num_pairs, generators, num_inference_steps)
        captions = self._captions(latents, num_beams, top_p, temperature, generators, max_length)
        images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImageCaptionOutput(images=images, captions=captions)

    @torch.no_grad()
    def similarity(self, images: Any, texts: str | Sequence[str]) -> Tensor:
        """Cosine similarity of each picture's latent vector (rows) with each text's (columns), in [-1, 1], float32."""
        found = self.encode_images(images), self.encode_captions(texts)
        self.maybe_free_model_hooks()
        pictures, captions = (torch.nn.functional.normalize(latents, dim=1) for latents in found)
        return pictures @ captions.T

    @torch.no_grad()
    def encode_images(self, images: Any) -> Tensor:
        """Latent vectors of pictures, the means of their posteriors. B D."""
        pixel_values = self._pixels(images).to(self._execution_device, self.model.dtype)
        return self.model.encode_image(pixel_values).mean

    @torch.no_grad()
    def encode_captions(self, texts: str | Sequence[str]) -> Tensor:
        """Latent vectors of texts, the means of their posteriors. B D."""
        return self._caption_posterior(texts).mean

    def _caption_posterior(self, texts: str | Sequence[str]) -> Any:
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"captions must be texts that say something, but are {texts!r}")
        ids = caption_ids(self.tokenizer, texts, self.model.config.max_length)
        self._warn_of_lost_words(texts, ids)
        input_ids, mask = (t.to(self._execution_device) for t in padded_ids(ids, self.model.config.pad_token_id))
        return self.model.encode_caption(input_ids, mask)

    def _warn_of_lost_words(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
        """Says what of the texts the model does not read."""
        longest = self.model.config.max_length
        # What is as long as may be was cut, or just fits.
        cut = [text for text, own in zip(texts, ids) if len(own) == longest and not self._fits(text)]
        if cut:
            logger.warning(
                f"{len(cut)} of {len(texts)} captions have more than {longest} tokens and are cut there: {cut[0]!r}"
            )
        unknown = self.tokenizer.unk_token_id
        strange = [text for text, own in zip(texts, ids) if set(own[1:-1]) <= {unknown}]
        if strange:
            logger.warning(f"the model knows none of the words of {strange[0]!r}, and cannot tell it from others such")

    def _fits(self, text: str) -> bool:
        longest = self.model.config.max_length
        return len(caption_ids(self.tokenizer, [text], longest + 1)[0]) <= longest

    def _captions(
        self,
        latents: Tensor,
        num_beams: int,
        top_p: float | None,
        temperature: float,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        max_length: int | None,
    ) -> list[str]:
        processors: list[Any] = []
        if top_p is not None:
            generators = generator_per_image(generator, len(latents))
            warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
            processors = [*warpers, TopPLogitsWarper(top_p), GumbelNoise(generators)]
        ids = self.model.generate_captions(
            latents, max_length=max_length, num_beams=num_beams, logits_processor=processors
        )
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _invented(self, count: int, generators: list[torch.Generator] | None, steps: int) -> Tensor:
        """Standard normal noise to latent vectors. B D, float32."""
        prior: Any = self.prior
        noise = initial_noise((count, prior.config.latent_size), generators, self._execution_device)

        def predict(x: Tensor, timestep: Any) -> Tensor:
            timesteps = torch.as_tensor(timestep, device=x.device).reshape(1).expand(len(x))
            return prior(x.to(prior.dtype), timesteps).float()

        return denoise(
            self.scheduler, predict, noise, steps, generators, self.progress_bar, lambda step, t, x: (x, False)
        )

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Latent vectors (B D) to pictures of `output_type` (see `draw`)."""
        decoded = self.model.decode_image(latents.to(self._execution_device)).float().clamp(-1, 1)
        images = self.image_processor.postprocess(decoded, output_type=output_type)
        return self.in_proportion(images) if output_type == "pil" else images

    def in_proportion(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """R × R pictures in the proportions of those that the model was trained on, none made smaller."""
        ratio, side = self.config.aspect_ratio, self.model.config.sample_size
        if ratio == 1:
            return list(images)
        size = (max(side, round(side * ratio)), max(side, round(side / ratio)))
        return [image.resize(size, Image.Resampling.BICUBIC) for image in images]

    def _pixels(self, images: Any) -> Tensor:
        """B 3 R R in [-1, 1]."""
        size = self.model.config.sample_size
        if isinstance(images, Tensor):
            if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
                raise ValueError(f"`images` must have shape (B, 3, {size}, {size}), but has {tuple(images.shape)}")
            return images.float() * 2 - 1
        if isinstance(images, np.ndarray):
            if images.shape[1:] != (size, size, 3) or not np.issubdtype(images.dtype, np.floating):
                raise ValueError(
                    f"`images` must be floats of shape (B, {size}, {size}, 3), but are {images.dtype} of {images.shape}"
                )
            return torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1
        single = isinstance(images, (Image.Image, str)) or not hasattr(images, "__iter__")
        several = [images] if single else list(images)
        if not several or not all(isinstance(image, Image.Image) for image in several):
            raise ValueError("`images` must be a picture, a sequence of pictures, a tensor or an array")
        fit, mode = self.config.image_fit, self.config.image_interpolation_mode
        return torch.stack([fitted(image, size, fit, mode) for image in several])

    def _check_decoding(self, num_beams: int, top_p: float | None, temperature: float, max_length: int | None) -> None:
        """Raises ValueError for what cannot be."""
        check_positive_integers(num_beams=num_beams)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], but is {top_p}")
        if top_p is not None and num_beams > 1:
            raise ValueError(f"`top_p` draws and `num_beams` {num_beams} searches; choose one of them")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, but is {temperature}")
        if temperature != 1 and top_p is None:
            raise ValueError(f"`temperature` {temperature} is of draws, and there are none; `top_p` 1 draws among all")
        longest = self.model.config.max_length
        if max_length is not None and not 2 <= max_length <= longest:
            raise ValueError(f"`max_length` must be from 2 to {longest}, what the model knows, but is {max_length}")

"""Caption images, draw captions and generate new image–caption pairs, all through one latent vector.

Shapes: B images or captions, R side of an image in pixels, D latent vector, L tokens, V vocabulary.

Conventions: images are in [-1, 1]; a caption is `<START>`, its tokens and `<END>`, padded on the right. Unless
sampled, the latent vector of an image or a caption is the mean of its posterior. The prior is a rectified flow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, TemperatureLogitsWarper, TopPLogitsWarper

from .common.checks import (
    check_generator,
    check_numbers,
    check_output_type,
    check_positive_integers,
    check_steps,
    is_integer,
)
from .common.conditions import as_list, is_text
from .common.consensus import consensus
from .common.generation import SamplersByName
from .common.pixels import pixel_channels, to_rgb
from .common.sampling import denoise, generator_per_image, initial_noise
from .common.schedulers import FLOW, check_scheduler
from .common.standalone import StandalonePipelineMixin
from .common.words import warn_of_unknown_words

logger = logging.get_logger(__name__)

IMAGE_FITS = ("crop", "stretch")
CANDIDATES_AT_ONCE = 256  # limits the memory for keys and values


@dataclass
class ImageCaptionOutput(BaseOutput):
    """New pairs: `images[i]` and `captions[i]` are decoded from the same latent vector."""

    images: Any
    captions: list[str]


class GumbelNoise(LogitsProcessor):
    """Logits processor that turns greedy search into sampling from the softmax (the Gumbel-max trick).

    Each row has its own generator. The sampling of Transformers draws all rows of a batch from one random stream, so a
    caption would depend on the other images in the batch.
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


def caption_ids(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int) -> list[list[int]]:
    """Tokenize captions to lists of ids from `<START>` to `<END>`, unpadded and truncated to `max_length` ids."""
    unpadded = tokenizer(list(captions), add_special_tokens=False, truncation=False, verbose=False).input_ids
    return [[tokenizer.bos_token_id, *ids[: max_length - 2], tokenizer.eos_token_id] for ids in unpadded]


def padded_ids(ids: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad ids to one tensor (B L, int64) and return it with its mask, which is 1 for tokens and 0 for padding."""
    longest = max(map(len, ids))
    tensor = torch.full((len(ids), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for row, own in enumerate(ids):
        tensor[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
    return tensor, mask


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Raise a ValueError if the model with this `config` cannot have been trained with `tokenizer`."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} tokens, but the model's vocabulary has {config.vocab_size}; "
            "pass the tokenizer that the model was trained with"
        )
    own = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    trained = (config.pad_token_id, config.start_token_id, config.end_token_id)
    if own != trained:
        raise ValueError(
            f"`tokenizer` has the ids {own} for padding, start and end, but the model was trained with {trained}; "
            "pass the tokenizer that the model was trained with"
        )


def fitted(image: Image.Image, size: int, image_fit: str, interpolation_mode: str = "lanczos") -> Tensor:
    """Convert an image of any mode and size to a tensor, 3 R R in [-1, 1], as in training; transparency becomes white.

    Args:
        size: R.
        image_fit: "crop" cuts out the largest centred square, "stretch" resizes the whole image to a square.
        interpolation_mode: "nearest", "bilinear", "bicubic" or "lanczos".
    """
    image = to_rgb(image)
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
    """Pipeline that captions images, generates images from captions, and generates new image–caption pairs.

    Args:
        model (`ImageCaptionModel`): Model with the encoders and decoders of images and captions.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer that the model was trained with.
        scheduler (`SchedulerMixin`): Scheduler for sampling from the prior; `set_scheduler("heun")` selects another.
        prior (`LatentPriorModel`, *optional*): Generates latent vectors from noise; `sample` needs it.
        image_fit (`str`, defaults to `"crop"`): `"crop"` to a centred square, or `"stretch"` images to one.
        aspect_ratio (`float`, defaults to 1.0): Width / height of generated images, undoing a stretch.
        image_interpolation_mode (`str`, defaults to `"lanczos"`): Or `"nearest"`, `"bilinear"`, `"bicubic"`.

    Raises:
        ValueError: If the tokenizer or the prior does not match the model, or `image_fit` is unknown.
    """

    model_cpu_offload_seq = "prior->model"
    _optional_components = ["prior"]
    scheduler: Any

    def __init__(
        self,
        model: ModelMixin,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin,
        prior: Optional[ModelMixin] = None,
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
                f"`prior` generates vectors of {prior.config.latent_size} numbers, but the model's latent vectors have "
                f"{model.config.latent_size}; pass the prior that was trained with the model"
            )
        self.register_modules(model=model, tokenizer=tokenizer, scheduler=scheduler, prior=prior)
        self.register_to_config(
            image_fit=image_fit, aspect_ratio=aspect_ratio, image_interpolation_mode=image_interpolation_mode
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._own_scheduler = scheduler

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> ImagePipelineOutput | tuple:
        """Generate images from captions, see `draw`."""
        return self.draw(prompt, **options)

    @torch.no_grad()
    def caption(
        self,
        images: Any,
        num_beams: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        generator: int | torch.Generator | Sequence[torch.Generator] | None = None,
        max_length: int | None = None,
        num_candidates: int = 1,
    ) -> list[str]:
        """Generate a caption for each image.

        Args:
            images: PIL images of any size, one or several; or a tensor (`B 3 R R`) or array (`B R R 3`) in [0, 1].
            num_beams (`int`, defaults to 1): Number of beams for beam search; 1 is greedy search.
            top_p (`float`, *optional*): Sample from the smallest set of likely tokens whose probabilities add up to
                `top_p` (nucleus sampling, Holtzman et al. 2020). By default, captions are not sampled.
            temperature (`float`, defaults to 1.0): Temperature for sampling; values below 1 favour likely tokens.
            generator (`int`, `torch.Generator` or a list, *optional*): Seed (image k uses seed + k) or generator for
                sampling, or one generator for each image. A single generator seeds a separate random stream for each
                image.
            max_length (`int`, *optional*): Maximum number of tokens, `<START>` and `<END>` included.
            num_candidates (`int`, defaults to 1): If above 1, sample this number of captions for each image (by default
                with `top_p=1`) and return their `consensus`, for images that can be described in many ways.

        Raises:
            ValueError: If an argument is invalid; the message quotes it.
        """
        check_positive_integers(num_candidates=num_candidates)
        check_generator(generator)
        num_candidates = int(num_candidates)
        top_p = 1.0 if num_candidates > 1 and top_p is None else top_p
        self._check_decoding(num_beams, top_p, temperature, max_length)
        latents = self.encode_images(images)
        if num_candidates == 1:
            captions = self._captions(latents, num_beams, top_p, temperature, generator, max_length)
        else:
            # One stream per candidate: a stream is read until the longest caption of the batch is complete.
            streams = generator_per_image(generator, len(latents), num_candidates) or []
            rows = latents.repeat_interleave(num_candidates, dim=0)
            drawn: list[str] = []
            for start in range(0, len(rows), CANDIDATES_AT_ONCE):
                part = slice(start, start + CANDIDATES_AT_ONCE)
                drawn += self._captions(rows[part], num_beams, top_p, temperature, streams[part] or None, max_length)
            starts = range(0, len(rows), num_candidates)
            captions = [consensus(drawn[start : start + num_candidates]) for start in starts]
        self.maybe_free_model_hooks()
        return captions

    @torch.no_grad()
    def draw(
        self,
        prompts: str | Sequence[str],
        num_images_per_prompt: int = 1,
        generator: int | torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate `num_images_per_prompt` images for each caption, in that order.

        Args:
            prompts (`str` or `list[str]`): The caption or captions to draw.
            num_images_per_prompt (`int`, defaults to 1): The number of images to generate per caption.
            generator (`int`, `torch.Generator` or a list, *optional*): Seed (image k uses seed + k) or generator for
                sampling from posteriors, or one generator for each image. By default, the first image of a caption uses
                the mean of its posterior.
            output_type (`str`, defaults to `"pil"`): `"pil"`, or `"np"` (`B R R 3`) or `"pt"` (`B 3 R R`) in [0, 1].
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput` instead of a tuple.

        Returns:
            `ImagePipelineOutput` or `tuple`: The generated images; a tuple of one element without `return_dict`.

        Raises:
            ValueError: If an argument is invalid; the message quotes it.
        """
        check_output_type(output_type)
        check_positive_integers(num_images_per_prompt=num_images_per_prompt)
        check_generator(generator)
        num_images_per_prompt = int(num_images_per_prompt)
        posterior = self._caption_posterior(prompts)
        # Repeat the posterior for each image. Its class is not imported: one loaded from the Hub has its own copy.
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
        generator: int | torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        num_beams: int = 1,
        top_p: float | None = None,
        temperature: float = 1.0,
        max_length: int | None = None,
        output_type: str = "pil",
    ) -> ImageCaptionOutput:
        """Generate new image–caption pairs, each decoded from one latent vector that is sampled from the prior.

        Args:
            num_pairs (`int`, defaults to 1): The number of pairs to generate.
            generator (`int`, `torch.Generator` or a list, *optional*): Seed (pair k uses seed + k) or generator for
                sampling, or one generator for each pair.
            num_inference_steps (`int`, defaults to 50): The number of sampling steps of the prior.
            num_beams, top_p, temperature, max_length: How captions are decoded, as in `caption`.
            output_type (`str`, defaults to `"pil"`): `"pil"`, or `"np"` (`B R R 3`) or `"pt"` (`B 3 R R`) in [0, 1].

        Raises:
            ValueError: If an argument is invalid, or the model has no prior.
        """
        check_output_type(output_type)
        self._check_decoding(num_beams, top_p, temperature, max_length)
        if self.prior is None:
            raise ValueError("this model has no latent prior, so it cannot generate pairs; train it with a prior")
        check_positive_integers(num_pairs=num_pairs)
        check_generator(generator)
        check_scheduler(self.scheduler, FLOW)
        steps = check_steps(self.scheduler, num_inference_steps, None, None)
        generators = generator_per_image(generator, int(num_pairs))
        latents = self._sample_latents(int(num_pairs), generators, steps)
        captions = self._captions(latents, num_beams, top_p, temperature, generators, max_length)
        images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImageCaptionOutput(images=images, captions=captions)

    @torch.no_grad()
    def similarity(self, images: Any, texts: str | Sequence[str]) -> Tensor:
        """Return cosine similarities of the latent vectors of images (rows) and texts (columns), float32 in [-1, 1]."""
        latents = self.encode_images(images), self.encode_captions(texts)
        self.maybe_free_model_hooks()
        of_images, of_texts = (torch.nn.functional.normalize(vectors, dim=1) for vectors in latents)
        return of_images @ of_texts.T

    @torch.no_grad()
    def encode_images(self, images: Any) -> Tensor:
        """Encode images to latent vectors (`B D`), the means of their posteriors."""
        pixel_values = self._pixels(images).to(self._execution_device, self.model.dtype)
        return self.model.encode_image(pixel_values).mean

    @torch.no_grad()
    def encode_captions(self, texts: str | Sequence[str]) -> Tensor:
        """Encode texts to latent vectors (`B D`), the means of their posteriors."""
        return self._caption_posterior(texts).mean

    def _caption_posterior(self, texts: str | Sequence[str]) -> Any:
        texts = as_list(texts)
        if not texts or not all(is_text(text) and text.strip() for text in texts):
            raise ValueError(f"captions must be non-empty texts, but are {texts!r}")
        ids = caption_ids(self.tokenizer, texts, self.model.config.max_length)
        self._warn_of_ignored_words(texts, ids)
        input_ids, mask = (t.to(self._execution_device) for t in padded_ids(ids, self.model.config.pad_token_id))
        return self.model.encode_caption(input_ids, mask)

    def _warn_of_ignored_words(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
        """Log a warning for texts that are truncated or have unknown words."""
        longest = self.model.config.max_length
        # Ids of the maximum length were either truncated or fit exactly.
        cut = [text for text, own in zip(texts, ids) if len(own) == longest and not self._fits(text)]
        if cut:
            logger.warning(
                f"{len(cut)} of {len(texts)} captions have more than {longest} tokens and are truncated: {cut[0]!r}"
            )
        warn_of_unknown_words(self.tokenizer, texts)

    def _fits(self, text: str) -> bool:
        longest = self.model.config.max_length
        return len(caption_ids(self.tokenizer, [text], longest + 1)[0]) <= longest

    def _captions(
        self,
        latents: Tensor,
        num_beams: int,
        top_p: float | None,
        temperature: float,
        generator: int | torch.Generator | Sequence[torch.Generator] | None,
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

    def _sample_latents(self, count: int, generators: list[torch.Generator] | None, steps: Mapping[str, Any]) -> Tensor:
        """Sample latent vectors from the prior, B D, float32."""
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
        """Decode latent vectors (`B D`) to images of `output_type`, see `draw`."""
        decoded = self.model.decode_image(latents.to(self._execution_device)).float().clamp(-1, 1)
        images = self.image_processor.postprocess(decoded, output_type=output_type)
        return self.in_proportion(images) if output_type == "pil" else images

    def in_proportion(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Resize square images to the aspect ratio of the training images, without shrinking either side."""
        ratio, side = self.config.aspect_ratio, self.model.config.sample_size
        if ratio == 1:
            return list(images)
        size = (max(side, round(side * ratio)), max(side, round(side / ratio)))
        return [image.resize(size, Image.Resampling.BICUBIC) for image in images]

    def _pixels(self, images: Any) -> Tensor:
        """Convert images of any accepted kind to a tensor, B 3 R R in [-1, 1]."""
        size = self.model.config.sample_size
        if isinstance(images, Tensor):
            if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
                raise ValueError(f"`images` must have shape (B, 3, {size}, {size}), but has {tuple(images.shape)}")
            return images.float() * 2 - 1
        if isinstance(images, np.ndarray):
            if images.ndim != 4 or images.shape[1:] != (size, size, 3) or not np.issubdtype(images.dtype, np.floating):
                raise ValueError(
                    f"`images` must be floats of shape (B, {size}, {size}, 3), but are {images.dtype} of {images.shape}"
                )
            return torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1
        single = isinstance(images, (Image.Image, str)) or not hasattr(images, "__iter__")
        several = [images] if single else list(images)
        if not several or not all(isinstance(image, Image.Image) for image in several):
            raise ValueError("`images` must be a PIL image, a sequence of PIL images, a tensor or an array")
        fit, mode = self.config.image_fit, self.config.image_interpolation_mode
        return torch.stack([fitted(image, size, fit, mode) for image in several])

    def _check_decoding(self, num_beams: int, top_p: float | None, temperature: float, max_length: int | None) -> None:
        """Raise a ValueError that quotes the first invalid argument of decoding captions."""
        check_positive_integers(num_beams=num_beams)
        check_numbers(temperature=temperature, **({} if top_p is None else {"top_p": top_p}))
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], but is {top_p}")
        if top_p is not None and num_beams > 1:
            raise ValueError(f"`top_p` samples, but `num_beams` {num_beams} is beam search; choose one of them")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, but is {temperature}")
        if temperature != 1 and top_p is None:
            raise ValueError(f"`temperature` {temperature} has no effect without sampling; pass `top_p`, such as 1")
        longest = self.model.config.max_length
        if max_length is not None and not (is_integer(max_length) and 2 <= max_length <= longest):
            raise ValueError(f"`max_length` must be from 2 to {longest}, the model's maximum, but is {max_length}")

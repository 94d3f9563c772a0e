"""Generate images from text, a class label, both or neither, with diffusion in the latent space of an autoencoder.

Shapes: B images, L tokens, D text width, C latent channels, h w latent cells, H W pixels.

Conventions: the text condition is the text encoder's last hidden state over captions padded to `max_text_length`; a
dropped or missing prompt is replaced by the empty prompt. Class labels go through the class embedding of the network,
whose last index is the null class. Flow matching is rectified flow as in Stable Diffusion 3: x_t = (1 - s) x_0 + s
noise, the timestep is s * 1000, and the model predicts noise - x_0. Training calls `concat_condition` and
`null_class` of this file, and those of captions.py, so training and sampling cannot differ.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .common.captions import encode_captions, max_caption_length, tokenize_captions
from .common.checks import OUTPUT_TYPES, check_embeds, check_steps, check_tensor
from .common.conditions import as_list, broadcast, broadcast_rows, class_ids, is_empty, is_text, length, reads_text
from .common.generation import SamplingOptions, UNetSamplingMixin, is_stock, known_prediction_type, tensor_inputs_of
from .common.guidance import WHOLE_INTERVAL, check_autoguidance, denoiser_of
from .common.latents import decode_latents, downsampling_factor, latent_shape
from .common.sampling import generator_per_image, initial_noise
from .common.standalone import StandalonePipelineMixin
from .common.words import warn_of_unknown_words


def concat_condition(noisy: Tensor, expected: Tensor | None) -> Tensor:
    """Concatenate noisy latents (B C h w) and the caption prior's predicted latents to the network's input (B 2C h w).

    For a model without a caption prior, `expected` is None and the noisy latents are returned. No gradient flows into
    `expected`: the prior is trained by regression alone, so it predicts the mean of the latents and does not adapt to
    the denoiser.
    """
    return noisy if expected is None else torch.cat([noisy, expected.detach().to(noisy.dtype)], dim=1)


def null_class(denoiser: Any) -> int | None:
    """Return the index of the null class, the last one of the class embedding, or None for a model without classes."""
    classes = denoiser.config.num_class_embeds
    return None if classes is None else int(classes) - 1


class LatentDiffusionPipeline(UNetSamplingMixin, StandalonePipelineMixin, DiffusionPipeline):
    """Pipeline for generating images from prompts, class labels, both, or neither, with latent diffusion.

    Classifier-free guidance (Ho and Salimans 2022) is uncond + scale * (cond - uncond), both predicted in one batch.
    `guidance_interval` limits it to a part of the noise levels (Kynkäänniemi et al. 2024): it applies where low < level
    <= high. The level is sigma / (alpha + sigma) of x_t = alpha x_0 + sigma noise: 0 for a clean image, 1 for pure
    noise, and for flow matching sigma itself. Outside, only the conditional prediction is computed.

    With a `guidance_model`, an earlier checkpoint guides instead (autoguidance: Karras et al. 2024): weak +
    autoguidance_scale * (strong - weak), both for the same condition or none; a scale of 1 and below disables it, and
    `guidance_scale` has no effect. The guide is a pipeline on the same device, which encodes prompts itself, or its
    network alone, which gets the text condition of this pipeline (as every guide does if there are `prompt_embeds`).

    With an integer as `generator`, image k (from 0) uses the seed `generator + k`.

    The first image uses a single `generator` itself, as if it were passed in a list. Every further image has a random
    stream of its own, seeded from it, so that the first images do not depend on the number of images.

    `callback_on_step_end` is called after each denoising step with `(pipeline, step, timestep, callback_kwargs)`, where
    `callback_kwargs` has the tensors named in `callback_on_step_end_tensor_inputs` (`"latents"`, `"prompt_embeds"`).
    The tensors that it returns in a dictionary replace the current ones. It may set `pipeline._guidance_scale`, and
    `pipeline._interrupt = True` to end sampling. The callbacks of Diffusers for Stable Diffusion work as well.

    With an `image` (PIL, or a tensor in [0, 1], resized to the size to generate) and a `strength`, sampling starts from
    it with the noise of that share of the steps: 0 gives the round trip of the VAE, 1 an image without it. With a
    `mask_image` of its size, only the white part is filled (`strength` is then 1 by default); each step is taken
    `jump_n_sample` times (RePaint: Lugmayr et al. 2022), and `paste_back` keeps all other pixels as they are.

    With `output_type` `"np"` and `"pt"`, images are in [0, 1]; `"latent"` gives scaled latents (`B C h w`). A model of
    grey images generates images of mode L (1 channel), one of transparent images RGBA (4, not premultiplied).

    Args:
        vae (`ModelMixin`): Any Diffusers image autoencoder; latents are scaled as its config says.
        unet (`UNet2DConditionModel`, *optional*): Denoises latents, given the timestep, the text condition and the
            class; None for a model that has a `transformer` instead.
        scheduler (`SchedulerMixin`): Scheduler for the prediction type; `set_scheduler("euler")` selects another.
        text_encoder (`PreTrainedModel`, *optional*): Text encoder; needs `tokenizer`. A model without text has neither.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer of the text encoder.
        prediction_type (`str`, *optional*): What the network predicts: `"epsilon"`, `"v_prediction"`, `"sample"` or
            `"flow_prediction"`. Defaults to the prediction type of the scheduler.
        id2label (`dict`, *optional*): Class names by class id, so that `class_labels` may be names.
        max_text_length (`int`, *optional*): Number of tokens that prompts are padded to. Defaults to the maximum of the
            tokenizer and the text encoder.
        caption_prior (`ModelMixin`, *optional*): Predicts latents from the text condition. The network takes them as
            additional input channels, so it has twice as many.
        transformer (`ModelMixin`, *optional*): A transformer with the arguments of the U-Net, in its place.

    Raises:
        ValueError: If the components do not match.
    """

    model_cpu_offload_seq = "text_encoder->caption_prior->unet->transformer->vae"
    _optional_components = ["unet", "text_encoder", "tokenizer", "caption_prior", "transformer"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _output_types = (*OUTPUT_TYPES, "latent")
    scheduler: Any
    transformer: Any = None

    def __init__(
        self,
        vae: ModelMixin,
        unet: Optional[UNet2DConditionModel],
        scheduler: SchedulerMixin,
        text_encoder: Optional[PreTrainedModel] = None,
        tokenizer: Optional[PreTrainedTokenizerBase] = None,
        prediction_type: Optional[str] = None,
        id2label: Optional[dict] = None,
        max_text_length: Optional[int] = None,
        caption_prior: Optional[ModelMixin] = None,
        transformer: Optional[ModelMixin] = None,
    ):
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("pass either `unet` or `transformer`, the network that denoises")
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError(
                "`text_encoder` and `tokenizer` go together: pass both, or neither for a model without text"
            )
        prediction_type = known_prediction_type(prediction_type, scheduler)
        if caption_prior is not None and text_encoder is None:
            raise ValueError("`caption_prior` needs a `text_encoder`, but none was given; pass both")
        if text_encoder is not None and max_text_length is None:
            max_text_length = max_caption_length(tokenizer, text_encoder)
        self.register_modules(
            vae=vae, unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer,
            caption_prior=caption_prior, transformer=transformer,
        )  # fmt: skip
        self.register_to_config(
            prediction_type=prediction_type,
            # JSON has no integer keys, so ids are strings here, as they are after loading.
            id2label={str(id_): str(name) for id_, name in (id2label or {}).items()} or None,
            max_text_length=max_text_length,
        )
        self.vae_scale_factor = downsampling_factor(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._own_scheduler = scheduler

    @property
    def denoiser(self) -> Any:
        """The network that denoises: the U-Net or the transformer."""
        return self.unet if self.transformer is None else self.transformer

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None, width: int | None = None,
        num_inference_steps: int = 25, guidance_scale: float = 2.5, num_images_per_prompt: int = 1,
        generator: int | torch.Generator | Sequence[torch.Generator] | None = None, latents: Tensor | None = None,
        output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt_embeds: Tensor | None = None, negative_prompt_embeds: Tensor | None = None,
        timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None,
        guidance_interval: Sequence[float] = WHOLE_INTERVAL, guidance_model: Any = None,
        autoguidance_scale: float = 2.0, image: Any = None, mask_image: Any = None, strength: float | None = None,
        jump_n_sample: int | None = None, paste_back: bool = False,
    ) -> ImagePipelineOutput | tuple:  # fmt: skip
        """Generate `num_images_per_prompt` images for each prompt (or class label), in that order.

        Args:
            prompt, negative_prompt (`str` or `list[str]`, *optional*): What to include (paired with labels), or not.
            class_labels (`int`, `str`, `list` or `torch.Tensor`, *optional*): Names, or ids unless names are numbers.
            height, width (`int`, *optional*): Size in pixels of the generated images. Defaults to the training size.
            num_inference_steps (`int`, defaults to 25): The number of denoising steps.
            guidance_scale (`float`, defaults to 2.5): Scale of classifier-free guidance; 1 and below disables it.
            num_images_per_prompt (`int`, defaults to 1): The number of images to generate per prompt.
            generator (`int`, `torch.Generator` or a list, *optional*): Seed or generator, or one for each image.
            latents (`torch.Tensor`, *optional*): Standard normal noise (`B C h w`) to start from.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (`B H W 3`), `"pt"` (`B 3 H W`) or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end, callback_on_step_end_tensor_inputs: Callback after each step, see the class.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*): Results of `encode_prompt` (`B L D`).
            timesteps, sigmas (`list`, *optional*): Custom schedule, from high to low, if the scheduler takes it.
            guidance_interval (`tuple`, defaults to (0, 1)): Noise levels (low, high) with guidance, see the class.
            guidance_model, autoguidance_scale (defaults to 2.0): Earlier version that guides, see the class.
            image, strength, mask_image, jump_n_sample, paste_back: Image to start from, or to fill, see the class.

        Returns:
            `ImagePipelineOutput` or `tuple`: The generated images; a tuple of one element without `return_dict`.

        Raises:
            ValueError: If an argument is invalid; the message quotes it.
        """
        inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            prompt, class_labels, negative_prompt, guidance_scale, num_inference_steps, num_images_per_prompt,
            output_type, inputs, height, width, generator, callback_on_step_end, prompt_embeds,
            negative_prompt_embeds, timesteps, sigmas, guidance_interval, guidance_model, autoguidance_scale,
        )  # fmt: skip
        start = self._starting_image(image, mask_image, strength, jump_n_sample, paste_back, height, width,
                                     num_images_per_prompt, output_type)  # fmt: skip
        count, text, labels, guide = self._encoded(
            prompt, class_labels, prompt_embeds, negative_prompt, negative_prompt_embeds, int(num_images_per_prompt),
            guidance_model, guidance_scale if guidance_model is None else autoguidance_scale,
        )  # fmt: skip
        generators = generator_per_image(generator, count)
        noise = self._initial_latents(latents, count, height, width, generators)
        schedule = check_steps(self.scheduler, num_inference_steps, timesteps, sigmas)
        options = SamplingOptions(schedule, generators, callback_on_step_end, inputs, guidance_interval, start)
        return self._finished(self._denoise(noise, text, labels, options, guide), output_type, return_dict, start)

    def check_inputs(
        self,
        prompt: Any,
        class_labels: Any,
        negative_prompt: Any,
        guidance_scale: Any,
        num_inference_steps: Any,
        num_images_per_prompt: Any,
        output_type: Any,
        callback_on_step_end_tensor_inputs: Any,
        height: Any = None,
        width: Any = None,
        generator: Any = None,
        callback_on_step_end: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        guidance_interval: Any = WHOLE_INTERVAL,
        guidance_model: Any = None,
        autoguidance_scale: Any = 2.0,
    ) -> None:
        """Raise a ValueError that quotes the first invalid argument and its value."""
        self._check_sampling(
            num_images_per_prompt, guidance_scale, generator, output_type, callback_on_step_end,
            callback_on_step_end_tensor_inputs, guidance_interval,
        )  # fmt: skip
        check_steps(self.scheduler, num_inference_steps, timesteps, sigmas)
        self._size(height, width)
        changes_prompts = is_stock(callback_on_step_end) and "prompt_embeds" in callback_on_step_end_tensor_inputs
        if changes_prompts and not self._takes_text:
            name = type(callback_on_step_end).__name__
            raise ValueError(f"`callback_on_step_end` is a {name}, which changes prompts, but this model takes no text")
        self._check_text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        if class_labels is not None and self.denoiser.config.num_class_embeds is None:
            raise ValueError(f"this model has no classes, so `class_labels` must be None, but is {class_labels!r}")
        self.class_ids(class_labels)
        negative = negative_prompt if negative_prompt_embeds is None else negative_prompt_embeds
        counts = {
            "prompt": prompt, "prompt_embeds": prompt_embeds, "class_labels": class_labels, "negative_prompt": negative
        }  # fmt: skip
        lengths = {name: length(value) for name, value in counts.items() if value is not None}
        if 0 in lengths.values() or len({n for n in lengths.values() if n != 1}) > 1:
            raise ValueError(f"prompts and labels must have one entry each, or equally many, but have {lengths}")
        check_autoguidance(self, guidance_model, autoguidance_scale, negative_prompt, negative_prompt_embeds)
        if not is_empty(negative_prompt) and guidance_scale <= 1:
            raise ValueError(f"`negative_prompt` needs a `guidance_scale` above 1, but it is {guidance_scale}")
        if lengths.pop("negative_prompt", 1) > max(lengths.values(), default=1):
            raise ValueError(f"`negative_prompt` has {length(negative)} entries, more than there are prompts")

    def _check_text(self, prompt: Any, negative_prompt: Any, prompt_embeds: Any, negative_embeds: Any) -> None:
        """Raise a ValueError if the prompts, or the embeddings in their place, cannot be used."""
        given = {"prompt": prompt, "negative_prompt": negative_prompt}
        for name, value in given.items():
            if value is not None and not all(map(is_text, as_list(value))):
                raise ValueError(f"`{name}` must be a string or a list of strings, but is {value!r}")
            if self.text_encoder is None and not (value is None or (name == "negative_prompt" and is_empty(value))):
                raise ValueError(f"this model has no text encoder, so `{name}` must be None, but is {value!r}")
        embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_embeds}
        for name, value in embeds.items():
            if value is not None and not self._takes_text:
                raise ValueError(f"this model takes no text, so `{name}` must be None")
        check_embeds(int(self.denoiser.config.get("cross_attention_dim") or 0), **embeds)
        if prompt is not None and prompt_embeds is not None:
            raise ValueError("`prompt` and `prompt_embeds` say the same; pass one of them")
        if not is_empty(negative_prompt) and negative_embeds is not None:
            raise ValueError("`negative_prompt` and `negative_prompt_embeds` say the same; pass one of them")
        if self._takes_text and self.text_encoder is None and prompt_embeds is None:
            raise ValueError("this pipeline was loaded without its text encoder, so it needs `prompt_embeds`")

    @property
    def _takes_text(self) -> bool:
        return self.text_encoder is not None or reads_text(self.denoiser)

    def encode_prompt(self, prompts: Sequence[str], device: torch.device | str | None = None) -> Tensor:
        """Encode prompts to the text condition (`B L D`, in the dtype of the network)."""
        input_ids = tokenize_captions(self.tokenizer, prompts, self.config.max_text_length)
        embeds = encode_captions(self.text_encoder, input_ids.to(device or self._execution_device))
        return embeds.to(self.denoiser.dtype)

    def class_ids(self, class_labels: Any) -> list[int]:
        """Convert class labels, given as ids or names, to class ids.

        Raises:
            ValueError: If a name is unknown, or an id is out of range.
        """
        return class_ids(class_labels, self.config.id2label or {}, null_class(self.denoiser) or 0)

    def _size(self, height: Any, width: Any) -> tuple[int, int]:
        height, width = self._given_or_trained_size(height, width, self.vae_scale_factor)
        latent_shape(self.vae, height, width)
        return height, width

    def _text_condition(
        self,
        prompt: Any,
        negative_prompt: Any,
        prompt_embeds: Tensor | None,
        negative_embeds: Tensor | None,
        count: int,
        repeats: int,
    ) -> Tensor | None:
        """Return the text condition (B L D), each row `repeats` times, or None for a model without text.

        With guidance it has twice the batch size, and the unconditional half comes first.

        Raises:
            ValueError: the two halves have different shapes, or the unconditional half cannot be encoded.
        """
        if not self._takes_text:
            return None
        if self.tokenizer is not None:
            warn_of_unknown_words(self.tokenizer, [*as_list(prompt), *as_list(negative_prompt)])
        guided = self.do_classifier_free_guidance
        prompts = broadcast(as_list(prompt) or [""], count)
        negatives = broadcast(as_list(negative_prompt) or [""], count) if guided else []
        if prompt_embeds is None and negative_embeds is None:
            return self.encode_prompt(negatives + prompts).repeat_interleave(repeats, dim=0)
        if guided and negative_embeds is None and self.text_encoder is None:
            raise ValueError(
                "this pipeline was loaded without its text encoder, so guidance needs `negative_prompt_embeds`; pass "
                "them, or `guidance_scale=1`"
            )
        positive = self._embeds(prompt_embeds, prompts)
        if not guided:
            return positive.repeat_interleave(repeats, dim=0)
        negative = self._embeds(negative_embeds, negatives)
        if negative.shape != positive.shape:
            raise ValueError(
                "`prompt_embeds` and `negative_prompt_embeds` must have the same shape, but have "
                f"{tuple(positive.shape)} and {tuple(negative.shape)}"
            )
        return torch.cat([negative, positive]).repeat_interleave(repeats, dim=0)

    def _embeds(self, embeds: Tensor | None, prompts: list[str]) -> Tensor:
        if embeds is None:
            return self.encode_prompt(prompts)
        return broadcast_rows(embeds.to(self._execution_device, self.denoiser.dtype), len(prompts))

    def _class_condition(self, class_labels: Any, count: int, repeats: int) -> Tensor | None:
        """Return the class ids (B), or None for a model without classes.

        With guidance they have twice the batch size, and the unconditional half (the null class) comes first.
        """
        null = null_class(self.denoiser)
        if null is None:
            return None
        ids = broadcast([null] if class_labels is None else self.class_ids(class_labels), count)
        if self.do_classifier_free_guidance:
            ids = [null] * count + ids
        return torch.tensor(ids, device=self._execution_device).repeat_interleave(repeats, dim=0)

    def _initial_latents(
        self,
        latents: Tensor | None,
        num_images: int,
        height: Any,
        width: Any,
        generators: list[torch.Generator] | None,
    ) -> Tensor:
        """Return the initial noise of each image (B C h w, standard normal, float32)."""
        shape = latent_shape(self.vae, *self._size(height, width))
        if latents is not None:
            check_tensor("latents", latents, (num_images, *shape))
            return latents.to(device=self._execution_device, dtype=torch.float32)
        return initial_noise((num_images, *shape), generators, self._execution_device)

    def _finished(
        self, images: Tensor, output_type: str, return_dict: bool, start: Any = None
    ) -> ImagePipelineOutput | tuple:
        decoded = images if output_type == "latent" else decode_latents(self.vae, images)
        return super()._finished(decoded, output_type, return_dict, start)

    def _encoded(
        self, prompt: Any, class_labels: Any, embeds: Any, negative: Any, negative_embeds: Any, repeats: int,
        guide: Any, scale: float,
    ) -> tuple[int, Tensor | None, Tensor | None, tuple | None]:  # fmt: skip
        """Return the number of images, their text condition and class ids, and the guidance model, see `_guide`."""
        conditions = (prompt, class_labels, embeds)
        self._begin(scale, any(condition is not None for condition in conditions), guide is not None)
        count = max(1, *map(length, conditions))
        text = self._text_condition(prompt, negative, embeds, negative_embeds, count, repeats)
        labels = self._class_condition(class_labels, count, repeats)
        prompts = None if embeds is not None else broadcast(as_list(prompt) or [""], count)
        return count * repeats, text, labels, None if guide is None else self._guide(guide, prompts, repeats, text)

    def _guide(self, guide: Any, prompts: list[str] | None, repeats: int, text: Tensor | None) -> tuple:
        """Return the network of the guidance model, its own text condition, and the pipeline with its caption prior.

        They are None where those of this pipeline are used, as without `prompts`, if `text` (B L D) was passed.
        """
        network = denoiser_of(guide)
        if network is guide or text is None:
            return network, None, None
        if guide.text_encoder is not None and prompts is not None:
            text = guide.encode_prompt(prompts).repeat_interleave(repeats, dim=0)
        return network, text, guide

    def _denoise(
        self,
        noise: Tensor,
        prompt_embeds: Tensor | None,
        class_labels: Tensor | None,
        options: SamplingOptions,
        guide: tuple | None = None,
    ) -> Tensor:
        """Denoise standard normal noise to latents (B C h w); with guidance, the conditions have batch size 2B."""

        def predict(
            x: Tensor, timestep: Any, text: Tensor | None, expected: Tensor | None, network: Any = self.denoiser
        ) -> Tensor:
            return network(
                concat_condition(x, expected),
                timestep,
                encoder_hidden_states=text,
                class_labels=None if class_labels is None else class_labels[-len(x) :],
                return_dict=False,
            )[0]

        def weaker(x: Tensor, timestep: Any, *conditions: Tensor | None) -> Tensor:
            text, expected = own or conditions
            text = None if text is None else text.to(network.dtype)
            return predict(x.to(network.dtype), timestep, text, expected, network)

        def prepare(prompt_embeds: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            return prompt_embeds, _expected_latents(self, prompt_embeds, noise)

        network, text, pipeline = guide or (None, None, None)
        own = None if text is None else (text, _expected_latents(pipeline, text, noise))
        tensors = {"prompt_embeds": prompt_embeds}
        return self._sample(noise, predict, options, tensors, prepare, None if guide is None else weaker)


def _expected_latents(pipeline: Any, prompt_embeds: Tensor | None, like: Tensor) -> Tensor | None:
    prior = pipeline.caption_prior
    return None if prior is None else prior(prompt_embeds, tuple(like.shape[-2:]))

"""How a loaded pipeline generates one image for each row of a dataset: from captions, labels, controls or briefs.

`generator_of` finds out what a pipeline is. B images.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from pipelines.common.conditions import whole_numbers
from pipelines.common.pixels import MODES, straight, to_rgb
from pipelines.tools.cli import UserError
from pipelines.tools.guides import guidance_arguments, guidance_facts
from training.core.options import Options, option

Item = Mapping[str, Any]
"""A row of a dataset: pixel_values (3 R R in [-1, 1]), and what the generator needs of caption, label,
label_name, conditioning_pixel_values and brief."""


@dataclass
class SamplingConfig(Options):
    """How images are sampled."""

    num_inference_steps: int | None = option(None, at_least=1, essential=True)
    """Number of sampling steps; if unset, the default of the pipeline"""
    guidance_scale: float | None = option(None, at_least=0, essential=True)
    """Scale of classifier-free guidance; if unset, the default of the pipeline"""
    guidance_interval: list[float] | None = option(None)
    """Noise levels between which guidance applies, e.g. '[0.1,0.8]'; 0 is a clean image and 1 is noise.
    If unset, all"""
    guide: str | None = option(None)
    """Earlier checkpoint of the same run that guides instead of the unconditional prediction (autoguidance), also a
    model without conditions; --guidance_scale then has no effect"""
    autoguidance_scale: float | None = option(None, at_least=0)
    """Scale of the guidance by --guide; if unset, 2"""
    scheduler: str | None = option(None)
    """Scheduler for sampling (only for pipelines of Halftone); if unset, that of the pipeline"""
    seed: int = option(0, at_least=0)
    """Random seed; image i is generated with seed + i"""


@contextlib.contextmanager
def _unknown_words_unnamed() -> Iterator[None]:
    """Name no unknown words of prompts: here these are captions of the data, which the tokenizer of a run reports."""
    logger = logging.getLogger("pipelines.common.words")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class ImageGenerator:
    """Generates images with a pipeline. Subclasses say what they need of a row, and how the pipeline takes it.

    Attributes:
        kind: what the model is, in words.
        takes_captions, takes_labels, takes_briefs, takes_controls, takes_images: what of a row it needs.
        samples: whether images depend on a seed, rather than only on the row.
    """

    kind = "image generator"
    takes_captions = takes_labels = takes_briefs = takes_controls = takes_images = False
    samples = True

    def __init__(self, pipeline: Any, config: SamplingConfig):
        self.pipeline, self.config = pipeline, config
        if config.scheduler:
            if not hasattr(pipeline, "set_scheduler"):
                raise UserError(f"--scheduler: a {type(pipeline).__name__} keeps the scheduler that it was saved with")
            pipeline.set_scheduler(config.scheduler)
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)
        self._parameters = inspect.signature(pipeline.__call__).parameters
        self._guidance = guidance_arguments(pipeline, config)

    def __call__(
        self, items: Sequence[Item], numbers: Sequence[int], poll: Callable[[], None] | None = None
    ) -> list[Image.Image]:
        """Generate one image for each item (RGB, RGBA or grey); image number i uses seed + i.

        Args:
            poll: called after each sampling step; it may raise to stop.
        """
        return self._generated(items, numbers, poll)

    @property
    def fills(self) -> bool:
        """Whether the pipeline can fill a part of an image."""
        return "mask_image" in self._parameters and "strength" in self._parameters

    def fill(
        self,
        items: Sequence[Item],
        numbers: Sequence[int],
        images: Sequence[Image.Image],
        masks: Sequence[Image.Image],
        jump_n_sample: int,
        poll: Callable[[], None] | None = None,
    ) -> list[Image.Image]:
        """Fill the white part of the mask of each image, for the condition of its row; pixels elsewhere are kept.

        All images have the size that the pipeline generates. The other arguments are those of a call.
        """
        given = {"image": list(images), "mask_image": list(masks), "jump_n_sample": jump_n_sample, "paste_back": True}
        return self._generated(items, numbers, poll, given)

    def _generated(
        self,
        items: Sequence[Item],
        numbers: Sequence[int],
        poll: Callable[[], None] | None,
        further: Mapping[str, Any] | None = None,
    ) -> list[Image.Image]:
        options = self._options()
        if poll is not None and self._takes("callback_on_step_end"):
            options["callback_on_step_end"] = functools.partial(_polled, poll)
        seeds = [self.config.seed + number for number in numbers]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options |= {"generator": generators, **(further or {})}
        try:
            with _unknown_words_unnamed():
                images = self.pipeline(**self.arguments(items), **options).images
        except ValueError as error:  # of check_inputs: a class that the model does not know, for example
            raise UserError(f"the {self.kind} does not take these data: {error}") from None
        return [_of_known_mode(image) for image in images]

    @property
    def given(self) -> str:
        """What the model is given, in words, if that describes a single image and not a class; empty otherwise."""
        known = {"captions": self.takes_captions, "briefs": self.takes_briefs, "control images": self.takes_controls}
        return " and ".join(name for name, taken in known.items() if taken)

    @property
    def needs(self) -> list[str]:
        """The keys of an item that it needs."""
        taken = {
            "caption": self.takes_captions,
            "label": self.takes_labels,
            "brief": self.takes_briefs,
            "conditioning_pixel_values": self.takes_controls,
            "pixel_values": self.takes_images,
        }
        return [name for name, needed in taken.items() if needed]

    def arguments(self, items: Sequence[Item]) -> dict[str, Any]:
        """Return the arguments that make the pipeline generate one image for each item."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return how images are sampled, for the record of an evaluation."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        return {
            "steps": self._setting("num_inference_steps"),
            "scheduler": type(scheduler).__name__ if scheduler is not None else None,
            **guidance_facts(self.config, self._setting("guidance_scale")),
            "seed": self.config.seed,
        }

    def _options(self) -> dict[str, Any]:
        options = {name: getattr(self.config, name) for name in ("num_inference_steps", "guidance_scale")}
        taken = {name: value for name, value in options.items() if value is not None and self._takes(name)}
        return taken | self._guidance

    def _takes(self, name: str) -> bool:
        return name in self._parameters or any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())

    def _setting(self, name: str) -> Any:
        chosen = getattr(self.config, name)
        if chosen is not None:
            return chosen
        default = self._parameters[name].default if name in self._parameters else None
        return default if isinstance(default, (int, float)) else None


class ConditionalGenerator(ImageGenerator):
    """A pipeline that takes prompts, class labels, both or neither: one of Halftone, or any other of Diffusers."""

    kind = "diffusion model"

    def __init__(self, pipeline: Any, config: SamplingConfig):
        super().__init__(pipeline, config)
        is_ours = hasattr(pipeline, "unet") and hasattr(pipeline, "_own_scheduler")
        if is_ours:
            self.takes_captions = pipeline.text_encoder is not None
            self.takes_labels = _denoiser(pipeline).config.num_class_embeds is not None
        else:
            self.takes_captions = "prompt" in self._parameters
            self.takes_labels = "class_labels" in self._parameters
        self._count = next((n for n in ("num_images_per_prompt", "batch_size") if n in self._parameters), None)

    def arguments(self, items: Sequence[Item]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if self.takes_captions:
            arguments["prompt"] = [item["caption"] for item in items]
        if self.takes_labels:
            # Names where the model has some: other data may number the same classes in another way.
            known = (self.pipeline.config.get("id2label") or {}).values()
            numbers = whole_numbers(map(str, known))  # an integer would be one of these names
            arguments["class_labels"] = [
                item["label_name"] if numbers or item.get("label_name") in known else int(item["label"])
                for item in items
            ]
        if not arguments and self._count is not None:
            arguments[self._count] = len(items)
        return arguments


class ControlledGenerator(ImageGenerator):
    """A latent diffusion model with a ControlNet, which gets the control image of each row and no prompt."""

    kind = "ControlNet"
    takes_controls = True
    scale = 1.0

    def __call__(
        self, items: Sequence[Item], numbers: Sequence[int], poll: Callable[[], None] | None = None
    ) -> list[Image.Image]:
        """Generate each image in the size of its control image, those of one size together."""
        sizes = [item["conditioning_pixel_values"].shape[-2:] for item in items]
        images: dict[int, Image.Image] = {}
        for size in dict.fromkeys(sizes):
            own = [place for place, other in enumerate(sizes) if other == size]
            some = [items[place] for place in own], [numbers[place] for place in own]
            images |= dict(zip(own, super().__call__(*some, poll), strict=True))
        return [images[place] for place in range(len(items))]

    def arguments(self, items: Sequence[Item]) -> dict[str, Any]:
        controls = torch.stack([item["conditioning_pixel_values"] for item in items])
        height, width = controls.shape[-2:]
        size = {"height": height, "width": width}
        return {"control_image": controls, "controlnet_conditioning_scale": self.scale, **size}


class BriefGenerator(ImageGenerator):
    """A poster decoder, which gets the design brief of each row."""

    kind = "poster decoder"
    takes_briefs = True

    def arguments(self, items: Sequence[Item]) -> dict[str, Any]:
        return {"briefs": [item["brief"] for item in items]}


class DrawingModel(ImageGenerator):
    """A model of images and captions, which draws the caption of each row."""

    kind = "image–caption model"
    takes_captions = True
    samples = False

    def __call__(
        self, items: Sequence[Item], numbers: Sequence[int], poll: Callable[[], None] | None = None
    ) -> list[Image.Image]:
        with _unknown_words_unnamed():
            images = self.pipeline.draw([item["caption"] for item in items]).images
        return [_of_known_mode(image) for image in images]

    @property
    def invents(self) -> bool:
        """Whether the model has a prior, from which it invents pairs."""
        return self.pipeline.prior is not None

    def invent(self, numbers: Sequence[int]) -> list[tuple[Image.Image, str]]:
        """Return new pairs of image and caption; pair i uses seed + i."""
        generators = [torch.Generator().manual_seed(self.config.seed + number) for number in numbers]
        pairs = self.pipeline.sample(len(numbers), generator=generators)
        return list(zip(pairs.images, pairs.captions, strict=True))

    def facts(self) -> dict[str, Any]:
        return {"from": "captions"}


class Reconstructor(ImageGenerator):
    """An autoencoder, which reconstructs the image of each row."""

    kind = "autoencoder"
    takes_images = True
    samples = False

    def __call__(
        self, items: Sequence[Item], numbers: Sequence[int], poll: Callable[[], None] | None = None
    ) -> list[Image.Image]:
        pixels = torch.stack([item["pixel_values"] for item in items])
        return [_of_known_mode(image) for image in self.pipeline((straight(pixels) + 1) / 2).images]

    def facts(self) -> dict[str, Any]:
        return {"from": "images"}


def _of_known_mode(image: Image.Image) -> Image.Image:
    """Return an image as RGB, unless it is grey or transparent; those who measure it convert it as they need it."""
    return image if image.mode in MODES.values() else to_rgb(image)


def _polled(poll: Callable[[], None], *step: Any) -> dict[str, Any]:
    poll()
    return {}


def generator_of(pipeline: Any, config: SamplingConfig) -> ImageGenerator:
    """Find out what a pipeline is, and return its generator.

    Raises:
        UserError: it generates no images, or needs something that a row of a dataset does not have.
    """
    name = type(pipeline).__name__
    if hasattr(pipeline, "draw") and hasattr(pipeline, "caption"):
        return DrawingModel(pipeline, config)
    if hasattr(pipeline, "controlnet"):
        return ControlledGenerator(pipeline, config)
    parameters = inspect.signature(pipeline.__call__).parameters
    if "briefs" in parameters:
        return BriefGenerator(pipeline, config)
    if name == "AutoencoderPipeline":
        return Reconstructor(pipeline, config)
    unknown = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in ("prompt", "class_labels", "generator")
    ]
    if unknown or "generator" not in parameters:
        what = f"needs {', '.join(unknown)}" if unknown else "takes no generator"
        raise UserError(f"a {name} {what}, so it cannot generate images for the rows of a dataset")
    return ConditionalGenerator(pipeline, config)


def native_size(pipeline: Any) -> tuple[int, int] | None:
    """Return (height, width) in pixels of the images that a pipeline generates by default; None if it is not known."""
    for name, scaled in (("model", False), ("unet", True), ("transformer", True), ("vae", False)):
        module = getattr(pipeline, name, None)
        size = getattr(getattr(module, "config", None), "sample_size", None)
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
            factor = getattr(pipeline, "vae_scale_factor", 1) if scaled else 1
            return sides[0] * factor, sides[1] * factor
    return None


def _denoiser(pipeline: Any) -> Any:
    """Return the network that denoises; published pipelines of earlier versions have only a U-Net."""
    return getattr(pipeline, "denoiser", pipeline.unet)

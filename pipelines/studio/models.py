"""The models that a studio shows: loading them, and what each of them can do."""

from __future__ import annotations

import contextlib
import inspect
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tools.cli import UserError
from ..tools.generated import model_name
from ..tools.loading import find_pipeline, load_on_device
from ..tools.pairs import makes_pairs

MOST_EXAMPLES = 6


@dataclass
class Model:
    """A loaded pipeline. Only one thread at a time uses it, inside `used`."""

    name: str
    pipeline: Any
    prompts: list[str] = field(default_factory=list)
    """Prompts that serve as examples"""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def used(self, sampler: str | None = None) -> Iterator[Any]:
        """Context manager that gives the pipeline, with another sampler if `sampler` names one.

        Raises:
            ValueError: The sampler does not suit the model.
        """
        with self.lock:
            own = getattr(self.pipeline, "scheduler", None)
            try:
                if sampler:
                    self.pipeline.set_scheduler(sampler)
                yield self.pipeline
            finally:
                if own is not None:
                    self.pipeline.scheduler = own

    @property
    def takes_briefs(self) -> bool:
        """Whether the model generates posters from design briefs."""
        return hasattr(self.pipeline, "brief_encoder")

    @property
    def takes_controls(self) -> bool:
        """Whether the model has a ControlNet."""
        return hasattr(self.pipeline, "control_tensors")

    @property
    def makes_pairs(self) -> bool:
        """Whether the model generates images and captions from one latent vector."""
        return makes_pairs(self.pipeline)

    @property
    def reads_posters(self) -> bool:
        """Whether the model predicts the layout of posters from images."""
        return getattr(self.pipeline, "encoder", None) is not None and hasattr(self.pipeline, "abstract")

    @property
    def generates(self) -> bool:
        """Whether the model denoises images step by step."""
        return hasattr(self.pipeline, "denoiser")

    @property
    def distilled(self) -> bool:
        """Whether the model was distilled to a few steps, with guidance in its weights, so that it takes none."""
        return self.generates and bool(self.pipeline.config.get("distilled"))

    @property
    def takes_text(self) -> bool:
        return getattr(self.pipeline, "text_encoder", None) is not None

    @property
    def labels(self) -> list[str]:
        """The class names of the model by class id; ids as text if they have no names."""
        if not self.generates or self.takes_briefs or self.pipeline.denoiser.config.num_class_embeds is None:
            return []
        names = self.pipeline.config.id2label or {}
        count = int(self.pipeline.denoiser.config.num_class_embeds) - 1
        return [str(names.get(str(number), number)) for number in range(count)]

    @property
    def starts_from_images(self) -> bool:
        """Whether the pipeline takes an image to start from, and a mask of the part to fill."""
        # A pipeline with a ControlNet passes its arguments on, but they are named in the class that checks them.
        calls = [vars(one)["__call__"] for one in type(self.pipeline).__mro__ if "__call__" in vars(one)]
        return self.generates and any(
            {"image", "mask_image"} <= inspect.signature(call).parameters.keys() for call in calls
        )

    def size(self) -> tuple[int, int]:
        """Return height and width of the training images in pixels."""
        return self.pipeline._size(None, None)


def load_models(
    paths: Sequence[str], device: str | None, *, dtype: Any = None, trust_remote_code: bool = False
) -> list[Model]:
    """Load the models of `--model`, each with a name of its own.

    Raises:
        UserError: A model cannot be loaded, or the studio has no tab for it.
    """
    models: list[Model] = []
    for path in paths:
        pipeline = load_on_device(path, device, dtype=dtype, trust_remote_code=trust_remote_code)
        name, others = model_name(path), {model.name for model in models}
        while name in others:
            name += "'"
        model = Model(name, pipeline, example_prompts(find_pipeline(path), getattr(pipeline, "tokenizer", None)))
        if not (model.generates or model.makes_pairs or model.reads_posters):
            raise UserError(
                f"--model {path} is a {type(pipeline).__name__}, for which the studio has no tab; give a model that "
                "generates images, captions images or analyses posters"
            )
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)
        models.append(model)
    return models


def example_prompts(folder: Path, tokenizer: Any) -> list[str]:
    """Return a few prompts for a model: those of the samples of its run, otherwise words that its tokenizer knows.

    Args:
        folder: the pipeline; if it is that of a run, the folder above it has record.json.
        tokenizer: None for a model without text, which has no prompts.
    """
    if tokenizer is None:
        return []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        prompts = json.loads((folder.parent / "record.json").read_text(encoding="utf-8"))["prompts"]
        if texts := list(dict.fromkeys(text for text in prompts if isinstance(text, str) and text)):
            return texts[:MOST_EXAMPLES]
    words = {word.removeprefix("▁").removesuffix("</w>") for word in tokenizer.get_vocab()}
    known = words - set(tokenizer.all_special_tokens)
    return sorted(word for word in known if word.isalpha() and word.islower() and len(word) > 2)[:MOST_EXAMPLES]

"""The models that a studio shows: loading them, and what each of them can do."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..tools.cli import UserError
from ..tools.generated import model_name
from ..tools.loading import load_on_device
from ..tools.pairs import makes_pairs


@dataclass
class Model:
    """A loaded pipeline. Only one thread at a time uses it, inside `used`."""

    name: str
    pipeline: Any
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
        UserError: A model cannot be loaded, or there is no tab for it.
    """
    models: list[Model] = []
    for path in paths:
        pipeline = load_on_device(path, device, dtype=dtype, trust_remote_code=trust_remote_code)
        name, others = model_name(path), {model.name for model in models}
        while name in others:
            name += "'"
        model = Model(name, pipeline)
        if not (model.generates or model.makes_pairs or model.reads_posters):
            raise UserError(
                f"--model {path} is a {type(pipeline).__name__}, for which the studio has no tab; give a model that "
                "generates images, captions images or analyses posters"
            )
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)
        models.append(model)
    return models

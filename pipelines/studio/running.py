"""Generate in a thread of its own, and show the images while they are denoised.

Shapes: B images, C channels, h w latent cells (pixels for a model on pixels).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from ..common.latents import decode_latents
from ..common.pixels import straight
from .models import Model

LEAST_SECONDS = 0.4
"""Between two previews; and decoding them takes at most a third of the time."""


@dataclass
class Shown:
    """What is seen during generation: images, and how many steps are done. `done` marks the final images."""

    images: list[Image.Image]
    step: int
    steps: int
    done: bool = False


class Stopped(Exception):
    """Nobody waits for the images any more."""


def generate(model: Model, arguments: dict[str, Any], sampler: str | None = None) -> Generator[Shown, None, None]:
    """Call the pipeline with `arguments`, and yield its images while they are denoised; the last are the final ones.

    Closing the iterator ends the generation after its current step.

    Raises:
        Exception: every error of the pipeline is raised again here.
    """
    waiting: queue.Queue[Shown | BaseException] = queue.Queue()
    stop = threading.Event()

    def work() -> None:
        try:
            with model.used(sampler) as pipeline:
                name = pipeline._callback_tensor_inputs[0]
                callback = _Previews(waiting, stop, name)
                images = pipeline(
                    **arguments, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[name]
                ).images
            if not stop.is_set():
                waiting.put(Shown(list(images), callback.step, callback.step, done=True))
            else:
                waiting.put(Stopped())
        except BaseException as error:
            waiting.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            event = waiting.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if event.done:
                return
    finally:
        stop.set()


class _Previews:
    """Callback of a pipeline that puts previews into a queue, and interrupts the pipeline when asked to."""

    def __init__(self, waiting: queue.Queue, stop: threading.Event, name: str):
        self.waiting, self.stop, self.name = waiting, stop, name
        self.step, self.next = 0, time.monotonic() + LEAST_SECONDS

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.step = step + 1
        if self.stop.is_set():
            pipeline._interrupt = True
        elif time.monotonic() >= self.next:
            started = time.monotonic()
            images = preview(pipeline, tensors[self.name])
            self.waiting.put(Shown(images, self.step, max(self.step, pipeline.num_timesteps)))
            ended = time.monotonic()
            self.next = ended + max(LEAST_SECONDS, 2 * (ended - started))
        return {}


def preview(pipeline: Any, x: Tensor) -> list[Image.Image]:
    """Return what the noisy samples of a step show (B C h w), as images."""
    # Samplers with large noise levels scale x by them; without this, early previews would be black and white only.
    x = x / x.flatten(1).std(dim=1).clamp(min=1).reshape(-1, 1, 1, 1)
    vae = getattr(pipeline, "vae", None)
    images = x if vae is None else decode_latents(vae, x)
    return pipeline.image_processor.postprocess(straight(images.float().clamp(-1, 1)), output_type="pil")

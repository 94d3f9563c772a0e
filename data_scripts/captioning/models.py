"""Models that caption images: any of Transformers, and our own joint models of images and captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.caption import load_captioner as load_joint_model
from pipelines.tools.cli import UserError, one_line
from pipelines.tools.devices import get_device
from pipelines.tools.loading import without_loading_bars

if TYPE_CHECKING:
    import torch
    from PIL import Image

Captioner = Callable[[Sequence["Image.Image"]], list[str]]
USUAL_NEW_TOKENS = 50
# Models whose caption begins with the prompt. Others answer it, and their caption does not contain it.
_CONTINUING = ("blip", "git", "vision-encoder-decoder")
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, ImportError, TypeError, KeyError, AttributeError)


def load_captioner(model: str, prompt: str | None, max_new_tokens: int | None, device: str | None) -> Captioner:
    """Load a model, and return a function that captions a list of upright RGB images.

    Args:
        model: name or folder of a model of Transformers, or a run, checkpoint, pipeline folder or Hub id of an
            image–caption model.
        prompt: text that the caption answers or continues.
        max_new_tokens: largest number of tokens of a caption; None is the usual number.
        device: the value of `--device`.

    Raises:
        UserError: the model or the device does not exist, the model does not caption images, or it needs a prompt.
    """
    path = Path(model).expanduser()
    chosen = get_device(device)
    config = None if path.exists() and not (path / "config.json").is_file() else _config_of(str(path), model)
    if config is not None:
        return _TransformersCaptioner(model, config, prompt, max_new_tokens or USUAL_NEW_TOKENS, chosen)
    pipeline = load_joint_model(model, device)
    if prompt is not None:
        raise UserError(f"--prompt: {model} is an image–caption model, which takes no prompt; leave it out")
    longest = pipeline.model.config.max_length
    length = None if max_new_tokens is None else min(longest, max_new_tokens + 2)  # with the tokens of start and end
    return lambda images: pipeline.caption(list(images), max_length=length)


def _config_of(path: str, model: str) -> Any:
    """Return the config of a model of Transformers, or None if `path` has none.

    Raises:
        UserError: it is the config of another kind of model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = AutoConfig.from_pretrained(path)
    except OSError:  # no file config.json, or no network: the pipeline's loader names the cause
        return None
    except (ValueError, KeyError) as error:
        raise UserError(f"--model {model} cannot be loaded by Transformers ({one_line(error, 200)})") from None
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"--model {model} is a model of the type {config.model_type}, which does not caption images; name one for "
            "images and text, such as Salesforce/blip-image-captioning-base"
        )
    return config


class _TransformersCaptioner:
    """Captions images with a model of Transformers, always the most likely way, so that it can be repeated."""

    def __init__(self, name: str, config: Any, prompt: str | None, max_new_tokens: int, device: torch.device):
        import torch
        from transformers import AutoModelForImageTextToText

        self._name, self._prompt, self._device, self._config = name, prompt, device, config
        self._max_new_tokens = max_new_tokens
        path = str(Path(name).expanduser())
        try:
            with without_loading_bars():
                self._processor, self._images, self._tokenizer = _processors(path)
                # Processors without instructions for it compute slowly, or not at all, in half precision.
                dtype = torch.float32 if device.type == "cpu" else "auto"
                model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True)
        except _LOADING_ERRORS as error:
            raise UserError(f"--model {name} cannot be loaded ({one_line(error, 300)}); name another") from error
        self._model = model.to(device).eval()
        for part in (model, getattr(model, "text_decoder", None)):  # BLIP generates with a model in it
            generation = getattr(part, "generation_config", None)
            if generation is not None:
                generation.max_length = None  # `max_new_tokens` is given instead
        self._tokenizer.padding_side = "left"  # a padded text would end before its caption begins
        self._is_chat = bool(getattr(self._processor, "chat_template", None))
        if self._is_chat and not prompt:
            raise UserError(
                f"--model {name} answers a question about an image; ask one with --prompt, for example "
                "--prompt 'Describe this image in one sentence.'"
            )

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        import torch

        try:
            with torch.inference_mode():
                inputs = self._inputs(list(images)).to(self._device, self._model.dtype)
                options = {"max_new_tokens": self._max_new_tokens, "do_sample": False}
                ids = self._model.generate(**inputs, **options)
                return self._tokenizer.batch_decode(self._without_prompt(ids, inputs), skip_special_tokens=True)
        except torch.OutOfMemoryError:
            raise UserError(f"the device {self._device} has too little memory; lower --batch_size") from None
        except (*_LOADING_ERRORS, IndexError) as error:
            advice = "is it a model without a prompt" if self._prompt else "does it need a --prompt"
            raise UserError(
                f"--model {self._name} cannot caption these images ({one_line(error, 300)}); {advice}?"
            ) from error

    def _inputs(self, images: list[Image.Image]) -> Any:
        """Return what `generate` receives."""
        if self._is_chat:
            question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self._prompt}]}]
            text = self._processor.apply_chat_template(question, add_generation_prompt=True)
            each = [[image] for image in images]  # several images may belong to one question
            return self._processor(images=each, text=[text] * len(images), padding=True, return_tensors="pt")
        if self._prompt is None or self._config.model_type in ("git", "vision-encoder-decoder"):
            pixels = (self._processor or self._images)(images=images, return_tensors="pt")
            return pixels if self._prompt is None else self._with_beginning(pixels, len(images))
        if self._processor is None:
            raise ValueError("it has no processor for images and text")
        return self._processor(images=images, text=[self._prompt] * len(images), padding=True, return_tensors="pt")

    def _with_beginning(self, inputs: Any, count: int) -> Any:
        """Add the prompt as the first tokens of the caption, without the token that ends a text."""
        import torch

        ids = self._tokenizer(self._prompt, add_special_tokens=False).input_ids
        if self._config.model_type == "git":
            name, first = "input_ids", self._tokenizer.cls_token_id
        else:
            name, first = "decoder_input_ids", self._model.generation_config.decoder_start_token_id
        inputs[name] = torch.tensor([[first, *ids] if first is not None else ids] * count)
        return inputs

    def _without_prompt(self, ids: torch.Tensor, inputs: Any) -> torch.Tensor:
        """Return the ids of the answers: most decoders repeat the prompt before them."""
        prompt = inputs.get("input_ids")
        if prompt is None or self._config.is_encoder_decoder or self._config.model_type in _CONTINUING:
            return ids
        length = prompt.shape[1]
        return ids[:, length:] if bool((ids[:, :length] == prompt).all()) else ids


def _processors(path: str) -> tuple[Any, Any, Any]:
    """Return a processor of images and text (None if the model has none), of images, and of text."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    processor = AutoProcessor.from_pretrained(path)
    images, tokenizer = getattr(processor, "image_processor", None), getattr(processor, "tokenizer", None)
    if images is None or tokenizer is None:
        return None, AutoImageProcessor.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    return processor, images, tokenizer

"""Generate images with an exported latent diffusion model, without PyTorch:

    from onnx_latent_diffusion import OnnxLatentDiffusionPipeline

    pipeline = OnnxLatentDiffusionPipeline()  # the model in the folder of this file
    pipeline("a minimalist poster", generator=0)[0].save("poster.png")

It needs NumPy, ONNX Runtime, Pillow and (for models with text) tokenizers. It does what Halftone's
`LatentDiffusionPipeline` does, and draws the noise that PyTorch draws on a CPU, so that the same seed gives the same
image up to rounding.

Shapes: B images, C latent channels, h w latent cells, H W pixels, L tokens, D text width.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

CONFIG = "onnx_model.json"
NOISE_SCHEDULE = "alphas_cumprod.npy"
TOKENIZER = "tokenizer.json"
FLOW = "flow_prediction"
LEAST_ALPHA = 0.5 / 255  # less becomes 0 in a file
OUTPUT_TYPES = ("pil", "np", "latent")
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 25, 2.5
Array = np.ndarray


class OnnxLatentDiffusionPipeline:
    """Pipeline for generating images from prompts, class labels, both, or neither.

    Args:
        folder: the exported model; by default the folder of this file.
        providers: execution providers of ONNX Runtime, such as `["CUDAExecutionProvider", "CPUExecutionProvider"]`.
        num_threads: number of threads; by default, ONNX Runtime chooses it.

    Raises:
        ValueError: the folder does not contain such a model.
    """

    def __init__(
        self, folder: str | Path | None = None, providers: Sequence[str] = ("CPUExecutionProvider",),
        num_threads: int | None = None,
    ):  # fmt: skip
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        if not (self.folder / CONFIG).is_file():
            raise ValueError(f"`folder` {self.folder} has no {CONFIG}; pass a folder that pipelines/export.py has made")
        description = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        self.config: dict[str, Any] = description["config"]
        self.parts: dict[str, Any] = description["parts"]
        if "denoiser" not in self.config:
            raise ValueError(f"`folder` {self.folder} has a {description['pipeline']}, which has no prompt to image")
        schedule = self.folder / NOISE_SCHEDULE
        self.noise_schedule = np.load(schedule) if schedule.is_file() else None
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = num_threads or 0
        self._providers = list(providers)
        self._sessions: dict[str, Any] = {}
        self._tokenizer: Any = None

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None, width: int | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None, num_images_per_prompt: int = 1,
        generator: int | Sequence[int] | None = None, latents: Array | None = None, output_type: str = "pil",
        guidance_interval: Sequence[float] = (0.0, 1.0), scheduler: str | None = None,
        control_image: Any = None, controlnet_conditioning_scale: float | Sequence[float] = 1.0,
    ) -> Any:  # fmt: skip
        """Return `num_images_per_prompt` images for each prompt (or class label), in that order, as `output_type` says.

        Args:
            prompt, negative_prompt: what to include (paired with labels), or not.
            class_labels: names, or ids unless names are numbers.
            height, width: size in pixels; by default that of training.
            num_inference_steps: number of steps; by default 25, or that of a distilled model.
            guidance_scale: classifier-free guidance, disabled at 1 and below; by default 2.5, or 1 if distilled.
            generator: a seed (image k uses seed + k), or a list with a seed for each image.
            latents: standard normal noise to start from, B C h w.
            output_type: "pil" (a list of images), "np" (B H W C in [0, 1]) or "latent" (B C h w).
            guidance_interval: noise levels (low, high) with guidance.
            scheduler: "ddim" or "dpm", and "euler" for flow matching; by default the model's own.
            control_image: an array B C H W in [0, 1] (or 1 C H W), or a list of them for several ControlNets.
            controlnet_conditioning_scale: how strongly each ControlNet steers.

        Raises:
            ValueError: an argument is invalid; the message quotes it.
        """
        num_inference_steps, guidance_scale = self._given_or_default(num_inference_steps, guidance_scale)
        self._check(prompt, negative_prompt, class_labels, output_type, guidance_interval, guidance_scale)
        entries = [len(one) for one in (as_list(prompt), as_list(class_labels)) if one]
        count = max(entries, default=1)
        if any(entry not in (1, count) for entry in entries) or len(as_list(negative_prompt)) not in (0, 1, count):
            raise ValueError(f"prompts and labels must have one entry each, or equally many, but have {entries}")
        repeats = _positive("num_images_per_prompt", num_images_per_prompt)
        guided = guidance_scale > 1 and bool(entries)
        text = self._text(prompt, negative_prompt, count, repeats, guided)
        labels = self._labels(class_labels, count, repeats, guided)
        noise = [TorchNoise(seed) for seed in _seeds(generator, count * repeats)]
        x = self._initial(latents, noise, self._latent_shape(height, width))
        control = self._control(control_image, controlnet_conditioning_scale, x)
        predict = self._predictor(text, labels, guidance_scale if guided else None, guidance_interval, control, x)
        steps, config = _positive("num_inference_steps", num_inference_steps), self.config["scheduler"]
        sampler = make_sampler(scheduler or config["name"], config, self.noise_schedule, steps)
        x = self._restarted(denoised(sampler, predict, x, self.config["least_noise_level"]), predict, noise)
        return x if output_type == "latent" else self._images(x, output_type)

    def run(self, part: str, **inputs: Array) -> list[Array]:
        """Run one part of the model, such as "text_encoder"; inputs that it does not have are left out."""
        if part not in self._sessions:
            path = str(self.folder / self.parts[part]["file"])
            self._sessions[part] = onnxruntime.InferenceSession(path, self._options, providers=self._providers)
        known = {one.name for one in self._sessions[part].get_inputs()}
        return self._sessions[part].run(None, {name: value for name, value in inputs.items() if name in known})

    def tokenize(self, prompts: Sequence[str]) -> Array:
        """Return token ids, B L, padded and truncated to the length of training."""
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self.folder / TOKENIZER))
        return np.array([encoded.ids for encoded in self._tokenizer.encode_batch(list(prompts))], dtype=np.int64)

    def class_ids(self, class_labels: Any) -> list[int]:
        """Convert class labels, given as ids or names, to ids; where all names are numbers, a number is a name."""
        classes, names = self.config["num_classes"], self.config["id2label"] or {}
        by_name = {name: int(id_) for id_, name in names.items()}
        digits = all(re.fullmatch("-?[0-9]{1,18}", name) for name in by_name)
        numbers = {int(name): name for name in by_name} if digits else {}
        ids = []
        for label in as_list(class_labels):
            name = label if isinstance(label, str) else numbers.get(int(label)) if numbers else None
            if (numbers or isinstance(label, str)) and name not in by_name:
                known = ", ".join(list(by_name)[:20]) or "unnamed; pass class ids"
                raise ValueError(f"`class_labels` has {label!r}, which is not a class; the classes are {known}")
            ids.append(by_name[name] if name is not None else int(label))
            if not 0 <= ids[-1] < (classes or 0):
                raise ValueError(f"`class_labels` must be from 0 to {(classes or 0) - 1}, but has {label!r}")
        return ids

    def _given_or_default(self, steps: Any, scale: Any) -> tuple[Any, Any]:
        """Return the number of steps and the guidance scale, with the defaults of the model in the place of None."""
        distilled = self.config.get("distilled")
        usual = (distilled["num_inference_steps"], 1.0) if distilled else (NUM_INFERENCE_STEPS, GUIDANCE_SCALE)
        return usual[0] if steps is None else steps, usual[1] if scale is None else scale

    def _check(self, prompt: Any, negative: Any, labels: Any, output_type: str, interval: Any, scale: float) -> None:
        for name, value in (("prompt", prompt), ("negative_prompt", negative)):
            if not all(isinstance(one, str) for one in as_list(value)):
                raise ValueError(f"`{name}` must be a string or a list of strings, but is {value!r}")
            if value and not self.config["takes_text"]:
                raise ValueError(f"this model takes no text, so `{name}` must be None, but is {value!r}")
        if (distilled := self.config.get("distilled")) and scale > 1:
            raise ValueError(
                f"`guidance_scale` is {scale}, but this model was distilled: its weights contain guidance with a scale "
                f"of {distilled['guidance_scale']:g}, and it has no unconditional prediction; leave it out, or pass 1"
            )
        if negative and scale <= 1:
            raise ValueError(f"`negative_prompt` needs a `guidance_scale` above 1, but it is {scale}")
        if labels is not None and self.config["num_classes"] is None:
            raise ValueError(f"this model has no classes, so `class_labels` must be None, but is {labels!r}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, but is {output_type!r}")
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"`guidance_interval` must be (low, high) with 0 <= low <= high <= 1, but is {interval!r}")

    def _text(self, prompt: Any, negative: Any, count: int, repeats: int, guided: bool) -> Array | None:
        """Return the text condition, B L D; with guidance 2B, and the unconditional half comes first."""
        if not self.config["takes_text"]:
            return None
        prompts, negatives = (np.broadcast_to(as_list(one) or [""], count).tolist() for one in (prompt, negative))
        encoded = self.run("text_encoder", input_ids=self.tokenize(negatives * guided + prompts))
        return np.repeat(encoded[0], repeats, axis=0)

    def _labels(self, class_labels: Any, count: int, repeats: int, guided: bool) -> Array | None:
        """Return class ids, B or, with guidance, 2B: the null class is the last one, and comes first."""
        null = self.config["num_classes"]
        if null is None:
            return None
        ids = np.broadcast_to([null] if class_labels is None else self.class_ids(class_labels), count)
        return np.repeat(np.array([null] * count * guided + ids.tolist(), dtype=np.int64), repeats)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        factor, step = self.config["vae_scale_factor"], self.config["size_multiple"]
        trained = [side * factor for side in self.config["sample_size"]]
        sides = [own if given is None else given for given, own in zip((height, width), trained)]
        for name, side, own in zip(("height", "width"), sides, trained):
            if side != own and not self.config["dynamic_size"]:
                raise ValueError(f"`{name}` is {side}, but this model was exported for {own} only")
            if side < 1 or side % step:
                raise ValueError(f"`{name}` must be a multiple of {step}, but is {side}")
        return (self.config["latent_channels"], sides[0] // factor, sides[1] // factor)

    def _initial(self, latents: Array | None, noise: list[TorchNoise], shape: tuple[int, int, int]) -> Array:
        if latents is None:
            return np.stack([one.normal(shape) for one in noise])
        if np.shape(latents) != (len(noise), *shape):
            raise ValueError(f"`latents` must have shape {(len(noise), *shape)}, but has {np.shape(latents)}")
        return np.asarray(latents, dtype=np.float32)

    def _control(self, control: Any, scale: Any, x: Array) -> dict[str, Array]:
        """Return the inputs of the steered U-Net, with a control for each of B images."""
        if control is None:
            return {}
        nets = self.config["controlnets"]
        controls = list(control) if isinstance(control, (list, tuple)) else [control]
        scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * nets
        if not len(controls) == len(scales) == nets:
            raise ValueError(f"this model has {nets} ControlNets, but `control_image` has {len(controls)} entries")
        inputs = {"conditioning_scales": np.array(scales, dtype=np.float32)}
        for number, one in enumerate(controls):
            if np.ndim(one) != 4 or len(one) not in (1, len(x)):
                raise ValueError(f"`control_image` must be an array B C H W, but has shape {np.shape(one)}")
            inputs[f"controls_{number}"] = np.broadcast_to(np.asarray(one, np.float32), (len(x), *np.shape(one)[1:]))
        return inputs

    def _predictor(
        self, text: Array | None, labels: Array | None, scale: float | None, interval: Sequence[float],
        control: Mapping[str, Array], like: Array,
    ) -> Callable[..., Array]:  # fmt: skip
        """Return the function (x_t, timestep, whether it may be guided) → prediction, with guidance applied."""
        expected = None
        if "caption_prior" in self.parts and text is not None:
            cells = np.zeros((len(text), *like.shape[1:]), dtype=np.float32)
            expected = self.run("caption_prior", encoder_hidden_states=text, sample=cells)[0]

        def predict(x: Array, timestep: float, may_guide: bool = True) -> Array:
            level = noise_level(timestep, self.noise_schedule, self.config["scheduler"]["num_train_timesteps"])
            in_interval = tuple(interval) == (0, 1) or interval[0] < level <= interval[1]
            guides = scale is not None and may_guide and in_interval
            doubled = np.concatenate([x, x]) if guides else x
            rows = len(doubled)
            inputs = {"timestep": np.full(rows, timestep, dtype=np.float32)}
            inputs["sample"] = doubled if expected is None else np.concatenate([doubled, expected[-rows:]], axis=1)
            conditions = {"encoder_hidden_states": text, "class_labels": labels}
            inputs |= {name: value[-rows:] for name, value in conditions.items() if value is not None}
            for name, value in control.items():
                inputs[name] = np.concatenate([value, value]) if guides and value.ndim == 4 else value
            prediction = self.run("steered_unet" if control else self.config["denoiser"], **inputs)[0]
            if not guides or scale is None:
                return prediction
            unconditional, conditional = np.split(prediction, 2)
            return unconditional + float(scale) * (conditional - unconditional)

        return predict

    def _restarted(self, x: Array, predict: Callable[..., Array], noise: list[TorchNoise]) -> Array:
        """Denoise finished samples again, from one low noise level after the other, with the noise and its negative."""
        for level in self.config["restart_levels"]:
            drawn = np.stack([one.normal(x.shape[1:]) for one in noise])
            timestep = level * self.config["scheduler"]["num_train_timesteps"]
            noisy = [(1 - level) * x + level * sign * drawn for sign in (1, -1)]
            clean = [one - level * predict(one, timestep, False) for one in noisy]
            x = (clean[0] + clean[1]) / 2
        return x

    def _images(self, latents: Array, output_type: str) -> Any:
        """Decode scaled latents (B C h w) to images of `output_type`."""
        numbers = [np.array(self.config["latents"][name], np.float32) for name in ("shift", "std", "factor")]
        shift, std, factor = (each.reshape(1, -1, 1, 1) for each in numbers)
        z = latents / factor * std + shift
        decoded = self.run("vae_decoder", z=z)[0] if "vae_decoder" in self.parts else z
        images = np.clip(straight(np.clip(decoded, -1, 1)) * 0.5 + 0.5, 0, 1).transpose(0, 2, 3, 1)
        if output_type == "np":
            return images
        pixels = (images * 255).round().astype(np.uint8)
        return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]


class TorchNoise:
    """Draws what `torch.randn` draws on a CPU with `torch.Generator().manual_seed(seed)`, for 16 numbers or more."""

    def __init__(self, seed: int):
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)  # the Mersenne Twister that PyTorch has

    def normal(self, shape: Sequence[int]) -> Array:
        """Return standard normal numbers, float32."""
        count = math.prod(shape)
        uniform = self._uniform(max(count, 16))
        whole = len(uniform) // 16 * 16
        numbers = uniform.copy()
        numbers[:whole] = _box_muller(uniform[:whole])
        if whole < count:  # PyTorch draws the last 16 numbers again
            numbers[-16:] = _box_muller(self._uniform(16))
        return numbers[:count].reshape(shape)

    def _uniform(self, count: int) -> Array:
        words = np.frombuffer(self._words.bytes(4 * count), dtype="<u4")
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: Array) -> Array:
    """Convert uniform numbers, in blocks of 8 for the radius and 8 for the angle, to normal ones."""
    first, second = uniform.reshape(-1, 2, 8).transpose(1, 0, 2)
    radius = np.sqrt(-2 * np.log(1 - first))
    angle = np.float32(2 * math.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


class EulerSampler:
    """Euler steps of rectified flow, as FlowMatchEulerDiscreteScheduler takes them."""

    def __init__(self, config: Mapping[str, Any], schedule: Array | None, num_inference_steps: int):
        trained, shift, terminal = config["num_train_timesteps"], config["shift"], config.get("shift_terminal")
        ends = np.array([1.0, 1 / trained], dtype=np.float32)
        ends = (shift * ends / (1 + (shift - 1) * ends)).astype(np.float64)
        sigmas = np.linspace(ends[0] * trained, ends[1] * trained, num_inference_steps) / trained
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        if terminal:  # the last step begins at this level
            sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
        self.sigmas = np.append(sigmas, 0).astype(np.float32)
        self.timesteps = self.sigmas[:-1] * np.float32(trained)
        self.num_train_timesteps = trained

    def step(self, prediction: Array, number: int, x: Array) -> Array:
        """Return x at the next noise level, from the prediction at step `number` (from 0)."""
        return x + (self.sigmas[number + 1] - self.sigmas[number]) * prediction


class DdimSampler:
    """Deterministic DDIM (Song et al. 2020, eq. 12 with eta = 0), as DDIMScheduler computes it."""

    def __init__(self, config: Mapping[str, Any], schedule: Array, num_inference_steps: int):
        self.timesteps = _spaced(config["num_train_timesteps"], num_inference_steps)
        self.prediction_type, self.alphas = config["prediction_type"], schedule
        self.interval = config["num_train_timesteps"] // num_inference_steps

    def step(self, prediction: Array, number: int, x: Array) -> Array:
        before = int(self.timesteps[number]) - self.interval
        alpha = math.sqrt(self.alphas[int(self.timesteps[number])])
        alpha_next = math.sqrt(self.alphas[before]) if before >= 0 else 1.0
        clean, noise = clean_and_noise(self.prediction_type, prediction, x, alpha, math.sqrt(1 - alpha**2))
        return alpha_next * clean + math.sqrt(1 - alpha_next**2) * noise


class DpmSampler:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), as DPMSolverMultistepScheduler computes it by default."""

    def __init__(self, config: Mapping[str, Any], schedule: Array, num_inference_steps: int):
        self.timesteps = _spaced(config["num_train_timesteps"], num_inference_steps)
        self.prediction_type = config["prediction_type"]
        # Instead of 0, with zero terminal SNR, because the first step divides by it.
        alphas = np.sqrt(np.maximum(schedule.astype(np.float64)[self.timesteps], 2.0**-24))
        self.alphas, self.sigmas = np.append(alphas, 1.0), np.append(np.sqrt(1 - alphas**2), 0.0)
        self.last: Array | None = None  # the previous prediction of the clean sample

    def step(self, prediction: Array, number: int, x: Array) -> Array:
        alpha, sigma = float(self.alphas[number]), float(self.sigmas[number])
        alpha_next, sigma_next = float(self.alphas[number + 1]), float(self.sigmas[number + 1])
        clean, _ = clean_and_noise(self.prediction_type, prediction, x, alpha, sigma)
        step_factor = sigma_next / alpha_next * alpha / sigma  # exp(-h), h the step of the log signal-to-noise ratio
        change = clean
        if self.last is not None and number < len(self.timesteps) - 1:  # the last step is of first order
            h_before = math.log(alpha / sigma) - math.log(self.alphas[number - 1] / self.sigmas[number - 1])
            change = clean - 0.5 * (math.log(step_factor) / h_before) * (clean - self.last)
        self.last = clean
        return sigma_next / sigma * x - alpha_next * (step_factor - 1) * change


def make_sampler(name: str, config: Mapping[str, Any], schedule: Array | None, num_inference_steps: int) -> Any:
    """Build a sampler by name. Raises ValueError if it is unknown, or does not suit the model."""
    flow, trained = config["prediction_type"] == FLOW, config["num_train_timesteps"]
    samplers: dict[str, Any] = {"euler": EulerSampler} if flow else {"ddim": DdimSampler, "dpm": DpmSampler}
    if name not in samplers:
        raise ValueError(f"`scheduler` must be one of {', '.join(samplers)} for this model, but is {name!r}")
    least = 2 if config.get("shift_terminal") else 1
    if not least <= num_inference_steps <= trained:
        raise ValueError(f"`num_inference_steps` must be from {least} to {trained}, but is {num_inference_steps}")
    return samplers[name](config, schedule, num_inference_steps)


def denoised(sampler: Any, predict: Callable[..., Array], x: Array, least_noise_level: float) -> Array:
    """Turn standard normal noise into samples; below the least level of flow matching, the model is not called."""
    count, last_level = len(sampler.timesteps), None
    if least_noise_level:
        levels = [float(timestep) / sampler.num_train_timesteps for timestep in sampler.timesteps]
        count = max(1, sum(level >= least_noise_level for level in levels))
        last_level = levels[count - 1] if count < len(levels) else None
    for number, timestep in enumerate(sampler.timesteps[:count]):
        prediction = predict(x, float(timestep))
        ends = number == count - 1 and last_level is not None
        x = x - last_level * prediction if ends else sampler.step(prediction, number, x)
    return x


def clean_and_noise(kind: str, prediction: Array, x: Array, alpha: float, sigma: float) -> tuple[Array, Array]:
    """Return x_0 and the noise of x_t = alpha x_0 + sigma noise that follow from a prediction of any type."""
    if kind == "epsilon":
        return (x - sigma * prediction) / alpha, prediction
    if kind == "sample":
        return prediction, (x - alpha * prediction) / sigma
    return alpha * x - sigma * prediction, alpha * prediction + sigma * x


def _spaced(trained: int, count: int) -> Array:
    """Return `count` timesteps from high to low, int64; the first is the last one of training ("trailing")."""
    return np.round(np.arange(trained, 0, -trained / count)).astype(np.int64) - 1


def noise_level(timestep: float, schedule: Array | None, num_train_timesteps: int) -> float:
    """Return sigma / (alpha + sigma) at a timestep, from 0 for a clean sample to 1 for noise."""
    if schedule is None:
        return round(timestep / num_train_timesteps, 6)
    sigma, alpha = np.sqrt(1 - schedule.astype(np.float64)), np.sqrt(schedule.astype(np.float64))
    return round(float(np.interp(timestep, np.arange(len(schedule)), sigma / (alpha + sigma))), 6)


def straight(images: Array) -> Array:
    """Return images with straight alpha from colours blended with white and alpha, B 4 H W in [-1, 1]."""
    if images.shape[1] != 4:
        return images
    colors, alpha = images[:, :3], images[:, 3:]
    opacity = (alpha + 1) / 2
    own = 1 - (1 - colors) / np.maximum(opacity, LEAST_ALPHA)
    return np.concatenate([np.clip(np.where(opacity < LEAST_ALPHA, 1.0, own), -1, 1), alpha], axis=1)


def as_list(value: Any) -> list:
    """Return the entries of a list, tuple or array; any other value is a single entry, and None is none."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, range, np.ndarray)) else [value]


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, but is {value!r}")
    return int(value)


def _seeds(generator: Any, count: int) -> list[int]:
    """Return a seed for each image."""
    if generator is None:
        return [int(seed) for seed in np.random.SeedSequence().generate_state(count)]
    single = isinstance(generator, (int, np.integer))
    seeds = [int(generator) + number for number in range(count)] if single else [int(seed) for seed in generator]
    if len(seeds) != count:
        raise ValueError(f"`generator` has {len(seeds)} entries, but the number of images is {count}")
    return seeds

"""What nearly all measurements import. With --quick, a process imports it once, and those of the measurements are its
copies."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import diffusers
import transformers

import training.train_latent_diffusion  # noqa: F401

# Both libraries import their classes when these are first used.
USED = (
    diffusers.AutoencoderKL,
    diffusers.UNet2DConditionModel,
    diffusers.FlowMatchEulerDiscreteScheduler,
    transformers.CLIPTextModel,
    transformers.PreTrainedTokenizerFast,
)

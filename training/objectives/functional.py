"""Diffusion and autoencoder objectives as pure functions: no model, no Accelerate, no I/O.

    x_0    clean latents or pixels, B C h w      noise  standard normal, B C h w
    alpha, sigma   B, the factors in x_t = alpha x_0 + sigma noise
    snr    B, alpha² / sigma²

For DDPM schedules alpha = sqrt(ᾱ_t), sigma = sqrt(1 - ᾱ_t) (Ho et al. 2020, eq. 4). For rectified flow
alpha = 1 - sigma (Liu et al. 2022), and the timestep of the U-Net is sigma × num_train_timesteps, as in Diffusers'
flow-matching schedulers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def per_sample(factor: Tensor, like: Tensor) -> Tensor:
    """Reshape B to B 1 … 1 for broadcasting with `like`, in its dtype."""
    return factor.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def unit_times(uniform: Tensor, normal: Tensor, sampling: str, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return times in [0, 1), B: `uniform` itself, or sigmoid(mean + std·normal) (Esser et al. 2024, eq. 19)."""
    if sampling == "uniform":
        return uniform
    if sampling == "logit_normal":
        return torch.sigmoid(mean + std * normal).clamp(max=1 - 1e-6)
    raise ValueError(f"timestep_sampling is 'uniform' or 'logit_normal', not {sampling!r}")


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Shift times towards noise: s·t / (1 + (s - 1)·t) (Esser et al. 2024, eq. 23); 1 leaves them unchanged."""
    return shift * times / (1 + (shift - 1) * times)


def corrupt(x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Compute x_t = alpha x_0 + sigma noise."""
    return per_sample(alpha, x_0) * x_0 + per_sample(sigma, x_0) * noise


def prediction_target(prediction_type: str, x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the target: noise; v = alpha noise - sigma x_0 (Salimans and Ho 2022); x_0; or noise - x_0."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return per_sample(alpha, x_0) * noise - per_sample(sigma, x_0) * x_0
    if prediction_type == "sample":
        return x_0
    if prediction_type == "flow_prediction":
        return noise - x_0
    raise ValueError(f"prediction_type is one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}")


def min_snr_weight(prediction_type: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR-γ weight (Hang et al. 2023): min(SNR, γ) for the x_0 loss, converted to the model's target. B.

    It follows from |x_0 error|² = |ε error|² / SNR = |v error|² / (SNR + 1) = sigma² |flow error|². There is no
    division by SNR, which is 0 at zero terminal SNR, or by sigma, which is 0 at flow time 0.
    """
    capped_alpha = torch.minimum(alpha**2, gamma * sigma**2)  # min(SNR, γ)·sigma²
    if prediction_type == "epsilon":
        return torch.where(alpha**2 > 0, capped_alpha / (alpha**2).clamp(min=1e-30), torch.ones_like(alpha))
    if prediction_type == "v_prediction":
        return capped_alpha / (alpha**2 + sigma**2)
    if prediction_type == "sample":
        return torch.where(sigma**2 > 0, capped_alpha / (sigma**2).clamp(min=1e-30), torch.full_like(alpha, gamma))
    if prediction_type == "flow_prediction":
        return capped_alpha
    raise ValueError(f"prediction_type is one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}")


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Add a random mean per sample and channel to noise (Guttenberg 2023); `offset` is standard normal, B C 1 1."""
    return noise + strength * offset if strength else noise


def nearest_noise(x_0: Tensor, candidates: Tensor) -> Tensor:
    """Return the candidate of least squared distance to each sample (Li et al. 2025, arXiv 2505.18521). B C h w.

    The distances are computed in float32 or the wider dtype of the inputs. No value is read from the device.

    Args:
        candidates: B k C h w, k draws of noise for each sample.
    """
    dtype = torch.promote_types(x_0.dtype, torch.float32)
    distances = (candidates.to(dtype) - x_0.to(dtype).unsqueeze(1)).square().flatten(2).sum(2)
    nearest = distances.argmin(1).reshape(-1, *[1] * x_0.ndim)
    return candidates.take_along_dim(nearest, 1).squeeze(1)


def mse_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error of each sample, in float32 or the wider dtype of the inputs. B."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)


def trivial_mse(prediction_type: str) -> float:
    """Return the loss of the best constant prediction for latents of unit variance: 1, or 2 for flow (noise - x_0)."""
    return 2.0 if prediction_type == "flow_prediction" else 1.0


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Compute KL(N(mean, exp(logvar)) ‖ N(0, 1)), averaged over the latent values of each sample. B."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)


def halved(maps: Tensor) -> Tensor:
    """Downsample bilinearly by 2, which averages blocks of 2×2: B C H W to B C H/2 W/2. H and W must be even."""
    # F.interpolate computes the same, but its gradient on a GPU is not deterministic.
    return F.avg_pool2d(maps, 2)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Compute half of mean max(0, 1 - D(x)) + mean max(0, 1 + D(x̂)) (Lim and Ye 2017)."""
    return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Compute -mean D(x̂)."""
    return -fake.mean()

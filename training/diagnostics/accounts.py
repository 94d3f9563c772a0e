"""Checks of trackers, the Hugging Face Hub and the settings of Accelerate. Tokens and user names are never shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from pipelines.tools.cli import cause
from training.diagnostics.finding import Finding, shown

# A Hub that does not answer in this time counts as unreachable.
HUB_SECONDS = 5.0


def tracker_wandb() -> Iterator[Finding]:
    from training.reporting.tracking import is_installed

    if not is_installed("wandb"):
        yield _tracker("wandb")
        return
    import wandb

    from training.reporting.backends import wandb_mode

    mode = wandb_mode(wandb)
    if mode == "online":
        yield Finding("tracker wandb", "ok", "a key or a login was found")
    elif os.environ.get("WANDB_MODE"):
        yield Finding("tracker wandb", "ok", f"WANDB_MODE is {mode}")
    else:
        value = "no key and no login, so --report_to auto leaves it out"
        yield Finding("tracker wandb", "optional", value, "to use it: wandb login")


def tracker_tensorboard() -> Iterator[Finding]:
    yield _tracker("tensorboard")


def tracker_trackio() -> Iterator[Finding]:
    yield _tracker("trackio")


def _tracker(name: str) -> Finding:
    """Return whether a tracker that needs no login is installed."""
    from training.reporting.tracking import is_installed

    if is_installed(name):
        return Finding(f"tracker {name}", "ok", f"{version(name)}; needs no login")
    return Finding(f"tracker {name}", "optional", "not installed", f"for --report_to {name}: pip install {name}")


def hub_token() -> Iterator[Finding]:
    """Say where a token of the Hub was found. Neither the token nor a part of it is shown."""
    from huggingface_hub import get_token

    if not get_token():
        advice = "for --push_to_hub and private models: hf auth login, or set HF_TOKEN"
        yield Finding("Hub token", "optional", "none", advice)
    else:
        variables = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
        yield Finding("Hub token", "ok", f"in {variables[0]}" if variables else "stored by `hf auth login`")


def hub() -> Iterator[Finding]:
    """Ask the Hub whether it accepts the token, or without a token only whether it answers, for a few seconds."""
    from huggingface_hub import get_session, get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    from training.publishing.hub_account import HubAccount, answer, status_of

    if HF_HUB_OFFLINE:
        yield Finding("Hub", "ok", "not asked, because HF_HUB_OFFLINE is set")
        return
    account = HubAccount(None)
    try:
        if get_token():
            access = answer(account.api.whoami, HUB_SECONDS).get("auth", {}).get("accessToken", {})
            yield Finding("Hub", "ok", f"{account.endpoint} accepts the token (role: {access.get('role', 'unknown')})")
        else:
            answer(lambda: get_session().head(account.endpoint), HUB_SECONDS)
            yield Finding("Hub", "ok", f"{account.endpoint} answers")
    except Exception as error:  # no network, a wrong HF_ENDPOINT: the client has many classes
        if status_of(error) in (401, 403):
            value = f"{account.endpoint} does not accept the token"
            yield Finding("Hub", "warning", value, f"make a new one: {account.endpoint}/settings/tokens")
            return
        advice = "use local folders, and set HF_HUB_OFFLINE=1 so that nothing waits for the network"
        yield Finding("Hub", "warning", f"{account.endpoint} cannot be reached ({cause(error)})", advice)


def accelerate_config() -> Iterator[Finding]:
    """Check the config file that `accelerate launch` uses unless it is given another one."""
    import torch
    import yaml
    from accelerate.commands.config.config_args import default_config_file

    from pipelines.tools.files import read_text

    path = Path(default_config_file)
    if not path.is_file():
        yield Finding("Accelerate config", "ok", "none; the defaults are used")
        return
    settings = yaml.safe_load(read_text(path)) or {}
    processes, gpus = settings.get("num_processes") or 1, torch.cuda.device_count()
    value = f"{shown(path)}: processes {processes}, mixed_precision {settings.get('mixed_precision', 'no')}"
    if settings.get("num_machines", 1) == 1 and processes > max(gpus, 1):
        fix = "run accelerate config, or give --config_file; on CPUs, torchrun starts several processes"
        yield Finding("Accelerate config", "warning", f"{value}, and there are {gpus} CUDA devices", fix)
    else:
        yield Finding("Accelerate config", "ok", value)


CHECKS = {
    "Accelerate config": accelerate_config,
    "tracker wandb": tracker_wandb,
    "tracker tensorboard": tracker_tensorboard,
    "tracker trackio": tracker_trackio,
    "Hub token": hub_token,
    "Hub": hub,
}

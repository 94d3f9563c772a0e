"""The option that turns the choice of settings on and off."""

from __future__ import annotations

from dataclasses import dataclass

from training.core.options import Options, option


@dataclass
class RecipeConfig(Options):
    """Whether settings are chosen for the images."""

    auto_settings: bool = option(True, on_resume="free", essential=True)
    """Choose what is not given for these images (not with --config); false uses the defaults of --help_all"""

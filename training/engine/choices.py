"""Settings that the user leaves to the program: what a new run chooses, and what a resumed run keeps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from training.engine.launch import AUTO, automatic_precision, on_main
from training.engine.run_config import RunConfig
from training.run.folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")

_PRECISION = "mixed_precision"


def kept_precision(config: RunConfig, folder: RunFolder) -> str | None:
    """Return the precision of the run in `folder` for `start_accelerator`; auto for a new run."""
    if config.overwrite or config.validate_model:
        return AUTO
    kept = folder.saved_setting(_PRECISION, AUTO)
    return kept if kept is None or kept in ("no", "fp16", "bf16") else AUTO


def settle_choices(config: RunConfig, folder: RunFolder, accelerator: Accelerator) -> None:
    """Replace what the user leaves to the program: by what the run was started with, and by the precision in use.

    Every process calls it, after the run folder has been opened.

    Raises:
        UserError: on every process, if the saved config is damaged.
    """
    own_folder = not (config.overwrite or config.validate_model)
    saved = on_main(accelerator, lambda: folder.saved_config() if own_folder else None) or {}
    left_open = config.mixed_precision == AUTO
    config.keep(saved)
    if left_open:
        _warn_of_precision(config, saved, accelerator.mixed_precision)
        config.mixed_precision = accelerator.mixed_precision


def pin_inputs(config: RunConfig, accelerator: Accelerator) -> None:
    """Replace options that name something which changes elsewhere, such as the newest commit of a dataset, by what they
    name now. The main process asks for it, so that all processes read the same data.

    Every process calls it, after the missing inputs have been made: a dataset that is made first is not there before.

    Raises:
        UserError: on every process, if what an option names does not exist or a server does not answer.
    """
    for name, value in on_main(accelerator, config.pinned).items():
        setattr(config, name, value)


def _warn_of_precision(config: RunConfig, saved: Mapping[str, Any], used: str) -> None:
    """Warn if a run would use another precision had it been started on this device, or cannot keep its own."""
    kept, usual = saved.get(_PRECISION), automatic_precision(config)
    if kept in (None, AUTO):  # earlier versions did not save what it was
        return
    if kept != used:  # its settings came from the Hub, after the precision of this process had been set
        logger.warning(
            "the run was trained with --mixed_precision %s, and continues with %s on this device; to keep it, "
            "add --mixed_precision %s",
            kept,
            used,
            kept,
        )
    elif kept != usual:
        logger.warning(
            "the run keeps --mixed_precision %s, with which it was started; a new run on this device would "
            "use %s. To change it, add --mixed_precision %s",
            kept,
            usual,
            usual,
        )

"""Upload a run to the Hugging Face Hub: what `--push_to_hub` did not or could not upload.

    python training/push_to_hub.py runs/my_images/latent_diffusion_64_caption --hub_model_id you/name
    python training/push_to_hub.py runs/my_images/latent_diffusion_64_caption --hub_strategy checkpoint

Uploads the final pipeline of a complete run and, depending on --hub_strategy, its checkpoints. What is already on the
Hub is not uploaded again. Options that are not given are those that the run was started with. The run does not train
any further. The exit status is 3 if something could not be uploaded; run the same command again then.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from pipelines.tools.cli import Options, UserError, entry_point
from training.engine.signals import Interrupted, StopSignal
from training.publishing.card_update import update_card
from training.publishing.content import HUB_STRATEGIES
from training.publishing.hub import HubConfig, Publisher
from training.run.folder import RunFolder
from training.run.output import start_logging

logger = logging.getLogger("halftone")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    folder = RunFolder(options.run_dir)
    if not folder.path.is_dir() or not (folder.has_checkpoint() or folder.pipeline.is_dir()):
        raise UserError(f"{folder.path} is not the folder of a run; name the --output_dir of a training command")
    folder.create()
    start_logging(folder.log_file)
    try:
        with StopSignal() as stop:
            config = hub_config(options, folder)
            update_card(folder.path)
            return push(folder, config, stop)
    finally:
        start_logging(None)
        folder.release()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options. Raises UserError."""
    parser = Options(__doc__)
    add = parser.add_argument
    add("run_dir", help="Folder of the run")
    add("--hub_model_id", help="Name of the Hub repository, as user/name (default: your user name and the folder's)")
    add("--hub_token_file", help="File that contains only an access token; if unset, HF_TOKEN or `hf auth login`")
    add("--hub_private_repo", nargs="?", const="true", choices=["true", "false"], help="Create a private repository")
    add(
        "--hub_strategy",
        choices=list(HUB_STRATEGIES),
        help="; ".join(f"{name}: {meaning}" for name, meaning in HUB_STRATEGIES.items()),
    )
    return parser.parse(argv)


def hub_config(options: argparse.Namespace, folder: RunFolder) -> HubConfig:
    """Return the options of the run, overridden by those of the command line. Raises UserError."""
    saved: dict[str, Any] = folder.saved_config() or {}
    config = HubConfig(push_to_hub=True)
    for name in ("hub_model_id", "hub_token_file", "hub_private_repo", "hub_strategy"):
        given = getattr(options, name)
        value = saved.get(name) if given is None else given
        if value is not None:
            setattr(config, name, value == "true" if name == "hub_private_repo" and given is not None else value)
    config.validate()
    return config


def push(folder: RunFolder, config: HubConfig, stop: StopSignal) -> int:
    """Upload what is missing and return the exit status. Raises UserError if there is nothing to upload yet."""
    publisher = Publisher(config, folder=folder, notify=logger.info)
    if not publisher.has_content:
        raise UserError(
            f"the run in {folder.path} is not complete, and --hub_strategy end uploads only the final pipeline; run "
            "its training command again, or choose --hub_strategy every_save or checkpoint"
        )
    try:
        with stop.at_once():
            publisher.check()
            return publisher.push()
    except Interrupted:
        logger.info("the upload was stopped; run the same command again to complete it")
        assert stop.requested is not None
        return stop.exit_status(stop.requested)


if __name__ == "__main__":
    entry_point(main)

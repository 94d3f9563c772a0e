"""Exports a finished run: the pipeline in the format of Diffusers, its model card, and the upload to the Hub."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.tools.cli import printable
from training.core.files import replacing_folder
from training.core.previews import Previews, save_png
from training.core.stage import Stage
from training.publishing.card_update import published_parts, write_cards
from training.publishing.energy import estimated_energy
from training.publishing.evaluation_facts import read_evaluation
from training.publishing.hub import Publisher
from training.publishing.model_card import check_card
from training.run.folder import RunFolder

logger = logging.getLogger("halftone")

UPLOAD_GRACE_SECONDS = 1.0  # a run that was asked to stop ends within two seconds


class Exporter:
    """Writes `pipeline/` with README.md and samples.png, and uploads it if requested. Used on the main process only.

    Args:
        settings: the config of the run as plain values, for the model card.
        publisher: uploads to the model repository of the run; None uploads nothing.

    Raises:
        UserError: if the card template of the stage is missing; checked here so that it does not fail after training.
    """

    def __init__(self, stage: Stage, settings: Mapping[str, Any], folder: RunFolder, publisher: Publisher | None):
        self.stage, self.settings, self.folder, self._publisher = stage, settings, folder, publisher
        check_card(stage.card_template)

    def checkpoint_saved(self, path: Path) -> None:
        """Upload the parts of a new checkpoint that `--hub_strategy` selects."""
        if self._publisher is not None:
            self._publisher.checkpoint_saved(path)

    def close(self) -> None:
        """Wait a short time for unfinished uploads; called when a run was asked to stop."""
        if self._publisher is not None:
            self._publisher.finish(timeout=UPLOAD_GRACE_SECONDS)

    @property
    def status(self) -> int:
        """The exit status of a complete run: 0, or 3 if something could not be uploaded."""
        return 0 if self._publisher is None else self._publisher.status

    def write(self, record: dict[str, Any], previews: Previews | None) -> None:
        """Export the models as they are now, with the model card and the samples, and upload them.

        Args:
            record: the record of the run, from which the card is made.
            previews: the samples, made with the models as they are now; None for none.

        Raises:
            OSError: the pipeline could not be written; an earlier one is unchanged.
        """
        self.folder.create_again()
        with replacing_folder(self.folder.pipeline) as temporary:
            self.stage.save_pipeline(temporary)
            record = self._full_record(record)
            if previews is not None:
                for folder in published_parts(temporary):
                    save_png(previews.grid(), folder / "samples.png")
                record |= {"samples_file": "samples.png", "sample_captions": previews.captions}
                record |= {"prompts": previews.captions if previews.prompts is None else previews.prompts}
            evaluation = read_evaluation(self.folder.path, record.get("steps"))
            record |= {"card": {"template": self.stage.card_template}}
            record |= {"card": write_cards(temporary, {**record, "evaluation": evaluation})}
            self.folder.delete_record()
        self.folder.save_record(record)
        self._say_what_is_where(previews is not None)
        if self._publisher is not None:
            self._publisher.catch_up()
            self._publisher.finish()

    def _say_what_is_where(self, with_samples: bool) -> None:
        logger.info("the pipeline is in %s", self.folder.pipeline)
        samples = f"samples: {self.folder.pipeline / 'samples.png'}; " if with_samples else ""
        logger.info("%straining curves: %s", samples, self.folder.curves_file)
        if (usage := self.stage.usage(str(self.folder.path))) is not None:
            logger.info("try it: %s", printable(usage))

    def _full_record(self, record: dict[str, Any]) -> dict[str, Any]:
        settings = self.settings
        packages = ("torch", "diffusers", "transformers", "accelerate")
        return {
            **record,
            "model_name": self.folder.name,
            "license": settings.get("license"),
            "dataset": settings.get("dataset_name") or settings.get("train_data_dir"),
            "resolution": settings.get("resolution"),
            "config": dict(settings),
            "hub_model_id": self._publisher.model_id if self._publisher is not None else None,
            "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
            "cpu_cores": os.cpu_count(),
            "energy": estimated_energy(
                record["device_type"], record["num_processes"], os.cpu_count() or 1, record["elapsed_seconds"]
            ),
            **self.stage.card_facts(),
        }

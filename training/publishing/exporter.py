"""The end of a run: the pipeline in Diffusers form, its card, and the Hub."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.core.previews import save_png
from training.core.run_config import RunConfig
from training.core.stage import Stage
from training.publishing.hub import Publisher
from training.publishing.model_card import check_card, write_model_card
from training.run.folder import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("halftone")

UPLOAD_GRACE_SECONDS = 20.0


class Exporter:
    """Writes `pipeline/` with README.md and samples.png, and uploads what was asked for."""

    def __init__(
        self,
        stage: Stage,
        config: RunConfig,
        folder: RunFolder,
        accelerator: Accelerator,
        record: Callable[[], dict[str, Any]],
    ):
        self.stage, self.config, self.folder, self.accelerator, self._record = (
            stage,
            config,
            folder,
            accelerator,
            record,
        )
        self._publisher: Publisher | None = None
        check_card(stage.card_template)

    def check_hub(self) -> None:
        """Before the first step: credentials and the right to write. Raises UserError."""
        if self.config.push_to_hub:
            self._publisher = Publisher(
                self.config.hub_model_id or self.folder.path.name,
                token=self.config.hub_token,
                private=self.config.hub_private_repo,
                strategy=self.config.hub_strategy,
                run_dir=self.folder.path,
                notify=logger.info,
            )
            self._publisher.check()

    def checkpoint_saved(self, path: Path) -> None:
        if self._publisher is not None:
            self._publisher.checkpoint_saved(path)

    def is_exported(self, step: int) -> bool:
        """Whether pipeline/ is the one of this step."""
        if not (self.folder.pipeline / "model_index.json").is_file() or not self.folder.record_file.is_file():
            return False
        return json.loads(self.folder.record_file.read_text()).get("steps") == step

    def run(self, use_best: bool, load_best: Callable[[], None]) -> None:
        """Finish the stage and write everything; every process calls it, with the averaged weights in place."""
        if use_best:
            load_best()
        self.stage.finish()
        # No barrier here: a process that is asked to stop leaves by an exception, and the loop then compares notes.
        if self.accelerator.is_main_process:
            self._write()

    def close(self) -> None:
        """A run that was asked to stop gives uploads on their way a moment, no more."""
        if self._publisher is not None:
            self._publisher.finish(timeout=UPLOAD_GRACE_SECONDS)

    def _write(self) -> None:
        temporary = self.folder.path / ".writing-pipeline"
        shutil.rmtree(temporary, ignore_errors=True)
        self.stage.pipeline().save_pretrained(temporary)
        record = self._full_record()
        previews = self.stage.previews()
        if previews is not None:
            save_png(previews.grid(), temporary / "samples.png")
            record |= {"samples_file": "samples.png", "prompts": previews.captions}
        write_model_card(temporary, self.stage.card_template, record)
        if self.folder.pipeline.exists():
            old = self.folder.path / ".replaced-pipeline"
            shutil.rmtree(old, ignore_errors=True)
            self.folder.pipeline.rename(old)
            temporary.rename(self.folder.pipeline)
            shutil.rmtree(old)
        else:
            temporary.rename(self.folder.pipeline)
        self.folder.save_record(record)
        logger.info("the pipeline is in %s", self.folder.pipeline)
        if self._publisher is not None:
            self._publisher.upload(self.folder.pipeline, f"{self.stage.name}: {record['steps']} steps")
            self._publisher.finish()

    def _full_record(self) -> dict[str, Any]:
        config = self.config.to_dict()
        packages = ("torch", "diffusers", "transformers", "accelerate")
        return {
            **self._record(),
            "model_name": self.config.run_name or self.folder.path.name,
            "license": self.config.license,
            "dataset": config.get("dataset_name") or config.get("train_data_dir"),
            "resolution": config.get("resolution"),
            "config": config,
            "hub_model_id": self._publisher.model_id if self._publisher is not None else None,
            "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
            "cpu_cores": os.cpu_count(),
            **self.stage.card_facts(),
        }

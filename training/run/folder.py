"""The folder of one run: paths, lock and saved config."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.tools.checkpoint_links import steps_in
from pipelines.tools.cli import UserError
from pipelines.tools.files import read_text
from pipelines.tools.private import expand_home, without_private
from training.core.files import fsync_folder, read_json_object, write_atomically
from training.core.locks import FolderLock
from training.core.options import Options, option

logger = logging.getLogger("halftone")

CONFIG_FILE = "config.yaml"
# Whether a pipeline is complete is decided by its weights, since a user may edit the model card and other texts.
_WEIGHTS = ".safetensors"


@dataclass
class RunFolderConfig(Options):
    """Options for the folder and name of a run."""

    help_group = "Saving and measuring"

    output_dir: str = option("", on_resume="free", essential=True)
    """Output folder of the run: checkpoints, metrics.csv, previews and the final pipeline; a run in it is resumed"""
    run_name: str = option("", on_resume="free")
    """Name of the run for experiment trackers and the model card; if unset, the name of the run folder"""
    overwrite: bool = option(False, on_resume="free", essential=True)
    """Start again although the folder contains a run; the old run is renamed, not deleted"""


class RunFolder:
    """runs/<name>: config.yaml metrics.csv training_curves.png run.log samples/ checkpoints/ pipeline/."""

    def __init__(self, path: str | Path, name: str = ""):
        self.path = Path(os.path.expanduser(path))
        self.title = os.path.basename(os.path.abspath(self.path))
        self.name = name or self.title
        self.config_file = self.path / CONFIG_FILE
        self.metrics_file = self.path / "metrics.csv"
        self.curves_file = self.path / "training_curves.png"
        self.log_file = self.path / "run.log"
        self.record_file = self.path / "record.json"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.pipeline = self.path / "pipeline"
        self.lock = FolderLock(
            self.path / ".lock",
            f"another process is training in {self.path}; wait for it, or choose another --output_dir",
        )
        self._config_text = ""

    def create(self) -> None:
        """Create and lock the folder. Raises UserError if it cannot be written, or another process has the lock."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)  # first: it shows that the folder contains a run
            self.samples.mkdir(exist_ok=True)
            self.lock.acquire()
        except OSError as error:
            raise UserError(
                f"the output folder {self.path} cannot be written ({error.strerror}); choose another with --output_dir"
            ) from None

    def create_again(self) -> None:
        """Create the folder again if it was deleted while the run is using it.

        Raises:
            OSError, UserError: it cannot be created.
        """
        if self.checkpoints.is_dir() and (self.config_file.is_file() or not self._config_text):
            return
        self.release()
        self.create()
        logger.warning("%s was deleted during the run; it is created again, and the run is saved there", self.path)
        if self._config_text:
            write_atomically(self.config_file, self._config_text)

    def release(self) -> None:
        """Release the folder's lock."""
        self.lock.release()

    def has_checkpoint(self) -> bool:
        """Return whether this run folder has a checkpoint to resume from."""
        return bool(steps_in(self.checkpoints))

    def is_exported(self, step: int) -> bool:
        """Return whether the exported pipeline is that of `step`, and complete."""
        record, index = read_json_object(self.record_file), read_json_object(self.pipeline / "model_index.json")
        if record is None or index is None or record.get("steps") != step:
            return False
        weights = record.get("pipeline_weights", {})  # absent in the records of earlier versions
        return weights == self._pipeline_weights() if weights else True

    def _pipeline_weights(self) -> dict[str, int]:
        """Return the sizes in bytes of the weights in the exported pipeline, by path."""
        files = sorted(self.pipeline.rglob(f"*{_WEIGHTS}"))
        return {file.relative_to(self.pipeline).as_posix(): file.stat().st_size for file in files}

    def set_aside(self) -> Path | None:
        """Rename the folder of an old run and return its new path; None if there is nothing in the folder.

        Raises:
            UserError: the folder contains something other than a run, another process is using it, it is a folder that
                must not be renamed (the home or current folder, or one that contains it), or it cannot be renamed.
        """
        if not self.path.exists() or not any(self.path.iterdir()):
            return None
        self._check_may_be_renamed()
        stamp = time.strftime("%Y%m%d-%H%M%S")
        target = self.path.with_name(f"{self.path.name}.old-{stamp}")
        number = 1
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.path.name}.old-{stamp}-{number}")
        try:
            with self.lock:
                self.path.rename(target)
        except OSError as error:
            raise UserError(f"{self.path} cannot be renamed to {target} ({error.strerror}); move it by hand") from None
        return target

    def _check_may_be_renamed(self) -> None:
        own, fix = Path(os.path.realpath(self.path)), "choose another --output_dir"
        for name, used in (("the current folder", os.getcwd()), ("your home folder", os.path.expanduser("~"))):
            if Path(os.path.realpath(used)).is_relative_to(own):
                raise UserError(f"--overwrite would rename {self.path}, which is or contains {name}; {fix}")
        if os.path.ismount(own):
            raise UserError(f"--overwrite would rename {self.path}, which is the root of a file system; {fix}")
        if not self.is_run():
            raise UserError(
                f"--output_dir {self.path} is not empty and does not contain a run, so --overwrite does not rename it; "
                f"{fix}"
            )

    def is_run(self) -> bool:
        """Return whether the folder contains a run: its config, a checkpoint, or what `create` makes."""
        made_by_create = self.samples.is_dir() and self.checkpoints.is_dir() and self.lock.file.is_file()
        config = _read_config(self.config_file)
        return made_by_create or self.has_checkpoint() or (config is not None and "output_dir" in config)

    def saved_config(self) -> dict[str, Any] | None:
        """Return the config that the run was started with, without a token from old versions; None if not saved.

        What is missing in config.yaml is taken from the copy in the newest checkpoint.

        Raises:
            UserError: config.yaml is damaged, and no checkpoint has a copy of it.
        """
        config = _read_config(self.config_file)
        copies = (_read_config(folder / CONFIG_FILE) for folder in steps_in(self.checkpoints))
        copy = next((copy for copy in copies if copy is not None), None)
        if config is None and copy is None:
            if self.config_file.is_file() and self.has_checkpoint():
                raise UserError(
                    f"{self.config_file} is damaged, so the settings of the run are not known; restore it from a "
                    "backup, or delete it to resume without comparing the settings"
                )
            return None
        if copy is not None and (missing := copy.keys() - (config or {}).keys()):
            logger.warning(
                "%s is missing or damaged; %d settings are taken from the newest checkpoint",
                self.config_file,
                len(missing),
            )
        config = {**(copy or {}), **(config or {})}
        config.pop("hub_token", None)
        return expand_home(config)

    def saved_setting(self, name: str, default: Any) -> Any:
        """Return one setting of the config that the run was started with; `default` if it is not saved."""
        files = [self.config_file, *(folder / CONFIG_FILE for folder in steps_in(self.checkpoints))]
        configs = (_read_config(file) for file in files)
        return next((config[name] for config in configs if config is not None and name in config), default)

    def save_config(self, config: dict[str, Any]) -> None:
        """Write config.yaml, without what is private. Raises UserError if it cannot be written."""
        self._config_text = yaml.safe_dump(without_private(config), sort_keys=False, allow_unicode=True)
        try:
            if not self.config_file.is_file() or self.config_file.read_bytes() != self._config_text.encode("utf-8"):
                write_atomically(self.config_file, self._config_text)
        except OSError as error:
            raise UserError(
                f"{self.config_file} cannot be written ({error.strerror}); free space on its disk, or make it writable"
            ) from None

    def copy_config(self, checkpoint: Path) -> None:
        """Write the config of this session into the folder of a checkpoint."""
        if self._config_text:
            (checkpoint / CONFIG_FILE).write_text(self._config_text, encoding="utf-8", newline="\n")

    def delete_record(self) -> None:
        """Delete record.json before the pipeline that it describes is replaced, so that the two never disagree."""
        if self.record_file.is_file():
            self.record_file.unlink()
            fsync_folder(self.path)

    def save_record(self, record: dict[str, Any]) -> None:
        """Write record.json: the metrics and settings of the run, for the model card and for users.

        It also marks the pipeline as exported.
        """
        record = json.loads(json.dumps(record | {"pipeline_weights": self._pipeline_weights()}, default=str))
        write_atomically(self.record_file, json.dumps(without_private(record), indent=2) + "\n")


def _read_config(path: Path) -> dict[str, Any] | None:
    """Return the settings in a config.yaml; None if it does not exist, is damaged, or contains something else."""
    try:
        config = yaml.safe_load(read_text(path))
    except (OSError, UserError, yaml.YAMLError, RecursionError, ValueError):
        return None
    return config if isinstance(config, dict) and config else None

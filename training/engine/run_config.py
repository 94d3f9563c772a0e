"""The options that all stages share; each part is defined in the module that uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.tools.cli import UserError
from training.core.layout import BatchConfig
from training.core.options import Options, option
from training.engine.balance import BalanceConfig
from training.engine.cadence import CadenceConfig
from training.engine.ema import EMAConfig
from training.engine.launch import AUTO, LaunchConfig
from training.engine.length import LengthConfig
from training.engine.phase_runner import PhaseConfig
from training.engine.prepare import PrepareConfig
from training.engine.profiling import ProfileConfig
from training.engine.schedule import ScheduleConfig
from training.engine.weights import FreezeConfig
from training.publishing.hub import HubConfig
from training.reporting.tracking import TrackerConfig
from training.run.checkpoint import CheckpointConfig
from training.run.folder import RunFolderConfig
from training.run.state import EarlyStoppingConfig


@dataclass
class SessionConfig(Options):
    """The random seed, and what the command does instead of training."""

    seed: int = option(0, essential=True)
    """Random seed; the same seed gives the same run"""
    dry_run: bool = option(False, on_resume="free", essential=True)
    """Print what was found and decided, with steps, time, disk space and memory, and exit; with --print_config also
    all settings"""
    validate_only: bool = option(False, on_resume="free")
    """Validate the checkpoint selected by --resume_from_checkpoint, or the model given by --validate_model, print
    the metrics and exit"""
    validate_model: str | None = option(None, on_resume="free")
    """Run folder, checkpoint, pipeline folder or Hub id of the model to validate with --validate_only; if unset, the
    run in --output_dir"""
    dataloader_num_workers: int | Literal["auto"] = option(AUTO, on_resume="free", at_least=0)
    """Number of processes that load data; 0 loads in the training process. auto: up to 4 on a machine with a GPU and
    spare cores, if images are decoded; otherwise 0. The results do not depend on it"""
    max_nonfinite_steps: int = option(10, on_resume="free", at_least=1)
    """Skip steps with a non-finite loss or gradient, and stop with an error after N of them in a row"""

    def validate(self, prefix: str = "") -> None:
        super().validate(prefix)
        if self.validate_model and not self.validate_only:
            raise UserError(f"--validate_model {self.validate_model} needs --validate_only; add that flag")

    @property
    def trains(self) -> bool:
        """Whether the command trains, rather than only validating a model or describing a run."""
        return not (self.dry_run or self.validate_only)


@dataclass
class RunConfig(
    HubConfig,
    TrackerConfig,
    CheckpointConfig,
    EarlyStoppingConfig,
    CadenceConfig,
    EMAConfig,
    PhaseConfig,
    ScheduleConfig,
    FreezeConfig,
    BalanceConfig,
    LaunchConfig,
    LengthConfig,
    BatchConfig,
    PrepareConfig,
    ProfileConfig,
    SessionConfig,
    RunFolderConfig,
):
    """The options of every stage. A stage adds its own in a subclass."""

    @property
    def starts_trained(self) -> bool:
        """Whether the weights of a new run are those of a trained model, and not random."""
        return False

"""What every run can be told: the fields all stages share, checked before anything starts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.tools.cli import UserError
from training.core.checks import check_at_least, check_choice

OPTIMIZERS = ("adamw", "adamw_8bit", "adam", "sgd")
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "piecewise_constant",
)


def option(default: Any, *, on_resume: Literal["free", "warn", "error"] = "warn") -> Any:
    """A config field, and what it means to change it on a run that has begun.

    `error`: it would be another model or other data; `warn`: listed in one warning; `free`: of no concern.
    """
    metadata = {"on_resume": on_resume}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """Flags of every stage. A stage adds its own in a subclass."""

    output_dir: str = option("", on_resume="free")
    """The run folder; `runs/<stage>` if none is named."""
    overwrite: bool = option(False, on_resume="free")
    """Start anew in a used folder; the old run is set aside beside it, not deleted."""
    resume_from_checkpoint: str = option("latest", on_resume="free")
    """`latest`, `best`, `none`, or the path of a checkpoint."""
    seed: int = option(0, on_resume="error")
    """Everything random is a function of it."""
    dry_run: bool = option(False, on_resume="free")
    """Print the resolved config, sizes, steps per epoch and a memory estimate, and exit."""
    validate_only: bool = option(False, on_resume="free")
    """Load the checkpoint, validate, print the figures, and exit."""
    validate_model: str | None = option(None, on_resume="free")
    """With --validate_only: another run, checkpoint or pipeline to validate, and no run folder; --model for short."""

    prepare: dict[str, str] = option({}, on_resume="free")
    """Inputs that may be missing: path → the script (and its flags) that makes it; for YAML files"""

    train_batch_size: int = option(16)
    """Images per micro-batch on one process."""
    validation_batch_size: int = option(0, on_resume="free")
    """0 takes `--train_batch_size`."""
    gradient_accumulation_steps: int = option(1)
    """Micro-batches per process in one step."""
    num_train_epochs: int = option(10, on_resume="free")
    """The total, counted from the very beginning."""
    extra_epochs: int = option(0, on_resume="free")
    """Train this many epochs more from wherever the run stands, instead of the total."""
    max_train_steps: int = option(0, on_resume="free")
    """The total in steps; 0 counts epochs."""

    balance_by: str | None = option(None, on_resume="error")
    """Column of classes: samples of rare ones are drawn more often, as --balance_power says."""
    balance_power: float = option(1.0, on_resume="error")
    """A sample of a class of n rows has the weight n^-power: 0 draws rows as they are, 1 all classes equally often."""
    freeze_parameters: list[str] = option([], on_resume="error")
    """Patterns of parameters that stay as they are, e.g. '[unet.down_blocks.*]'; names are the pipeline's."""

    learning_rate: float = option(1e-4)
    """The highest rate of the schedule."""
    lr_scheduler: str = option("constant_with_warmup")
    """linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup or piecewise_constant."""
    lr_warmup_steps: int = option(100)
    """Steps, whatever the number of processes or the accumulation."""
    lr_num_cycles: int = option(1)
    """For cosine_with_restarts."""
    lr_power: float = option(1.0)
    """For polynomial."""
    lr_step_rules: str | None = option(None)
    """For piecewise_constant: '1:100,0.1:200,0.01' is factor 1 until step 100, 0.1 until 200, then 0.01."""
    optimizer: str = option("adamw", on_resume="error")
    """adamw (fused), adamw_8bit (bitsandbytes), adam or sgd."""
    adam_beta1: float = option(0.9)
    """Decay of the first moment."""
    adam_beta2: float = option(0.999)
    """Decay of the second moment."""
    adam_epsilon: float = option(1e-8)
    """Added to the root of the second moment."""
    weight_decay: float = option(0.01)
    """Decoupled weight decay."""
    max_grad_norm: float = option(1.0)
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    max_nonfinite_steps: int = option(10, on_resume="free")
    """Stop after this many steps in a row whose loss or gradient was not finite."""

    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = option(None)
    """Unset: what the Accelerate config says. auto: bf16 where the device has its arithmetic, else no."""
    compile: bool = option(False)
    """torch.compile each phase."""
    gradient_checkpointing: bool = option(False)
    """Recompute activations in the backward pass: less memory, more time."""
    cpu_threads: int = option(0, on_resume="free")
    """Threads on a CPU; 0 shares the machine's cores among its processes."""
    dataloader_num_workers: int = option(0, on_resume="free")
    """Processes that read and decode pictures."""

    use_ema: bool = option(True, on_resume="error")
    """Keep an average of the weights; validation, previews and the exported pipeline use it."""
    ema_decay: float = option(0.999)
    """Reached after a warm-up of (1 + step) / (10 + step)."""
    ema_update_every: int = option(1)
    """Average every so many steps by decay to that power; saves time on small machines."""

    logging_steps: int = option(10)
    """A row of metrics.csv every so many steps (and at each epoch's end)."""
    validation_epochs: int = option(1)
    """0: never by epochs."""
    validation_steps: int = option(0)
    """0: never by steps."""
    preview_epochs: int = option(1, on_resume="free")
    """0: never by epochs."""
    preview_steps: int = option(0, on_resume="free")
    """0: never by steps."""
    checkpointing_epochs: int = option(1, on_resume="free")
    """0: never by epochs."""
    checkpointing_steps: int = option(0, on_resume="free")
    """0: never by steps."""
    checkpoints_total_limit: int = option(2, on_resume="free")
    """How many of the newest are kept, `best` beside them."""
    early_stopping_patience: int = option(0)
    """Stop after so many validations without improvement; 0: never."""
    early_stopping_min_delta: float = option(0.0)
    """What counts as one."""

    report_to: str | list[str] = option("wandb", on_resume="free")
    """wandb, trackio, tensorboard, several (comma-separated), or none."""
    tracker_project_name: str = option("halftone", on_resume="free")
    """The project on the dashboard."""
    run_name: str = option("", on_resume="free")
    """Unset: the folder's name."""

    push_to_hub: bool = option(False, on_resume="free")
    """Upload the pipeline when it is done (and what `--hub_strategy` says)."""
    hub_model_id: str | None = option(None, on_resume="free")
    """user/name; unset: your user and the folder's name."""
    hub_token: str | None = option(None, on_resume="free")
    """Unset: the token of `hf auth login` or HF_TOKEN. It is never saved."""
    hub_private_repo: bool = option(False, on_resume="free")
    """Create the repository as a private one."""
    hub_strategy: str = option("end", on_resume="free")
    """end (the pipeline, once), every_save (at each checkpoint), checkpoint (and the newest one) or all_checkpoints."""
    license: str | None = option(None, on_resume="free")
    """Licence of the model for its card, e.g. cc-by-4.0. Nothing is assumed."""

    def validate(self) -> None:
        """Raise UserError for values that cannot be. Subclasses call this first."""
        if self.validate_model and not self.validate_only:
            raise UserError(f"--model {self.validate_model} names what to validate; add --validate_only")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS)
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            raise UserError("--lr_scheduler piecewise_constant needs --lr_step_rules, e.g. '1:100,0.1:200,0.01'")
        if self.lr_step_rules and not re.fullmatch(r"([\d.eE+-]+:\d+,)*[\d.eE+-]+", self.lr_step_rules):
            raise UserError(
                f"--lr_step_rules is {self.lr_step_rules!r}; write factor:step,…,factor: 1:100,0.1:200,0.01"
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must lie in [0, 1)")
        for name in ("train_batch_size", "gradient_accumulation_steps", "logging_steps", "ema_update_every"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("checkpoints_total_limit", "max_nonfinite_steps"):
            check_at_least(name, getattr(self, name), 1)
        for name in _NOT_NEGATIVE:
            check_at_least(name, getattr(self, name), 0)
        if not 0 <= self.balance_power <= 1:
            raise UserError(f"--balance_power is {self.balance_power}; it must lie in [0, 1] (1 makes classes equal)")
        if not self.learning_rate > 0:
            raise UserError(f"--learning_rate is {self.learning_rate}; it must be above 0 (1e-4 is a usual value)")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema_decay is {self.ema_decay}; it must lie in [0, 1) (0.999 is a usual value)")
        if not (self.num_train_epochs or self.max_train_steps or self.extra_epochs):
            raise UserError("nothing to train: give --num_train_epochs, --max_train_steps or --extra_epochs")

    @property
    def trains(self) -> bool:
        """Whether this is a run that trains, rather than a look at a config or a model."""
        return not (self.dry_run or self.validate_only)

    def to_dict(self) -> dict[str, Any]:
        """Plain values of every field, nested ones as dicts; secrets left out."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        values.pop("hub_token")
        return values

    def recipes(self) -> dict[str, str]:
        """The entries of `prepare` that are needed: made for a path that these settings name, or another such entry."""
        settings = self.to_dict()
        named = set(_strings({name: value for name, value in settings.items() if name != "prepare"}))
        needed: dict[str, str] = {}
        for path, command in reversed(self.prepare.items()):  # what is made from others comes after them
            if any(path == name or path.startswith(f"{name}/") for name in named):
                needed[path] = command
                named |= set(command.split())
        return dict(reversed(needed.items()))

    def changes_from(self, saved: dict[str, Any]) -> dict[str, list[str]]:
        """What differs from a run's saved config: {"error": ["seed: 0 → 1"], "warn": […]}."""
        found: dict[str, list[str]] = {"error": [], "warn": []}
        own = self.to_dict()
        for config_field in dataclasses.fields(self):
            severity = config_field.metadata.get("on_resume", "error")
            name = config_field.name
            if name in saved and name in own and severity != "free" and saved[name] != own[name]:
                found[severity].append(f"--{name}: {saved[name]} → {own[name]}")
        return found


_NOT_NEGATIVE = (
    "num_train_epochs",
    "extra_epochs",
    "max_train_steps",
    "lr_warmup_steps",
    "max_grad_norm",
    "validation_epochs",
    "validation_steps",
    "preview_epochs",
    "preview_steps",
    "checkpointing_epochs",
    "checkpointing_steps",
    "early_stopping_patience",
    "validation_batch_size",
    "dataloader_num_workers",
    "cpu_threads",
    "weight_decay",
    "adam_epsilon",
    "early_stopping_min_delta",
)


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)

"""FSDP2 against one process and DDP: the same weights, checkpoints, metrics and pipelines, from real processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.tools.cli import UserError
from tests.conftest import forget_accelerate
from tests.support.ranks import forked_ranks
from tests.support.runs import ROOT, TOY, assert_same_state, environment, relative_difference, rows, tensors
from tests.support.toy import main as toy_main
from tests.support.toy_runs import cut_after, tensors_of
from training.engine import launch

slow = pytest.mark.slow

# Dropout is off, as its random numbers depend on the split. Seven validation rows do not divide by two.
TWENTY = (
    "--report_to", "none", "--cpu_threads", "1", "--dropout", "0", "--num_samples", "56", "--max_train_steps", "20",
    "--learning_rate", "1e-3", "--lr_warmup_steps", "5", "--preview_epochs", "0", "--checkpointing_steps", "10",
    "--checkpoints_total_limit", "5", "--validation_epochs", "1", "--logging_steps", "5", "--train_batch_size", "2",
)  # fmt: skip
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# Number of processes, accumulation, and variables of each kind.
KINDS = {"one": (1, 4, {}), "ddp": (2, 2, {}), "fsdp2": (2, 2, FSDP2)}
# The same with global batches of 12, which three processes can divide as well.
OF_TWELVE = {"one of 12": (1, 6, {}), "fsdp2 on 2": (2, 3, FSDP2), "fsdp2 on 3": (3, 2, FSDP2)}
LIMITS = {"true": 1e-10, "false": 1e-3}  # by --double


def train(folder: Path, kind: str, *flags: str, double: str = "true") -> Path:
    processes, accumulation, variables = {**KINDS, **OF_TWELVE}[kind]

    def action() -> int:
        forget_accelerate()
        shape = ("--gradient_accumulation_steps", str(accumulation), "--double", double)
        return toy_main(["--output_dir", str(folder), *TWENTY, *shape, *flags])

    forked_ranks(action, folder.with_suffix(".txt"), processes, **variables)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    return {kind: train(tmp_path_factory.mktemp(kind) / "run", kind) for kind in KINDS}


def assert_close(one: Path, other: Path, limit: float) -> None:
    """Compare all weights, all EMA weights, and each of the two moments of the optimizer, by their norms."""
    found: dict[str, list[float]] = {}
    own = tensors(one)
    for name, tensor in tensors(other).items():
        kind = name.rsplit("/", 1)[-1] if name.startswith("optimizer") else name.split(":")[0]
        sums = found.setdefault(kind, [0.0, 0.0])
        sums[0] += float((own[name].double() - tensor.double()).square().sum())
        sums[1] += float(tensor.double().square().sum())
    assert found.keys() == {"phase_denoiser.safetensors", "ema.safetensors", "exp_avg", "exp_avg_sq", "step"}
    assert [kind for kind, (difference, size) in found.items() if not difference**0.5 <= limit * size**0.5] == []


@slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_weights_ema_weights_and_optimizer_states_are_those_of_one_process(runs, kind):
    assert_close(runs[kind], runs["one"], LIMITS["true"])
    shapes = {name: tensor.shape for name, tensor in tensors(runs[kind]).items()}
    assert shapes == {name: tensor.shape for name, tensor in tensors(runs["one"]).items()}


@slow
def test_validation_metrics_and_the_exported_pipeline_are_those_of_one_process(runs):
    measured = {kind: [float(row["val_loss"]) for row in rows(runs[kind]) if row["val_loss"]] for kind in KINDS}
    assert len(measured["one"]) == 3
    for kind in ("ddp", "fsdp2"):
        assert measured[kind] == pytest.approx(measured["one"], rel=1e-8)
        pipelines = [tensors_of(runs[one] / "pipeline/unet") for one in (kind, "one")]
        assert pipelines[0].keys() == pipelines[1].keys()
        for name, tensor in pipelines[0].items():
            torch.testing.assert_close(tensor, pipelines[1][name], rtol=1e-8, atol=1e-10)


PAIRS = [
    ("one", "fsdp2"), ("one", "ddp"), ("ddp", "one"), ("ddp", "fsdp2"), ("fsdp2", "one"), ("fsdp2", "ddp"),
    ("fsdp2", "fsdp2"),
]  # fmt: skip


@slow
@pytest.mark.parametrize(("first", "then"), PAIRS)
def test_a_checkpoint_of_any_kind_resumes_with_any_other(tmp_path, runs, first, then):
    folder = tmp_path / "run"
    shutil.copytree(runs[first], folder, symlinks=True)
    cut_after(folder, 10)
    (folder / "checkpoints/latest").unlink()
    train(folder, then)
    assert "resumed from step-00000010" in (folder / "run.log").read_text(encoding="utf-8")
    assert_close(folder, runs["one"], LIMITS["true"])
    if first == then:
        assert_same_state(folder, runs[first])


@slow
def test_a_checkpoint_of_two_processes_resumes_on_three(tmp_path):
    whole = train(tmp_path / "whole", "one of 12")
    folder = train(tmp_path / "run", "fsdp2 on 2")
    cut_after(folder, 10)
    (folder / "checkpoints/latest").unlink()
    train(folder, "fsdp2 on 3")
    assert "resumed from step-00000010" in (folder / "run.log").read_text(encoding="utf-8")
    assert_close(folder, whole, LIMITS["true"])


@slow
def test_in_single_precision_as_well(tmp_path):
    whole, shards = (train(tmp_path / kind, kind, double="false") for kind in ("one", "fsdp2"))
    for file in ("phase_denoiser.safetensors", "ema.safetensors"):
        assert relative_difference(shards, whole, [file]) <= LIMITS["false"]


@slow
def test_accelerate_launches_the_shipped_config_and_the_best_weights_are_exported(tmp_path):
    """Early stopping exports the best checkpoint, which is not the last one: its validation improves by a lot only."""
    words = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
             "configs/accelerate/fsdp2.yaml", "--num_processes", "2", "--mixed_precision", "no", str(TOY)]  # fmt: skip
    stopping = ("--early_stopping_patience", "1", "--early_stopping_min_delta", "100", "--checkpointing_steps", "1")
    done = subprocess.run(
        [*words, "--output_dir", str(tmp_path / "run"), *TWENTY, *stopping],
        cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FSDP2" in done.stdout
    best = tensors_of(tmp_path / "run/checkpoints/best", "ema.safetensors")
    exported = tensors_of(tmp_path / "run/pipeline/unet")
    assert {n.split(":unet.")[1]: t.tolist() for n, t in best.items()} == {
        n.split(":")[1]: t.tolist() for n, t in exported.items()
    }


@slow
def test_stages_that_cannot_be_sharded_say_so(tmp_path):
    with pytest.raises(AssertionError, match=r"FSDP2 shards the weights of one phase, and this run has 2 .*multi_gpu"):
        train(tmp_path / "run", "fsdp2", "--critic", "true")


def test_fsdp2_without_a_launcher_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "shards_weights", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=r"FSDP2 needs a launcher .*accelerate launch"):
        toy_main(["--output_dir", str(tmp_path / "run"), *TWENTY])

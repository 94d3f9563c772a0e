"""The specification of the training loop, tested on a small real stage."""

from __future__ import annotations

import csv
import math
import re

import pytest
import torch
from PIL import Image

from pipelines.tools.cli import UserError
from tests.support.runs import rows, tensors, toy
from tests.support.toy import ToyConfig, ToyStage
from tests.support.toy_runs import (
    COMMON,
    EVERY_STEP,
    LAYOUT,
    assert_equal,
    at_step,
    column,
    cut_after,
    run,
    snapshot,
    state_of,
)
from training.core.batches import fetch
from training.core.draws import GroupedDraws
from training.core.layout import BatchLayout
from training.engine.sampler import StepSampler
from training.run import checkpoint


def reference_run(config: ToyConfig, steps: int) -> tuple[ToyStage, list[float]]:
    """Make the steps in plain PyTorch (zero, accumulate, clip, AdamW, for each phase); return also gradient norms."""
    stage = ToyStage(config)
    data, sampler = stage.train_data(), StepSampler(config.num_samples, LAYOUT, config.seed)
    optimizers = [torch.optim.AdamW(p.parameters(), config.learning_rate, weight_decay=0.01) for p in stage.phases]
    norms = []
    for step in range(steps):
        for phase, optimizer in zip(stage.phases, optimizers, strict=True):
            if step < phase.first_step(steps):
                continue
            for parameter in [p for each in stage.phases for p in each.parameters()]:
                parameter.grad = None
            for micro_batch in range(2):
                draws = GroupedDraws(config.seed, step, LAYOUT.positions(micro_batch))
                loss, _ = phase(fetch(data, sampler.keys(step, micro_batch)), draws)
                (loss / 2).backward()
            gradients = [p.grad for p in phase.parameters()]
            norm = torch.sqrt(sum(g.square().sum() for g in gradients))
            if config.max_grad_norm and norm > config.max_grad_norm:
                for gradient in gradients:
                    gradient.mul_(config.max_grad_norm / (norm + 1e-6))  # as PyTorch does
            if config.lr_scheduler == "linear":  # from the first step of the phase down to 0
                optimizer.param_groups[0]["lr"] = (
                    config.learning_rate * (steps - step) / (steps - phase.first_step(steps))
                )
            optimizer.step()
            if phase is stage.phases[0]:
                norms.append(norm.item())
    return stage, norms


@pytest.mark.parametrize(("max_grad_norm", "lr_scheduler"), [(0.0, "constant"), (0.05, "constant"), (0.0, "linear")])
def test_a_step_equals_one_in_plain_pytorch(tmp_path, max_grad_norm, lr_scheduler):
    """Accumulation, clipping and each phase's schedule; the critic gets no gradients of the denoiser's loss."""
    flags = {
        "learning_rate": 1e-2,
        "max_grad_norm": max_grad_norm,
        "dropout": 0.0,
        "lr_scheduler": lr_scheduler,
        "lr_warmup_steps": 0,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run(tmp_path / "run", "--critic", "true", "--double", "true", *words)
    stage, norms = reference_run(ToyConfig(critic=True, double=True, **flags), 6)
    assert column(tmp_path / "run", "grad_norm") == pytest.approx(norms, rel=1e-6)
    trained = tensors(tmp_path / "run", "phase_*.safetensors")
    for phase in stage.phases:
        for name, expected in phase.state_dict().items():
            tensor = trained[f"phase_{phase.name}.safetensors:{name}"]
            assert tensor == pytest.approx(expected, rel=1e-9, abs=1e-11), name


def test_the_learning_rate_does_not_depend_on_accumulation(tmp_path):
    schedule = (
        "--lr_scheduler",
        "cosine",
        "--lr_warmup_steps",
        "3",
        "--num_train_epochs",
        "10",
        "--preview_epochs",
        "0",
    )
    run(tmp_path / "two", *schedule)
    run(tmp_path / "one", *schedule, "--train_batch_size", "8", "--gradient_accumulation_steps", "1")
    rates = column(tmp_path / "two", "learning_rate")
    expected = [s / 3 if s < 3 else 0.5 * (1 + math.cos(math.pi * (s - 3) / 57)) for s in range(60)]
    assert rates == pytest.approx([1e-4 * factor for factor in expected], abs=1e-15)
    assert column(tmp_path / "one", "learning_rate") == rates


def test_events_do_not_affect_training(tmp_path):
    """Validation, previews and checkpoints between steps change neither weights, EMA weights nor random numbers."""
    run(tmp_path / "rare", "--validation_epochs", "0", "--preview_epochs", "0", "--checkpointing_epochs", "0")
    run(tmp_path / "frequent", "--validation_steps", "1", "--preview_steps", "1", *EVERY_STEP)
    assert_equal(tensors(tmp_path / "rare"), tensors(tmp_path / "frequent"))
    live = tensors(tmp_path / "frequent", "phase_*.safetensors")
    average = tensors(tmp_path / "frequent", "ema.safetensors")
    same = [torch.equal(v, average[f"ema.safetensors:{k.split(':')[1]}"]) for k, v in live.items()]
    assert not all(same), "the EMA weights equal the live weights"


def test_loader_workers_do_not_affect_training(tmp_path):
    run(tmp_path / "none")
    run(tmp_path / "two", "--dataloader_num_workers", "2")
    assert_equal(tensors(tmp_path / "none"), tensors(tmp_path / "two"))


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, monkeypatch):
    unets = []
    initialize = ToyStage.__init__

    def remember(self, config, context):
        initialize(self, config, context)
        unets.append(self.unet)

    monkeypatch.setattr(ToyStage, "__init__", remember)
    run(tmp_path / "plain")
    run(tmp_path / "checkpointed", "--gradient_checkpointing", "true")
    assert [unet.is_gradient_checkpointing for unet in unets] == [False, True]
    assert column(tmp_path / "checkpointed", "grad_norm") == pytest.approx(column(tmp_path / "plain", "grad_norm"))


def test_bf16_computes_in_half_precision_and_keeps_float32_weights(tmp_path):
    run(tmp_path / "full")
    run(tmp_path / "half", "--mixed_precision", "bf16")
    assert {t.dtype for t in tensors(tmp_path / "half", "phase_*.safetensors").values()} == {torch.float32}
    full, half = column(tmp_path / "full", "loss"), column(tmp_path / "half", "loss")
    assert full != half
    assert half == pytest.approx(full, rel=0.05)


def test_fp16_on_a_cpu_is_refused(tmp_path):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has a device that supports fp16")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        run(tmp_path / "run", "--mixed_precision", "fp16")
    assert not (tmp_path / "run").exists()


def test_8_bit_adamw_trains_and_resumes(tmp_path):
    pytest.importorskip("bitsandbytes")
    flags = ("--optimizer", "adamw_8bit", "--learning_rate", "1e-2", *EVERY_STEP)
    run(tmp_path / "whole", *flags)
    optimizer = tensors(tmp_path / "whole", "optimizer_*.safetensors")
    assert any(t.dtype == torch.uint8 for t in optimizer.values())
    run(tmp_path / "parts", *flags)
    cut_after(tmp_path / "parts", 3)
    run(tmp_path / "parts", *flags)
    assert_equal(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))
    losses = column(tmp_path / "whole", "loss")
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_compile_gives_the_same_losses_and_the_same_names(tmp_path):
    flags = ("--dropout", "0", "--learning_rate", "3e-6")  # compiled code draws other random numbers for dropout
    run(tmp_path / "plain", *flags)
    run(tmp_path / "compiled", *flags, "--compile", "true")
    assert tensors(tmp_path / "plain").keys() == tensors(tmp_path / "compiled").keys()
    assert not any("_orig_mod" in name for name in tensors(tmp_path / "compiled"))
    assert column(tmp_path / "compiled", "loss") == pytest.approx(column(tmp_path / "plain", "loss"), rel=5e-3)


def test_a_first_phase_that_starts_late(tmp_path):
    run(tmp_path / "run", "--critic", "true", "--denoiser_start", "4", *EVERY_STEP)
    assert_equal(at_step(tmp_path / "run", 1, "phase_d*"), at_step(tmp_path / "run", 4, "phase_d*"))
    assert len(column(tmp_path / "run", "loss")) == 2
    assert len(column(tmp_path / "run", "critic_loss")) == 4


def steps_with(row: int, steps: int) -> list[int]:
    """Return the steps (from 1) whose batch contains `row`."""
    sampler = StepSampler(48, LAYOUT, 0)
    return [s + 1 for s in range(steps) if any(k.index == row for m in range(2) for k in sampler.keys(s, m))]


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    flags = ("--bad_rows", "[3]", "--critic", "true", "--num_train_epochs", "2", *EVERY_STEP)
    run(tmp_path / "run", *flags)
    first, second = steps_with(3, 12)
    assert first > 1
    for bad in (first, second):
        assert_equal(at_step(tmp_path / "run", bad - 1), at_step(tmp_path / "run", bad))
        after = at_step(tmp_path / "run", bad + 1, "phase_*") if bad < 12 else {}
        assert all(torch.isfinite(t).all() for t in after.values())
    state = state_of(tmp_path / "run")
    assert (state["skipped_steps"], state["skipped_in_a_row"]) == (2, 0)
    assert state["step"] == 12


def test_the_rows_of_a_bad_micro_batch_are_named(tmp_path):
    run(tmp_path / "run", "--bad_rows", "[3]")
    (bad,) = steps_with(3, 6)
    sampler = StepSampler(48, LAYOUT, 0)
    (share,) = [s for s in ([k.index for k in sampler.keys(bad - 1, m)] for m in range(2)) if 3 in s]
    log = (tmp_path / "run/run.log").read_text()
    assert f"step {bad}: the loss or gradient of 'denoiser' is not finite" in log
    assert f"Rows of the batch: {', '.join(map(str, sorted(share)))}\n" in log


def test_counts_of_skipped_steps_survive_a_resume(tmp_path):
    flags = ("--bad_rows", "[3]", "--num_train_epochs", "2", *EVERY_STEP)
    run(tmp_path / "run", *flags)
    whole = tensors(tmp_path / "run")
    first, _ = steps_with(3, 12)
    cut_after(tmp_path / "run", first)  # the step that was skipped
    run(tmp_path / "run", *flags)
    assert state_of(tmp_path / "run")["skipped_steps"] == 2
    assert_equal(tensors(tmp_path / "run"), whole)


def test_training_stops_when_nothing_is_finite_any_more(tmp_path):
    run(tmp_path / "run")
    good = tensors(tmp_path / "run")
    every_row = str(list(range(48)))
    with pytest.raises(UserError, match=r"4 steps in a row .* --learning_rate"):
        run(tmp_path / "run", "--num_train_epochs", "3", "--bad_rows", every_row, "--max_nonfinite_steps", "4")
    latest = checkpoint.find_checkpoint(tmp_path / "run/checkpoints", "latest")
    assert latest is not None
    assert latest.name == "step-00000006"
    assert_equal(tensors(tmp_path / "run"), good)


def test_an_epoch_without_a_finite_step_ends_normally(tmp_path):
    run(tmp_path / "run", "--bad_rows", str(list(range(48))), "--max_nonfinite_steps", "50", "--critic", "true")
    assert state_of(tmp_path / "run")["skipped_steps"] == 6
    assert all(torch.isfinite(t).all() for t in tensors(tmp_path / "run", "phase_*").values())


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_on_all(tmp_path):
    flags = (*COMMON, "--train_batch_size", "2", "--bad_rows", "[3]", *EVERY_STEP)
    toy(tmp_path / "run", *flags, processes=2)
    (bad,) = steps_with(3, 6)
    assert_equal(at_step(tmp_path / "run", bad - 1), at_step(tmp_path / "run", bad))
    assert state_of(tmp_path / "run")["skipped_steps"] == 1
    sampler = [StepSampler(48, BatchLayout(2, 2, 2, rank), 0) for rank in range(2)]
    share = [s for s in ([k.index for k in r.keys(bad - 1, m)] for r in sampler for m in range(2)) if 3 in s]
    named = (tmp_path / "run/run.log").read_text().split("Rows of the batch: ")[1].splitlines()[0]
    assert set(map(str, share[0])) <= set(named.split(", "))


def test_validate_only_prints_the_metrics_of_the_checkpoint(tmp_path, capsys):
    run(tmp_path / "run")
    expected = column(tmp_path / "run", "val_loss")[-1]
    before = {k: v for k, v in snapshot(tmp_path / "run").items() if not k.endswith(("run.log", ".lock"))}
    capsys.readouterr()
    assert run(tmp_path / "run", "--validate_only", "true") == 0
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("val_loss")]
    assert float(line.split()[1]) == pytest.approx(expected, rel=1e-5)
    assert {k: v for k, v in snapshot(tmp_path / "run").items() if not k.endswith(("run.log", ".lock"))} == before


def test_validate_only_needs_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="--validate_only needs a checkpoint"):
        run(tmp_path / "run", "--validate_only", "true")


def test_a_dry_run_describes_the_run_and_writes_nothing(tmp_path, capsys):
    assert run(tmp_path / "run", "--dry_run", "true", "--critic", "true", "--print_config") == 0
    output = capsys.readouterr().out
    assert "48 images, 6 steps per epoch with a global batch of 8 images, 6 steps in total" in output
    assert "phase 'critic'" in output
    assert "8×8: " in output
    assert "4×4: " in output
    assert "estimated memory" in output
    assert "learning_rate: 0.0001" in output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_makes_no_inputs_and_names_those_that_are_missing(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"prepare:\n  {tmp_path}/posters: data_scripts/make_posters.py --num_posters 1\n")
    needed = ("--data", f"{tmp_path}/posters")
    flags = ("--config", str(tmp_path / "c.yaml"), *needed, "--dry_run", "--print_config")
    assert run(tmp_path / "run", *flags) == 0
    output = capsys.readouterr().out
    assert "learning_rate: 0.0001" in output
    assert "python data_scripts/make_posters.py --num_posters 1" in output
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_rows_of_metrics(tmp_path):
    run(tmp_path / "run", "--num_train_epochs", "2", "--critic", "true")
    with (tmp_path / "run/metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(r["step"]) for r in table] == list(range(1, 13))
    assert [int(r["images_seen"]) for r in table] == list(range(8, 104, 8))
    assert [float(r["epoch"]) for r in table] == pytest.approx([s / 6 for s in range(1, 13)], abs=1e-4)
    for name in ("loss", "error", "grad_norm", "learning_rate", "elapsed_seconds", "images_per_second"):
        assert all(math.isfinite(float(r[name])) for r in table), name
    assert [bool(r["critic_loss"]) for r in table] == [False, False] + [True] * 10  # the critic starts with step 3
    for end in (6, 12):
        losses = [float(r["loss"]) for r in table[end - 6 : end]]
        summary = [float(table[end - 1][f"epoch_loss_{kind}"]) for kind in ("mean", "min", "max")]
        assert summary == pytest.approx([sum(losses) / 6, min(losses), max(losses)])
        assert table[end - 1]["val_loss"]
        assert not table[end - 2]["val_loss"]


def test_a_row_is_the_mean_since_the_last_one(tmp_path):
    run(tmp_path / "each")
    run(tmp_path / "four", "--logging_steps", "4")
    losses = column(tmp_path / "each", "loss")
    assert [row["step"] for row in rows(tmp_path / "four")] == ["4", "6"]
    assert column(tmp_path / "four", "loss") == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 2])


def test_the_run_folder_is_complete(tmp_path, capsys):
    run(tmp_path / "run", "--num_train_epochs", "2")
    folder = tmp_path / "run"
    for name in ("config.yaml", "metrics.csv", "run.log", "record.json", "pipeline/README.md"):
        assert (folder / name).stat().st_size > 0, name
    with Image.open(folder / "training_curves.png") as image:
        image.verify()
    output = capsys.readouterr()
    assert "\r" not in output.out + output.err  # without a terminal: lines instead of a progress bar
    assert "epoch 1, step 6: loss mean" in output.out
    assert "epoch 2, step 12: loss mean" in output.out


@pytest.mark.slow
def test_many_short_epochs_do_not_fill_the_terminal(tmp_path, capsys):
    assert run(tmp_path / "run", "--num_train_epochs", "40", "--preview_epochs", "0") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) <= 21  # the first epoch, and those with a validation
    assert sum("val_loss" in line for line in lines) == 20


def test_a_long_epoch_prints_lines_without_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipelines.tools.progress.SECONDS_BETWEEN_LINES", 0.0)
    run(tmp_path / "run")
    line = r"^step 3 of 6 \(50%\), \d+:\d\d left, loss \d\.\d+, \d+ images/s, epoch 1/1, at \d\d:\d\d:\d\d$"
    assert re.search(line, capsys.readouterr().out, flags=re.MULTILINE)

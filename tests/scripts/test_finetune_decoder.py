"""finetune_decoder.py as users start it: what trains and what stays, the report, resuming, limits and bad input.

B posters.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines.common.poster_domain import GRAMMAR
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.scripts.test_bad_input import nothing_was_trained, refusal
from tests.scripts.test_train_decoder import TINY as TINY_DECODER
from tests.scripts.test_train_decoder import TRANSFORMER
from tests.scripts.test_train_layout import COMMON as LAYOUT
from tests.scripts.test_train_layout import TINY_ABSTRACTOR, TINY_ENCODER
from tests.support.finetuning import (
    REPORT,
    Recorded,
    Slow,
    SlowSecond,
    assert_same_report,
    generated,
    session,
    unfinished,
)
from tests.support.ranks import forked_ranks, started_ranks
from tests.support.runs import ROOT, assert_same_state, launch, rows, sigterm_in_step
from training import finetune_decoder, train_abstractor, train_decoder, train_encoder
from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.engine.signals import REQUEUE_STATUS
from training.run.checkpoint import load_tensors
from training.run.state import EarlyStoppingConfig, RunState
from training.stages.before_after import KEPT, beyond_limits

SCRIPT = ROOT / "training/finetune_decoder.py"
SHORT = ("--max_train_steps", "2", "--preview_epochs", "0", "--validation_epochs", "0", "--resolution", "32")
TINY = (
    *("--report_to", "none", "--cpu_threads", "1", "--logging_steps", "1", "--resolution", "32"),
    *("--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"),
    *("--lr_warmup_steps", "0", "--num_previews", "2", "--preview_inference_steps", "2", "--sampling_steps", "3"),
    *("--evaluation_images", "8", "--evaluation_inference_steps", "2", "--evaluation_extractor_resolution", "32"),
    *("--evaluation_epochs", "0", "--evaluation_steps", "2", "--max_train_steps", "4", "--report_rows", "2"),
    *("--max_kid_rise", "1", "--max_diversity_fall", "1", "--report_images", "null"),
)


def made(script, folder: Path, *flags: str) -> Path:
    forget_accelerate()
    assert script.main([*flags, *SHORT, "--output_dir", str(folder)]) == 0
    forget_accelerate()
    return folder


def reader_of(folder: Path, posters: Path, seed: int, *more: str) -> Path:
    """Train a layout encoder and an abstractor for two steps each."""
    data = ("--dataset_name", str(posters), "--seed", str(seed))
    encoder = made(train_encoder, folder / f"encoder_{seed}", *LAYOUT, *TINY_ENCODER, *data)
    words = (*LAYOUT, *TINY_ABSTRACTOR, *data, "--encoder", str(encoder), *more)
    return made(train_abstractor, folder / f"abstractor_{seed}", *words)


@pytest.fixture(scope="module")
def models(posters, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "decoder": made(train_decoder, folder / "decoder", *TINY_DECODER, "--dataset_name", str(posters)),
        "reader": reader_of(folder, posters, 0),
        "judge": reader_of(folder, posters, 1),
    }


@pytest.fixture(scope="module")
def flags(posters, models) -> list[str]:
    named = [word for name, path in models.items() for word in (f"--{name}", str(path))]
    return [*TINY, "--dataset_name", str(posters), *named]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, flags) -> Path:
    """`python training/finetune_decoder.py …`, four steps with a measurement after the second and the fourth."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    done = launch(SCRIPT, *flags, "--output_dir", str(folder), cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "| 1 − correlation of V_Grammar, judge |" in done.stdout + done.stderr
    return folder


def stage_of(flags, *more: str) -> finetune_decoder.FinetuningStage:
    words = [*flags, "--output_dir", "unused", *more]
    return finetune_decoder.FinetuningStage(parse_config(finetune_decoder.Config, words), StageContext())


def batch_of(stage) -> dict:
    return fetch(stage.train_data(), [SampleKey(i, i) for i in range(4)])


# --- the run and its report


def test_the_report_compares_before_and_after(launched):
    report = json.loads((launched / "finetuning.json").read_text(encoding="utf-8"))
    facts = report["facts"]
    assert (facts["posters"], facts["briefs"], facts["split"]) == (8, 4, "test")
    for when in ("before", "after"):
        own = report[when]
        assert own["kid_standard_error"] > 0
        assert own["diversity"] > 0
        for reader in ("reader", "judge"):
            assert 0 <= own[f"{reader}_cycle_score"] <= 2
            assert own[f"{reader}_cycle_score"] == pytest.approx(1 - own[f"{reader}_grammar_correlation"])
    assert report["before"] != report["after"]
    assert report["real"]["kid_standard_error"] > 0
    assert facts["posters_of_each_floor"] == 8
    table = (launched / "finetuning.md").read_text(encoding="utf-8")
    assert table.startswith("|  | before | after | real posters |\n| --- | ---: | ---: | ---: |\n")
    assert f"| KID × 10³ | {1000 * report['before']['kid']:.2f} ±" in table
    assert (
        "8 posters before and 8 after, for the same 4 briefs (test) and from the same noise; 2 steps, guidance 2."
        in table
    )
    with Image.open(launched / "before_after.png") as grid:
        assert grid.width > grid.height > 192 * 2
    card = (launched / "pipeline/README.md").read_text(encoding="utf-8")
    assert "| KID × 10³ |" in card
    assert "It was trained from scratch" not in card
    assert json.loads((launched / "record.json").read_text(encoding="utf-8"))["finetuning"]["table"] in table


def test_the_report_agrees_with_evaluate(launched, models, posters, tmp_path):
    """What the report says of the model after is what training/evaluate.py measures of it."""
    from training import evaluate

    forget_accelerate()
    words = ["--model", str(launched), "--reader", str(models["judge"]), "--split", "test", "--num_images", "8"]
    words += ["--num_inference_steps", "2", "--guidance_scale", "2", "--extractor_resolution", "32"]
    assert evaluate.main([*words, "--output", str(tmp_path / "evaluation.json"), "--replay_images", "0"]) == 0
    measured = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
    after = json.loads((launched / "finetuning.json").read_text(encoding="utf-8"))["after"]
    for name in ("grammar_correlation", "picture_count_share", "palette_distance"):
        # Posters are read in batches of other sizes, and a correlation of so few sums up the differences of rounding.
        assert after[f"judge_{name}"] == pytest.approx(measured[name], rel=1e-4, abs=1e-4)
    assert after["diversity"] == pytest.approx(measured["diversity"], rel=1e-4)


def test_the_best_checkpoint_is_that_of_the_best_cycle_score_and_is_exported(launched):
    logged = [row for row in rows(launched) if row["eval_cycle_score"]]
    assert [row["step"] for row in logged] == ["2", "4"]
    best = min(logged, key=lambda row: float(row["eval_cycle_score"]))
    record = json.loads((launched / "record.json").read_text(encoding="utf-8"))
    assert (record["best"]["metric"], record["best"]["step"]) == ("eval_cycle_score", int(best["step"]))
    kept = load_tensors(launched / "checkpoints/best/pipeline/unet/diffusion_pytorch_model.safetensors")
    exported = load_tensors(launched / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in exported.items())


def test_every_parameter_of_the_decoder_trains_and_the_readers_stay(launched, models, flags):
    before = {"unet": "unet", "brief_encoder": "brief_encoder"}
    trained = load_tensors(launched / "checkpoints/latest/phase_decoder.safetensors")
    original = load_pipeline(models["decoder"])
    same = [
        f"{part}.{name}"
        for part in before
        for name, tensor in getattr(original, part).state_dict().items()
        if torch.equal(trained[f"{part}.{name}"], tensor)
    ]
    assert same == []
    assert {name.split(".")[0] for name in trained} == set(before)
    stage = stage_of(flags)
    frozen = {name: tensor.clone() for module in stage.frozen for name, tensor in module.state_dict().items()}
    optimizer = torch.optim.AdamW(stage.phase.parameters(), lr=0.1)
    stage.phase(batch_of(stage), Draws(0, 0, range(4)))[0].backward()
    optimizer.step()
    after = {name: tensor for module in stage.frozen for name, tensor in module.state_dict().items()}
    assert all(torch.equal(frozen[name], tensor) for name, tensor in after.items())
    assert all(p.grad is None for module in stage.frozen for p in module.parameters())


# --- resuming


@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_run(tmp_path, launched, flags, monkeypatch, step):
    words = [*flags, "--output_dir", str(tmp_path / "run")]
    forget_accelerate()
    with sigterm_in_step(step, finetune_decoder.FinetuningPhase, monkeypatch):
        assert finetune_decoder.main(words) != 0
    assert not (tmp_path / "run/finetuning.json").exists()
    forget_accelerate()
    assert finetune_decoder.main(words) == 0
    assert_same_state(tmp_path / "run", launched)
    assert (tmp_path / "run/finetuning.md").read_text() == (launched / "finetuning.md").read_text()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_run(tmp_path, launched, flags):
    import subprocess

    from tests.support.runs import command, environment

    run = tmp_path / "run"
    words = [*flags, "--output_dir", str(run), "--checkpointing_steps", "1"]
    process = subprocess.Popen(command(SCRIPT, *words), env=environment(), cwd=ROOT)
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = launch(SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    assert_same_state(run, launched)


# --- several processes


@pytest.fixture(scope="module")
def reported(launched, flags, tmp_path_factory) -> Path:
    """The run with a report of 10 posters, which one process has made."""
    run = unfinished(launched, tmp_path_factory.mktemp("reported") / "run")
    forked_ranks(session(Recorded, flags, run, 1), run.with_suffix(".txt"), 1)
    assert generated(run, 0) == [*range(10), *range(10)]
    return run


def stop(stage: type[Recorded], flags: list[str], run: Path, asked: list[int]) -> None:
    """Send SIGTERM to some of two processes that make a report, when both have begun, and wait for their end."""
    for file in run.glob("generated_*.txt"):
        file.unlink()
    children = started_ranks(session(stage, flags, run, 2), run.with_suffix(".txt"), 2)
    try:
        deadline = time.monotonic() + 120
        while not all((run / f"generated_{rank}.txt").exists() for rank in range(2)):
            assert not any(child.has_ended() for child in children), [child.text() for child in children]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if stage is SlowSecond:
            time.sleep(2)  # the first process has made its posters, and waits for the other one
        began = time.monotonic()
        for rank in asked:
            os.kill(children[rank].pid, signal.SIGTERM)
        assert [child.wait() for child in children] == [REQUEUE_STATUS] * 2, [child.text() for child in children]
        assert time.monotonic() - began < 40  # on a busy machine; an exchange alone would wait for days
    finally:
        for child in children:
            if not child.has_ended():
                child.kill()
    assert not any("Traceback" in child.text() for child in children)


@pytest.mark.slow
def test_two_processes_share_the_report_and_a_stopped_one_is_made_again(tmp_path, launched, reported, flags):
    """A SIGTERM to the main process, to the other one and to both ends both soon, with the status for requeueing."""
    run = unfinished(launched, tmp_path / "run")
    log = (run / "run.log").read_text()
    for stage, asked in ((Slow, [0]), (Slow, [1]), (Slow, [0, 1]), (SlowSecond, [1])):
        stop(stage, flags, run, asked)
        assert not any((run / name).exists() for name in (*REPORT, "pipeline", "record.json"))
        added = (run / "run.log").read_text().removeprefix(log)
        assert added.count("stopped at step 4 of 4; everything is saved") == 1, (stage, asked, added)
        log += added
    for file in run.glob("generated_*.txt"):
        file.unlink()
    forked_ranks(session(Recorded, flags, run, 2), tmp_path / "again.txt", 2)
    assert generated(run, 0) == [0, 1, 2, 3, 8, 9] * 2  # batches of 4
    assert generated(run, 1) == [4, 5, 6, 7] * 2
    assert_same_report(run, reported)
    assert_same_state(run, launched)


# --- a transformer


@pytest.fixture(scope="module")
def transformer(posters, tmp_path_factory) -> Path:
    data = ("--dataset_name", str(posters))
    return made(train_decoder, tmp_path_factory.mktemp("transformer") / "run", *TINY_DECODER, *TRANSFORMER, *data)


def test_a_decoder_with_a_transformer_is_fine_tuned(tmp_path, transformer, flags):
    words = ["--decoder", str(transformer), "--max_train_steps", "2", "--output_dir", str(tmp_path / "run")]
    forget_accelerate()
    assert finetune_decoder.main([*flags, *words]) == 0
    exported, original = load_pipeline(tmp_path / "run"), load_pipeline(transformer)
    assert exported.unet is None
    pairs = zip(exported.transformer.parameters(), original.transformer.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)
    assert (tmp_path / "run/finetuning.md").is_file()


# --- an adapter


def assert_only_the_adapted_layers_changed(run: Path, decoder: Path, kind: str) -> None:
    trained = load_tensors(run / "checkpoints/latest/phase_decoder.safetensors")
    assert trained
    assert all(name.startswith(f"adapter.{kind}.") and ".lora_" in name for name in trained)
    original, exported = (
        load_tensors(folder / f"pipeline/{kind}/diffusion_pytorch_model.safetensors") for folder in (decoder, run)
    )
    changed = {name for name in original if not torch.equal(original[name], exported[name])}
    assert exported.keys() == original.keys()
    assert changed == {
        name.removeprefix(f"adapter.{kind}.").replace(".lora_A", "") for name in trained if ".lora_A." in name
    }
    assert (run / "pipeline/lora/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_an_adapter_of_a_u_net_leaves_the_decoder_as_it_is(tmp_path, models, flags):
    """Checkpoints contain the adapter alone; the exported network differs only in the layers that it changes."""
    pytest.importorskip("peft")
    words = ["--lora_rank", "2", "--learning_rate", "1e-2", "--max_train_steps", "2", "--output_dir"]
    forget_accelerate()
    assert finetune_decoder.main([*flags, *words, str(tmp_path / "run")]) == 0
    assert_only_the_adapted_layers_changed(tmp_path / "run", models["decoder"], "unet")


@pytest.mark.slow
def test_an_adapter_of_a_transformer_leaves_the_decoder_as_it_is_and_resumes(tmp_path, transformer, flags, monkeypatch):
    """As the preset's decoder has one."""
    pytest.importorskip("peft")
    words = [*flags, "--decoder", str(transformer), "--lora_rank", "2", "--learning_rate", "1e-2"]
    forget_accelerate()
    assert finetune_decoder.main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    assert_only_the_adapted_layers_changed(tmp_path / "whole", transformer, "transformer")
    forget_accelerate()
    with sigterm_in_step(1, finetune_decoder.FinetuningPhase, monkeypatch):
        assert finetune_decoder.main([*words, "--output_dir", str(tmp_path / "run")]) != 0
    forget_accelerate()
    assert finetune_decoder.main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")


# --- limits


@pytest.mark.parametrize(
    ("kid", "diverse", "exceeded"),  # kid: the change of the pairs, and its standard error
    [
        ((0.004, 0.001), 9.6, []),
        ((0.006, 0.002), 10.0, ["KID rose"]),
        ((0.006, 0.004), 10.0, []),  # 1.5 standard errors of the pairs
        ((0.0, 0.001), 9.4, ["diversity fell"]),
        ((0.01, 0.004), 9.0, ["KID", "diversity"]),
    ],
)
def test_limits(kid, diverse, exceeded):
    config = finetune_decoder.Config(max_kid_rise=0.005, max_kid_rise_errors=2.0, max_diversity_fall=0.05)
    before = {"eval_kid": 0.01, "eval_diversity": 10.0}
    change = {"eval_kid_change": kid[0], "eval_kid_change_standard_error": kid[1]}
    sentences = beyond_limits(before, {"eval_kid": 0.01 + kid[0], **change, "eval_diversity": diverse}, config)
    assert len(sentences) == len(exceeded)
    assert all(sentence.startswith(words) for sentence, words in zip(sentences, exceeded))


@pytest.mark.parametrize("lora", [[], pytest.param(["--lora_rank", "2"], marks=pytest.mark.slow)])
def test_a_run_beyond_its_limits_stops_and_exports_the_decoder_before(tmp_path, models, flags, lora):
    """A learning rate that destroys the model: the diversity of its posters falls, or their distance rises.

    The run stops at the second measurement although patience is off, and the decoder is exported as it was.
    """
    if lora:
        pytest.importorskip("peft")
    run = tmp_path / "run"
    words = ["--learning_rate", "100" if lora else "1", "--max_kid_rise", "0", "--max_diversity_fall", "0"]
    words += ["--max_train_steps", "8", "--early_stopping_patience", "0", "--output_dir", str(run)]
    forget_accelerate()
    assert finetune_decoder.main([*flags, *lora, *words]) == 0
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["best"]["value"]) == (4, None)
    log = (run / "run.log").read_text(encoding="utf-8")
    assert "by more than --max_" in log
    assert log.count(KEPT) == 1
    for part in ("unet", "brief_encoder"):
        original, exported = getattr(load_pipeline(models["decoder"]), part), getattr(load_pipeline(run), part)
        assert all(torch.equal(tensor, exported.state_dict()[name]) for name, tensor in original.state_dict().items())
    assert not (run / "pipeline/lora").exists()
    report = json.loads((run / "finetuning.json").read_text(encoding="utf-8"))
    assert report["after"]["kid"] == report["before"]["kid"]
    assert report["after"]["kid_change"] == 0
    assert record["metrics"]["eval_cycle_score"] > 0
    assert "val_loss" not in record["metrics"]
    table = (run / "finetuning.md").read_text(encoding="utf-8")
    assert KEPT[1:] in table
    assert "Limit exceeded" not in table


def test_a_measurement_within_the_limits_starts_the_count_again():
    state = RunState(step=4, goal_steps=8)
    stopping = EarlyStoppingConfig(early_stopping_patience=0)
    stops = []
    for beyond in (True, False, True, True):
        state.note_limits(beyond)
        stops.append(state.must_stop_early(stopping))
    assert stops == [False, False, False, True]
    assert RunState.from_json(state.to_json()).is_beyond_limits


# --- the losses


def test_the_gradient_steps_bound_the_gradient(flags):
    """With one step, the gradient is that of the last prediction alone, for the same posters."""
    posters, gradients = {}, {}
    for steps in ("1", "2", "3"):
        stage = stage_of(flags, "--gradient_steps", steps)
        batch = batch_of(stage)
        noise = Draws(0, 0, range(4)).normal("generated", (3, 32, 32))
        posters[steps] = stage.phase.generate(batch["brief"], noise)
        stage.phase.cycle_losses(posters[steps], batch["brief"])["grammar"].backward()
        gradients[steps] = stage.phase.unet.conv_in.weight.grad.clone()
    assert torch.equal(posters["1"], posters["3"])
    assert not torch.allclose(gradients["1"], gradients["2"])
    assert not torch.allclose(gradients["2"], gradients["3"])


@pytest.mark.parametrize("name", ["grammar", "palette", "counts"])
def test_each_cycle_loss_falls_along_its_gradient(flags, name):
    """Steps along the gradient of each loss alone lower this loss for the same briefs and noise."""
    stage = stage_of(flags)
    batch, noise = batch_of(stage), Draws(0, 0, range(4)).normal("generated", (3, 32, 32))
    optimizer = torch.optim.SGD(stage.phase.parameters(), lr=0.05)
    values = []
    for _ in range(4):
        loss = stage.phase.cycle_losses(stage.phase.generate(batch["brief"], noise), batch["brief"])[name]
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.phase.parameters(), 1.0)
        optimizer.step()
    assert values[-1] < values[0]


def test_generation_without_a_gradient_is_that_of_the_pipeline(flags, models):
    """Guided Euler steps of rectified flow: the sampler of the phase agrees with that of Diffusers at its levels."""
    stage = stage_of(flags, "--sampling_steps", "4")
    batch = batch_of(stage)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    noise = torch.stack([torch.randn(3, 32, 32, generator=generator) for generator in generators])
    briefs = [stage.training_set.brief(i) for i in range(4)]
    pipeline = stage.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    with torch.no_grad():
        ours = stage.phase.generate(batch["brief"], noise)
        sigmas = [level.sigma for level in stage.phase.levels]
        theirs = pipeline(briefs, sigmas=sigmas, guidance_scale=2.0, generator=generators, output_type="pt").images
    assert torch.allclose((ours + 1) / 2, theirs, atol=1e-5)


# --- bad input


def bad(capfd, flags, tmp_path, *more: str) -> str:
    message = refusal(finetune_decoder, [*flags, "--output_dir", str(tmp_path / "run"), *more], capfd)
    assert nothing_was_trained(tmp_path / "run")
    assert message.count("\n") <= 1
    return message


def test_models_that_do_not_fit_are_one_message(capfd, flags, models, tmp_path):
    encoder = str(models["reader"].parent / "encoder_0")
    assert "is a LayoutAnalysisPipeline, not a poster decoder" in bad(
        capfd, flags, tmp_path, "--decoder", str(models["reader"])
    )
    assert "cannot read the grammar of posters; give a run of train_abstractor.py with --encoder" in bad(
        capfd, flags, tmp_path, "--reader", encoder
    )
    assert "is a PosterDecoderPipeline that cannot read" in bad(
        capfd, flags, tmp_path, "--judge", str(models["decoder"])
    )
    assert "has the same encoder and the same abstractor as --reader" in bad(
        capfd, flags, tmp_path, "--judge", str(models["reader"])
    )
    assert "generates posters of 32 px, but --resolution is 64; set --resolution 32" in bad(
        capfd, flags, tmp_path, "--resolution", "64"
    )


def test_a_judge_with_the_same_encoder_is_refused(capfd, flags, models, posters, tmp_path):
    words = (*LAYOUT, *TINY_ABSTRACTOR, "--dataset_name", str(posters), "--seed", "2")
    encoder = str(models["reader"].parent / "encoder_0")
    half = made(train_abstractor, tmp_path / "half", *words, "--encoder", encoder)
    message = bad(capfd, flags, tmp_path, "--judge", str(half))
    assert "has the same encoder as --reader" in message


def test_a_reader_of_another_resolution_is_refused(capfd, flags, posters, tmp_path):
    data = ("--dataset_name", str(posters), "--preview_epochs", "0", "--max_train_steps", "1")
    forget_accelerate()
    encoder, reader = (str(tmp_path / name) for name in ("encoder", "reader"))
    assert train_encoder.main([*LAYOUT, *TINY_ENCODER, *data, "--output_dir", encoder]) == 0
    forget_accelerate()
    words = [*LAYOUT, *TINY_ABSTRACTOR, *data, "--encoder", encoder, "--output_dir", reader]
    assert train_abstractor.main(words) == 0
    message = bad(capfd, flags, tmp_path, "--reader", reader)
    assert "was trained on posters of 64 px, but --resolution is 32" in message


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--reader", ""), "--reader is not set; give a run of train_abstractor.py"),
        (("--decoder", ""), "--decoder is not set; give a run of train_decoder.py"),
        (("--init_from", "runs/x"), "--init_from runs/x: training starts from --decoder"),
        (("--gradient_steps", "4"), "--gradient_steps 4 is larger than --sampling_steps 3"),
        (("--lora_alpha", "16"), "--lora_alpha 16 has no effect without --lora_rank; add --lora_rank 8"),
        (("--evaluation_steps", "0"), "the best checkpoint is chosen by measurements"),
        (("--grammar_weight", "0", "--palette_weight", "0", "--counts_weight", "0"), "nothing would be learned"),
    ],
)
def test_settings_that_make_no_sense(capfd, flags, tmp_path, more, words):
    assert words in bad(capfd, flags, tmp_path, *more)


def test_posters_without_their_grammar_are_refused(capfd, flags, posters, tmp_path):
    import datasets

    data = datasets.load_dataset(str(posters))
    data.remove_columns(list(GRAMMAR)).save_to_disk(str(tmp_path / "old"))
    message = bad(capfd, flags, tmp_path, "--dataset_name", str(tmp_path / "old"))
    assert "is not a poster dataset: it has no column balance" in message

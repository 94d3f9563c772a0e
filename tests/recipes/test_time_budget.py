"""Settings that are chosen for a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines.tools.cli import UserError
from tests.recipes.test_one_command import diffusion, draw
from training import train_image_caption
from training.core.parsing import parse_config
from training.recipes import estimate, table
from training.recipes.collection import Collection
from training.recipes.completion import complete_image_caption
from training.recipes.options import budget_seconds
from training.recipes.settings import MIN_STEPS, MOST_EPOCHS, Time, denoiser_for, settings_for

SOME = Collection("some", images=1000, held_out=50)
SMALL = ("--train_data_dir", "pics", "--resolution", "32", "--cpu_threads", "1")
TINY = ("--transformer.hidden_size", "32", "--transformer.num_layers", "1", "--transformer.bottleneck_size", "8")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(config) -> None:
    """Leave what a session leaves that was interrupted."""
    Path(config.output_dir, "checkpoints").mkdir(parents=True, exist_ok=True)
    Path(config.output_dir, "config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("90s", 90), ("overnight", 8 * 3600), ("1H 5m", 3900), (None, 0)],
)
def test_a_time_is_read(text, seconds):
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "soon", "30m2h", "-5m", "1.5h", "m", "0"])
def test_another_text_is_refused_with_the_form(text):
    with pytest.raises(UserError, match=f"--time_budget is '{text}'; it must be a time such as 30m, 2h, 1h30m or"):
        budget_seconds(text)


def test_a_number_without_a_unit_is_refused_with_the_likely_one():
    with pytest.raises(UserError, match="for minutes, write 30m"):
        diffusion("--train_data_dir", draw("pics"), "--time_budget", "30")


@pytest.mark.parametrize("words", [("--recipe", "none"), ("--config", "mine.yaml")])
def test_a_budget_without_a_choice_of_settings_is_refused(words):
    Path("mine.yaml").write_text("resolution: 64\n", encoding="utf-8")
    with pytest.raises(UserError, match="--time_budget 1h30m is for settings that are.*use --max_train_minutes 90"):
        diffusion("--train_data_dir", draw("pics"), "--vae", "x", "--condition_on", "none", "--time_budget", "1h30m",
                  *words)  # fmt: skip


def test_the_flag_of_earlier_versions_names_the_new_one_and_their_files_are_read():
    with pytest.raises(UserError, match="--auto_settings is a flag of earlier versions; use --recipe"):
        diffusion("--train_data_dir", draw("pics"), "--auto_settings", "false")
    Path("old.yaml").write_text("auto_settings: true\nresolution: 32\n", encoding="utf-8")
    words = ("--train_data_dir", "pics", "--vae", "x", "--condition_on", "none", "--config", "old.yaml")
    assert diffusion(*words).resolution == 32


@pytest.mark.parametrize(
    ("device", "resolution", "seconds", "denoiser"),
    [
        ("cpu", 64, 1800, "transformer"), ("mps", 64, 7200, "transformer"), ("cuda", 64, 1800, "unet"),
        ("cpu", 128, 1800, "unet"), ("cpu", 64, 7201, "unet"), ("cpu", 64, None, "transformer"),
    ],
)  # fmt: skip
def test_the_device_the_resolution_and_the_time_decide_the_network(device, resolution, seconds, denoiser):
    assert denoiser_for(resolution, device, seconds)[0] == denoiser


def chosen(seconds: float, image_seconds: float, **options) -> dict:
    time = Time(seconds, image_seconds)
    return settings_for("latent_diffusion", SOME, device="cpu", resolution=64, cells=8, time=time, **options)


def test_the_steps_are_those_that_fit_and_some_more():
    found = chosen(3600, 0.01)
    assert (found["train_batch_size"], found["max_train_steps"]) == (32, 14_600)  # 1.3 × 3600 / 0.32 = 14,625
    assert found["ema_decay"] == 0.999


def test_batches_are_smaller_and_the_ema_is_shorter_where_few_steps_fit():
    found = chosen(600, 0.02)
    assert (found["train_batch_size"], found["max_train_steps"]) == (16, 2_400)  # 1.3 × 600 / 0.32 = 2,437
    assert found["ema_decay"] == pytest.approx(1 - 1 / 240, abs=1e-4)
    assert chosen(600, 0.02, transformer=True)["train_batch_size"] == 16
    assert chosen(1, 1.0)["max_train_steps"] == 100


def test_a_small_collection_is_not_seen_more_often_than_is_useful():
    found = chosen(8 * 3600, 1e-4)
    assert found["max_train_steps"] == MOST_EPOCHS * SOME.images // 32
    few = Collection("few", images=8, held_out=0)
    time = Time(8 * 3600, 1e-4)
    assert (
        settings_for("latent_diffusion", few, device="cpu", resolution=64, cells=8, time=time)["max_train_steps"]
        == MIN_STEPS
    )


def test_several_processes_measure_nothing_and_leave_the_length_to_the_time_limit(monkeypatch):
    assert chosen(60, 0.0)["max_train_steps"] == MOST_EPOCHS * SOME.images // 32
    monkeypatch.setenv("WORLD_SIZE", "2")
    draw("pics")
    assert diffusion(*SMALL, *TINY, "--time_budget", "20s").max_train_steps == MIN_STEPS


def test_a_budget_chooses_the_network_the_length_and_the_limit():
    draw("pics")
    config = diffusion(*SMALL, *TINY, "--time_budget", "10m")
    assert (config.denoiser, config.vae, config.prepare) == ("transformer", "pixels", {})
    assert config.max_train_steps == MIN_STEPS  # of 23 images, more than 2,000 epochs
    assert 9.5 < config.max_train_minutes < 10  # less what has passed since the start of the command
    assert config.time_limit()[0] == "--time_budget is 10m"
    text = "\n".join(config.announcements)
    assert "transformer on pixels" in text
    assert "--time_budget 10m; it may be earlier" in text


def test_the_unet_gets_what_the_autoencoder_leaves():
    draw("pics")
    config = diffusion(*SMALL, "--denoiser", "unet", "--model.block_out_channels", "[32]", "--time_budget", "10s")
    assert config.prepare["runs/pics/autoencoder_32/pipeline"].endswith("--max_train_minutes 0.06")
    assert 100 <= config.max_train_steps < MIN_STEPS
    assert config.max_train_minutes < 10 / 60


@pytest.mark.parametrize(
    "words",
    [("--model.layers_per_block", "1"), ("--caption_prior.hidden_size", "0"),
     ("--denoiser", "unet")],
)  # fmt: skip
def test_options_of_the_unet_keep_it(words):
    draw("pics")
    words = (*words, "--max_train_steps", "50")  # a length that is given: nothing is timed
    assert diffusion(*SMALL, "--time_budget", "30m", *words).denoiser == "unet"
    assert diffusion(*SMALL, "--vae", "pixels").denoiser == "transformer"  # which fits both networks


def test_the_shorter_of_two_limits_counts():
    draw("pics")
    words = (*SMALL, "--time_budget", "30m", "--max_train_steps", "50")
    assert diffusion(*words, "--max_train_minutes", "2").max_train_minutes < 2
    config = diffusion(*words, "--max_train_minutes", "60")
    assert 29 < config.max_train_minutes < 30
    assert config.max_train_steps == 50


@pytest.mark.parametrize("again", [("--time_budget", "20s"), (), ("--time_budget", "2h")])
def test_a_resumed_run_keeps_what_was_measured_when_it_began(again):
    draw("pics")
    config = diffusion(*SMALL, *TINY, "--time_budget", "20s")
    config.max_train_steps, config.ema_decay = 1234, 0.625  # what no machine would choose
    save(config)
    resumed = diffusion(*SMALL, *TINY, *again)
    before, after = config.to_dict(), resumed.to_dict()
    assert after == before
    said = any("the run was begun with 20s, which it keeps" in line for line in resumed.announcements)
    assert not any("limits every training" in line for line in resumed.announcements)
    assert said == (again == ("--time_budget", "2h"))


def test_a_resumed_run_can_be_made_longer():
    draw("pics")
    words = (*SMALL, *TINY, "--time_budget", "20s")
    config = diffusion(*words)
    save(config)
    longer = diffusion(*words, "--extra_epochs", "5")
    assert (longer.extra_epochs, longer.max_train_minutes, longer.time_budget) == (5, 0, "20s")
    save(longer)
    assert diffusion(*words, "--extra_epochs", "5").max_train_minutes == 0
    assert diffusion(*words, "--max_train_minutes", "0.1").max_train_minutes == 0.1


def test_a_run_of_the_other_network_is_continued():
    draw("pics")
    config = diffusion(*SMALL, "--denoiser", "unet")
    save(config)
    assert diffusion(*SMALL).denoiser == "unet"
    budget = (*SMALL, "--time_budget", "30m")
    assert diffusion(*budget).output_dir == config.output_dir
    assert diffusion(*budget).denoiser == "unet"
    assert diffusion(*budget, *TINY, "--overwrite", "--max_train_steps", "50").denoiser == "transformer"


def test_a_run_of_another_network_is_not_touched():
    draw("pics")
    folder = diffusion(*SMALL).output_dir
    save(diffusion(*SMALL, "--denoiser", "unet"))
    transformer = diffusion(*SMALL, "--denoiser", "transformer")
    assert transformer.output_dir == f"{folder}_transformer"
    save(transformer)
    assert diffusion(*SMALL, "--denoiser", "transformer").output_dir == transformer.output_dir
    assert diffusion(*SMALL, "--denoiser", "unet").output_dir == folder


def test_a_run_of_an_earlier_version_keeps_its_part_of_the_time():
    draw("pics")
    words = ("--train_data_dir", "pics", "--max_train_minutes", "30")
    config = diffusion(*words, "--denoiser", "unet")
    saved = config.to_dict() | {"max_train_minutes": 20.0}
    del saved["recipe"], saved["time_budget"]
    Path(config.output_dir, "checkpoints").mkdir(parents=True)
    Path(config.output_dir, "config.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    assert diffusion(*words).max_train_minutes == 20


def test_a_budget_limits_the_usual_length_of_a_stage_that_is_not_timed():
    draw("pics", captions=True)
    words = ("--train_data_dir", "pics", "--time_budget", "1h")
    config = parse_config(train_image_caption.Config, words, complete=complete_image_caption)
    assert 59 < config.max_train_minutes < 60
    assert config.max_train_steps >= MIN_STEPS


def test_the_table_has_aligned_columns():
    found = table.lines([("a", "1", "short"), ("a long name", "22", "")])
    assert found == ["setting      value  why", "a            1      short", "a long name  22"]


def test_the_end_is_a_time_of_day_or_a_date():
    assert len(estimate.finish(0)) == 5
    assert " on 2" in estimate.finish(86400)

"""The quickstart's plan and summary; `make quickstart-tiny` runs the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_scripts import make_posters
from pipelines.tools.cli import UserError
from training import quickstart, train_latent_diffusion
from training.core.made_folders import incomplete
from training.core.parsing import parse_config
from training.quickstart import DIFFUSION, GOALS, Plan


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_run(metrics: dict[str, float], steps: int, all_steps: int, seconds_per_step: float = 0.2) -> None:
    folder = Path("runs/quickstart/latent_diffusion")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps({"metrics": metrics, "steps": steps}))
    estimate = 20 + all_steps * seconds_per_step
    speed = {"steps": steps, "all_steps": all_steps, "all_steps_estimated_seconds": estimate}
    (folder / "speed.json").write_text(json.dumps(speed | {"seconds": {"phases": {"it": seconds_per_step}}}))


def finished(steps: int, **metrics: float) -> dict:
    """The summary of a quickstart of ten minutes with these results; metrics that are not given reach their goals."""
    values = {name: goal for name, (goal, _) in GOALS.items()} | metrics
    write_run({"val_loss": 0.3}, steps, 3000)
    values |= {"kid": 0.5, "kid_standard_error": 0.01}
    evaluation = {"metrics": values, "num_images": 256, "floor": {"kid": {"mean": 0.0, "std": 0.003}}}
    evaluation |= {"verdict": "no sign of copied training images so far"}
    file = Path("runs/quickstart/latent_diffusion/evaluation.json")
    file.write_text(json.dumps(evaluation), encoding="utf-8")
    return quickstart.summarize(Plan(10.0, seconds={"make_posters": 10.0, DIFFUSION: 450.0}))


def test_the_training_leaves_time_for_the_evaluation():
    plan = Plan(10.0, seconds={"make_posters": 15.0})
    assert plan.minutes_for(DIFFUSION) == round((600 - 15 - 15) * 0.74 / 60, 2)


def test_the_preset_leaves_the_precision_to_the_processor():
    config = parse_config(train_latent_diffusion.Config, ["--config", quickstart.CONFIG])
    assert config.consists_of_products
    assert config.mixed_precision == "auto"


def test_decisions_are_kept(capsys):
    plan = Plan(10.0)
    minutes = plan.minutes_for(DIFFUSION)
    again = Plan.open(10.0, tiny=False)
    again.seconds["make_posters"] = 100.0  # would change a new decision
    assert again.minutes_for(DIFFUSION) == minutes
    assert Plan.open(30.0, tiny=False).minutes == 10
    assert "was begun with --minutes 10, which stays" in capsys.readouterr().out


def test_another_time_may_be_given_until_something_was_decided():
    Plan(10.0, seconds={"make_posters": 5.0}).save()
    assert Plan.open(30.0, tiny=False).minutes == 30


def test_results_of_a_tiny_quickstart_are_not_used_by_a_real_one():
    Plan(10.0, tiny=True).save()
    with pytest.raises(UserError, match="rm -r runs/quickstart data/posters_64 "):
        quickstart.main([])


def test_goals_that_were_not_reached_on_a_slow_machine_say_what_to_do():
    summary = finished(900, palette_share_ratio=0.5)
    assert not summary["full_recipe"]["complete"]
    assert summary["full_recipe"]["estimated_minutes_here"] == round((10 + 20 + 3000 * 0.2) / 60 + 1)
    missed = summary["goals"]["palette_share_ratio"]
    assert (missed["goal"], missed["reached"]) == (0.9, False)
    assert "train_latent_diffusion.py --config" in missed["note"]
    assert summary["goals"]["picture_count_share"] == {"goal": 0.7, "reached": True}
    assert "rm -r runs/quickstart && make quickstart MINUTES=" in summary["full_recipe"]["from_the_beginning"]


def test_a_goal_missed_by_the_full_recipe_is_not_blamed_on_the_machine():
    summary = finished(3000, title_position_share=0.8)
    assert summary["full_recipe"]["complete"]
    assert summary["goals"]["title_position_share"] == {"goal": 0.9, "reached": False}


def test_what_an_earlier_version_began_is_left_alone():
    Plan(10.0, training_minutes={"train_autoencoder": 3.0}).save()
    with pytest.raises(UserError, match="begun by an earlier version.*runs/quickstart_unet"):
        quickstart.main([])


@pytest.mark.parametrize("minutes", ["1", "-3", "ten"])
def test_impossible_times_are_rejected(minutes):
    with pytest.raises(UserError, match="minutes"):
        quickstart.main(["--minutes", minutes])


@pytest.mark.slow
def test_only_complete_stages_are_left_out(capsys):
    """A tokenizer folder without its tokenizer.json is made again; the stage after it cannot be run here."""
    make_posters.main(["--output_dir", "data/posters_64", "--num_posters", "20", "--num_workers", "1"])
    Path("data/posters_64_tokenizer").mkdir()
    Path("data/posters_64_tokenizer/tokenizer_config.json").touch()
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/latent_diffusion").touch()  # a file in the place of the run
    with pytest.raises(UserError, match=r"stopped at: training/train_latent_diffusion.py .*exit status 2"):
        quickstart.main(["--tiny", "--minutes", "2"])
    assert "already done (data/posters_64)" in capsys.readouterr().out
    assert incomplete("data/posters_64_tokenizer", "train_tokenizer.py") is None
    assert Path("data/posters_64_tokenizer_old_1").is_dir()

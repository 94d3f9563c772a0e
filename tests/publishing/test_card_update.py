"""The model card of a run: it states what the run cost, and what an evaluation of its model measured afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.publishing.test_model_card import EVALUATION, front_matter
from tests.support.hub_server import hub  # noqa: F401  (a fixture)
from tests.support.toy_runs import run, run_of
from training import push_to_hub
from training.publishing.card_update import update_card
from training.publishing.energy import WATTS_PER_CPU_CORE, estimated_energy

STEPS = 6
MEASURED = "| KID (lower is better) | 0.01235 (standard error 0.00123) | -0.0001 ± 0.0004 |"


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory, [])


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    return shutil.copytree(complete, tmp_path / "toy", symlinks=True)


def card(folder: Path) -> str:
    return (folder / "pipeline" / "README.md").read_text(encoding="utf-8")


def evaluate(folder: Path, **changes) -> None:
    (folder / "evaluation.json").write_text(json.dumps({**EVALUATION, "step": STEPS, **changes}))


def test_the_card_of_a_run_states_what_it_cost_and_what_was_not_measured(complete):
    record = json.loads((complete / "record.json").read_text())
    assert record["steps"] == STEPS
    energy = estimated_energy("cpu", 1, record["cpu_cores"], record["elapsed_seconds"])
    assert record["energy"] == energy
    assert energy["kwh"] == pytest.approx(
        WATTS_PER_CPU_CORE * record["cpu_cores"] * record["elapsed_seconds"] / 3_600_000
    )
    text = card(complete)
    assert f"on {record['num_validation_images']} validation images" in text
    assert "- energy, a rough estimate: " in text
    assert "- images seen: 48" in text
    assert "not measured. Run `training/evaluate.py" in text
    results = front_matter(text)["model-index"][0]["results"]
    assert {metric["type"] for result in results for metric in result["metrics"]} >= {"val_loss"}


def test_an_evaluation_is_added_to_the_card_and_to_the_repository(hub, folder):  # noqa: F811
    evaluate(folder)
    assert update_card(folder)
    assert MEASURED in card(folder)
    assert push_to_hub.main([str(folder), "--hub_model_id", "toy"]) == 0
    pushed = hub.files("ada/toy")["README.md"].decode()
    assert MEASURED in pushed
    assert '"ada/toy"' in pushed
    evaluate(folder, num_images=1000)
    assert push_to_hub.main([str(folder), "--hub_model_id", "toy"]) == 0
    assert "- images of the model (n): 1,000" in hub.files("ada/toy")["README.md"].decode()


def test_a_card_that_was_edited_stays_as_it_is(folder, caplog):
    evaluate(folder)
    path = folder / "pipeline" / "README.md"
    path.write_text(edited := card(folder) + "\nMy own words.\n", encoding="utf-8")
    assert not update_card(folder)
    assert card(folder) == edited
    assert "was edited" in caplog.text


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"metrics": 3}', '{"metrics": {"kid": 1}, "step": 5}', '{"metrics": {"kid"']
)
def test_an_evaluation_that_is_damaged_or_of_another_step_changes_nothing(folder, content):
    before = card(folder)
    if content is not None:
        (folder / "evaluation.json").write_text(content)
    assert not update_card(folder)
    assert card(folder) == before


def test_a_folder_without_a_complete_run_has_no_card(tmp_path):
    assert not update_card(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert not update_card(tmp_path)


def test_an_evaluation_of_an_earlier_step_is_not_in_the_card_of_a_longer_run(folder):
    evaluate(folder)
    assert update_card(folder)
    assert run(folder, "--max_train_steps", "8") == 0
    assert MEASURED not in card(folder)
    assert "not measured. Run `training/evaluate.py" in card(folder)
    assert not update_card(folder)
    evaluate(folder, step=8)
    assert update_card(folder)
    assert MEASURED in card(folder)

"""What is private in texts and settings: the home folder is written as ~, and becomes a path again."""

from __future__ import annotations

import pytest
import yaml

from pipelines.tools.private import expand_home, without_private
from tests.support.toy_runs import run, state_of
from training.run.folder import RunFolder

HOME = "/home/jóna qvist"


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setenv("USERPROFILE", HOME)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{HOME}/data", "~/data"),
        (HOME, "~"),
        (f"saved in {HOME}.", "saved in ~."),
        (f"--vae={HOME}/vae '{HOME}/a b'", "--vae=~/vae '~/a b'"),
        (f"file://{HOME}/x", "file://~/x"),
        (f"/mnt{HOME}/x", f"/mnt{HOME}/x"),  # another folder
        (f"{HOME}2/x {HOME}.old/x", f"{HOME}2/x {HOME}.old/x"),
        ("hf_" + "a1" * 17, "***"),
    ],
)
def test_the_home_folder_and_tokens_are_replaced(text, shown):
    assert without_private(text) == shown
    assert without_private({text: [text, 1, None]}) == {shown: [shown, 1, None]}


@pytest.mark.parametrize("path", [f"{HOME}/data", HOME, "/data/x", "relative/x", "a ~/b", "~other/x"])
def test_paths_are_the_same_after_both_directions(path):
    assert expand_home(without_private({"path": path})) == {"path": path}


def test_a_home_folder_linked_from_elsewhere_is_replaced_in_both_spellings(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert without_private([f"{tmp_path}/home/x", f"{tmp_path}/disk/x"]) == ["~/x", "~/x"]


@pytest.mark.parametrize("home", ["/", "", "relative"])
def test_a_process_without_a_home_folder_changes_nothing(monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    assert without_private("/data/x") == "/data/x"


def test_a_run_is_resumed_by_either_spelling_of_its_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "run"
    assert run(folder, "--data", f"{tmp_path}/data", "--max_train_steps", "2") == 0
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert (config["data"], config["output_dir"]) == ("~/data", "~/run")
    assert RunFolder(folder).saved_config()["data"] == f"{tmp_path}/data"
    assert run(folder, "--output_dir", "~/run", "--data", "~/data", "--max_train_steps", "4") == 0
    assert state_of(folder)["step"] == 4
    for file in (folder / "run.log", folder / "sessions.md", folder / "record.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8")

"""Access tokens: the three ways to give one, and that none of them appears in what a run prints, writes or uploads."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.tools.cli import Options, UserError
from pipelines.tools.credentials import mask_credentials
from tests.support.hub_server import hub  # noqa: F401  (a fixture)
from tests.support.runs import ROOT, TOY, environment
from tests.support.toy_runs import run
from training.core.parsing import parse_config
from training.engine.run_config import RunConfig
from training.experiments.registry import read_config_file, stage_of
from training.publishing.hub import HUB_STRATEGIES, HubConfig, read_token
from training.run.folder import RunFolder
from training.run.output import start_logging

TOKEN = "hf_" + "Recognizable" * 3
PLAIN_TOKEN = "recognizable-without-a-prefix"  # has no form by which it could be masked
WANDB_KEY = "0123456789abcdef" * 2 + "recogniz"
SHORT = ("--num_samples", "8", "--train_batch_size", "4", "--max_train_steps", "2", "--cpu_threads", "1")
SPELLINGS = [("--hub_token", TOKEN), (f"--hub_token={TOKEN}",), ("--hub-token", TOKEN), (f"--hub_token+={TOKEN}",)]


def run_toy(folder: Path, *flags: str, launcher: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in environment(**variables).items() if name != "HF_TOKEN" or name in variables}
    words = [sys.executable, *launcher, str(TOY), "--output_dir", str(folder), *SHORT, *flags]
    return subprocess.run(words, capture_output=True, text=True, env=kept, cwd=ROOT)


def files_with(folder: Path, *secrets: str) -> list[str]:
    """Return the files in `folder`, hidden and binary ones included, that contain one of these texts."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]


@pytest.mark.parametrize(
    ("way", "token"),
    [
        ("variable", TOKEN),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("login", TOKEN), ("file", PLAIN_TOKEN))),
    ],
)
def test_a_run_uploads_and_its_token_appears_nowhere(hub, tmp_path, way, token):  # noqa: F811
    hub.users[token] = ("ada", "write")
    home, folder, file = tmp_path / "hf_home", tmp_path / "toy", tmp_path / "token.txt"
    variables = {**hub.env(token=None, home=home), "WANDB_API_KEY": WANDB_KEY}
    flags = ["--push_to_hub", "--hub_model_id", "toy"]
    if way == "login":
        home.mkdir(exist_ok=True)
        (home / "token").write_text(token)  # the file that `hf auth login` writes
    elif way == "variable":
        variables["HF_TOKEN"] = token
    else:
        file.write_text(f"{token}\n")
        flags += ["--hub_token_file", str(file)]
    done = run_toy(folder, *flags, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Uploaded to" in done.stdout
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert files_with(folder, token, WANDB_KEY) == []
    pushed = hub.files("ada/toy")
    assert "model_index.json" in pushed
    assert b"token.txt" not in pushed["README.md"]
    assert not any(secret.encode() in content for content in pushed.values() for secret in (token, WANDB_KEY))
    assert token not in done.stdout + done.stderr
    assert WANDB_KEY not in done.stdout + done.stderr


@pytest.mark.parametrize("strategy", HUB_STRATEGIES)
def test_no_pushed_file_contains_a_token_or_a_path_of_this_machine(hub, tmp_path, monkeypatch, strategy):  # noqa: F811
    hub.users[PLAIN_TOKEN] = ("ada", "write")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    file, folder = tmp_path / "token.txt", tmp_path / "toy"
    file.write_text(PLAIN_TOKEN)
    named = f"{TOKEN} {WANDB_KEY} Bearer abc123def456 in {tmp_path}"
    flags = ("--hub_token_file", str(file), "--run_name", named, "--license", named, "--tracker_project_name", named)
    pushing = ("--push_to_hub", "--hub_model_id", "toy", "--hub_strategy", strategy)
    assert run(folder, *SHORT[:2], "--checkpointing_steps", "1", "--max_train_steps", "2", *pushing, *flags) == 0
    pushed = hub.files("ada/toy")
    assert ("last-checkpoint/run/config.yaml" in pushed) == (strategy in ("checkpoint", "all_checkpoints"))
    assert ("checkpoints/step-00000001/manifest.json" in pushed) == (strategy == "all_checkpoints")
    pushed["messages"] = "".join(hub.messages("ada/toy")).encode()
    for secret in (TOKEN, PLAIN_TOKEN, WANDB_KEY, "abc123def456", str(tmp_path), "token.txt"):
        assert [path for path, content in pushed.items() if secret.encode() in content] == []


USER = "quibblewick"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder in the home folder of a user with an unusual name."""
    path = tmp_path / "home" / USER / "project"
    path.mkdir(parents=True)
    return path


def run_at_home(project: Path, hub, output_dir: str, *flags: str) -> subprocess.CompletedProcess:  # noqa: F811
    """Train and upload the toy as that user does in that folder, with two trackers."""
    home = str(project.parent)
    accounts = {"HOME": home, "USERPROFILE": home, "USER": USER, "LOGNAME": USER, "USERNAME": USER}
    words = [sys.executable, str(TOY), "--output_dir", output_dir, *SHORT, "--report_to", "[wandb,tensorboard]"]
    words += ["--push_to_hub", "--hub_model_id", "toy", *flags]
    variables = {**hub.env(token=TOKEN), **accounts, "PYTHONPATH": str(ROOT), "WANDB_API_KEY": WANDB_KEY}
    return subprocess.run(words, capture_output=True, text=True, env=environment(**variables), cwd=project)


@pytest.mark.slow
def test_a_finished_run_and_its_repository_contain_neither_token_nor_home_nor_user(hub, project):  # noqa: F811
    hub.users[TOKEN] = ("ada", "write")
    done = run_at_home(project, hub, "runs/toy", "--hub_strategy", "all_checkpoints")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = project / "runs" / "toy"
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert list(folder.rglob("events.out.tfevents.*"))
    private = (TOKEN, WANDB_KEY, USER, str(project.parent))
    assert files_with(folder, *private) == []
    pushed = hub.files("ada/toy")
    assert {"README.md", "model_index.json", "last-checkpoint/run/config.yaml"} <= pushed.keys()
    assert [name for name, content in pushed.items() if any(word.encode() in content for word in private)] == []
    assert not any(word in text for word in private for text in (done.stdout, done.stderr, *hub.messages("ada/toy")))


@pytest.mark.slow
def test_paths_in_the_home_folder_are_not_uploaded(hub, project):  # noqa: F811
    """The run folder itself has to keep the paths that were typed: a resumed run needs them."""
    hub.users[TOKEN] = ("ada", "write")
    license = f"see {project}/LICENSE of {project.parent}"
    done = run_at_home(
        project, hub, str(project / "runs" / "toy"), "--hub_strategy", "all_checkpoints", "--license", license
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pushed = hub.files("ada/toy") | {"messages": "".join(hub.messages("ada/toy")).encode()}
    assert [name for name, content in pushed.items() if USER.encode() in content or TOKEN.encode() in content] == []


@pytest.mark.parametrize("words", SPELLINGS[:2])
def test_a_token_on_the_command_line_is_refused(tmp_path, words):
    done = run_toy(tmp_path / "toy", *words)
    assert done.returncode == 2
    assert_refused(done, tmp_path / "toy")
    assert TOKEN not in done.stdout + done.stderr


def test_a_token_in_a_config_file_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(f"seed: 1\nhub_token: {TOKEN}\n")
    done = run_toy(tmp_path / "toy", "--config", str(tmp_path / "config.yaml"))
    assert done.returncode == 2
    assert_refused(done, tmp_path / "toy")
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("words", SPELLINGS[:2])
def test_a_token_on_the_command_line_of_a_launcher_is_refused(tmp_path, words):
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
    done = run_toy(tmp_path / "toy", *words, launcher=launcher)
    assert done.returncode == -signal.SIGTERM  # ended before it could repeat the command in a traceback
    assert_refused(done, tmp_path / "toy")
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_token_in_any_other_place_is_masked_in_what_is_written(tmp_path):
    """The name of a run, for example; W&B records the command line in its metadata."""
    done = run_toy(tmp_path / "toy", "--run_name", f"run {TOKEN}", WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "toy").glob("wandb/offline-run-*/*.wandb"))
    assert files_with(tmp_path / "toy", TOKEN) == []
    assert TOKEN not in done.stdout + done.stderr


def test_a_token_that_was_read_from_a_file_is_masked_whatever_it_looks_like(tmp_path):
    (tmp_path / "token.txt").write_text(PLAIN_TOKEN)
    assert read_token(str(tmp_path / "token.txt")) == PLAIN_TOKEN
    assert mask_credentials(f"Bearer {PLAIN_TOKEN}!") == "Bearer ***!"


def assert_refused(done: subprocess.CompletedProcess, folder: Path) -> None:
    message = next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    for way in ("hf auth login", "HF_TOKEN", "--hub_token_file PATH"):
        assert way in message
    assert TOKEN not in message
    assert not folder.exists()


@pytest.mark.parametrize("words", SPELLINGS)
def test_every_parser_refuses_a_token(words):
    for parse in (lambda: parse_config(RunConfig, words), lambda: Options("A command.").parse(list(words))):
        with pytest.raises(UserError, match="--hub_token is not accepted") as raised:
            parse()
        assert TOKEN not in str(raised.value)


def test_an_unknown_argument_is_reported_without_its_value():
    with pytest.raises(UserError, match="unknown argument --api_token ") as raised:
        Options("A command.").parse([f"--api_token={TOKEN}"])
    assert TOKEN not in str(raised.value)


def test_an_old_run_folder_with_a_token_resumes_and_loses_it(tmp_path, capsys):
    folder = tmp_path / "toy"
    assert run(folder, "--max_train_steps", "1") == 0
    config = folder / "config.yaml"
    for steps, saved in enumerate([TOKEN, "***", "hf_****able", None], 2):
        config.write_text(config.read_text() + yaml.safe_dump({"hub_token": saved}))
        assert run(folder, "--max_train_steps", str(steps)) == 0
        assert f"resumed from step-{steps - 1:08d}" in capsys.readouterr().out
        assert "hub_token:" not in config.read_text()
    assert files_with(folder, TOKEN) == []


@pytest.mark.parametrize("saved", ["'***'", "hf_****able", "null", "''"])
def test_the_config_of_an_old_run_can_be_used_unless_it_contains_a_token(tmp_path, saved):
    old, new = tmp_path / "autoencoder.yaml", tmp_path / "new.yaml"
    new.write_text("seed: 5\nfreeze_parameters: [a, b]\nprepare: {data/a: data_scripts/make_posters.py}\n")
    old.write_text(f"hub_token: {saved}\n{new.read_text()}")
    assert parse_config(RunConfig, ["--config", str(old)]) == parse_config(RunConfig, ["--config", str(new)])
    assert "hub_token" not in read_config_file(old)
    old.write_text(f"seed: 5\nhub_token: {TOKEN}\n")
    for read in (lambda: parse_config(RunConfig, ["--config", str(old)]), lambda: stage_of(old)):
        with pytest.raises(UserError, match="hub_token in .* is not accepted") as raised:
            read()
        assert TOKEN not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read \\(No such file or directory\\)"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (f"{TOKEN}\n{TOKEN}\n".encode(), "contains something other than one token"),
        (f"token: {TOKEN}".encode(), "contains something other than one token"),
        (TOKEN.encode() + b"\xff\xfe\x00", "contains something other than one token"),
        (TOKEN.encode() * 1000, "contains something other than one token"),
    ],
)
def test_a_token_file_that_cannot_be_used_is_one_error_before_anything_else(tmp_path, content, message):
    file = tmp_path / "token.txt"
    if content is not None:
        file.write_bytes(content)
    config = HubConfig(push_to_hub=True, hub_token_file=str(file))
    with pytest.raises(UserError, match=rf"--hub_token_file {file} {message}.*name a file") as raised:
        config.validate()
    assert TOKEN not in str(raised.value)
    HubConfig(push_to_hub=False, hub_token_file=str(file)).validate()  # nothing is uploaded, so it is not read


def test_a_token_file_that_is_a_folder_or_not_permitted(tmp_path):
    with pytest.raises(UserError, match="cannot be read \\(Is a directory\\)"):
        read_token(str(tmp_path))
    with pytest.raises(UserError, match="cannot be read \\(not a valid path\\)"):
        read_token("a\0b")
    closed = tmp_path / "closed"
    closed.write_text(TOKEN)
    closed.chmod(0)
    if not os.access(closed, os.R_OK):  # root may read everything
        with pytest.raises(UserError, match="cannot be read \\(Permission denied\\)"):
            read_token(str(closed))


@pytest.mark.parametrize("content", [f"{TOKEN}", f"  {TOKEN}\r\n", f"\ufeff{TOKEN}\n"])
def test_a_token_file_may_have_white_space_around_the_token(tmp_path, content):
    (tmp_path / "token.txt").write_bytes(content.encode())
    assert read_token(str(tmp_path / "token.txt")) == TOKEN


def test_tokens_are_masked_and_other_words_are_not(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", PLAIN_TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    values = {"a": [TOKEN, f"x={PLAIN_TOKEN};"], TOKEN: {"b": f"key {WANDB_KEY}"}, "c": 1, "d": None, "e": ("hf_x",)}
    assert mask_credentials(values) == {
        "a": ["***", "x=***;"],
        "***": {"b": "key ***"},
        "c": 1,
        "d": None,
        "e": ("hf_x",),
    }
    masked = mask_credentials('{"env": "WANDB_API_KEY=abc", "more": "WANDB_API_KEY: abc"}')
    assert masked == '{"env": "WANDB_API_KEY=***", "more": "WANDB_API_KEY: ***"}'
    assert mask_credentials(masked) == masked
    for text in ("hf_home", "data/hf_datasets_of_many_images", "half_tone", "hf_internal-testing/tiny"):
        assert mask_credentials(text) == text
    monkeypatch.setenv("HF_TOKEN", "x")
    assert mask_credentials("next") == "next"


def test_the_log_and_the_saved_config_are_masked(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    start_logging(folder.log_file)
    logger = logging.getLogger("halftone")
    try:
        logger.warning("the token is %s", TOKEN)
        try:
            raise ValueError(TOKEN)
        except ValueError:
            logger.exception("failed")
    finally:
        start_logging(None)
    config = RunConfig(run_name=TOKEN, tracker_project_name=f"project {TOKEN}")
    folder.save_config(config.to_dict())
    folder.save_record({"prompts": [TOKEN]})
    folder.release()
    assert files_with(folder.path, TOKEN) == []
    assert "the token is ***" in folder.log_file.read_text()
    assert "the token is ***" in capsys.readouterr().out
    assert config.changes_from(folder.saved_config()) == {"error": [], "warn": []}


@pytest.mark.slow
def test_a_token_in_another_flag_is_masked_in_all_files_of_the_run(tmp_path):
    """Its own files, the config in its trackers, and its card; W&B itself also records the words of the command."""
    done = run_toy(tmp_path / "toy", "--run_name", f"my {TOKEN}", "--report_to", "tensorboard", "--license", TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files_with(tmp_path / "toy", TOKEN) == []
    assert TOKEN not in done.stdout + done.stderr
    assert "To train for more epochs: " in done.stdout
    assert "--run_name 'my ***'" in (tmp_path / "toy" / "sessions.md").read_text()

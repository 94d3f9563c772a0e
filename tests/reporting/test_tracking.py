"""Trackers: the real W&B client (offline) and the real TensorBoard; their files are read back."""

from __future__ import annotations

import enum
import math
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.tools.cli import UserError
from tests.support.wandb_files import wandb_history, wandb_records
from training.reporting.backends import Backend, flatten_config, plain
from training.reporting.recorder import MOST_WAITING
from training.reporting.tracking import TrackerConfig, Trackers, parse_report_to, start_trackers, wandb_options

ROOT = Path(__file__).resolve().parent.parent.parent


class Color(enum.Enum):
    RED = 1


@dataclass
class Nested:
    depth: int = 2
    channels: tuple[int, ...] = (64, 128)


AWKWARD_CONFIG = {
    "learning_rate": 1e-4,
    "block_out_channels": [64, 128],
    "nested": {"none": None, "list": [{"deep": (1, 2)}], "empty": {}},
    "dataclass": Nested(),
    "path": Path("runs/x"),
    "enum": Color.RED,
    "set": {3},
    "nan": float("nan"),
    "none": None,
    "text": "a: 'quoted' = text\nwith a newline",
}


def red_images(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (255, 0, 0)) for _ in range(count)]


@pytest.fixture
def no_wandb_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("wandb,tensorboard", ["wandb", "tensorboard"]),
        ("wandb, wandb", ["wandb"]),
        (["wandb"], ["wandb"]),
        (["tensorboard,wandb"], ["tensorboard", "wandb"]),
        ("WandB", ["wandb"]),
        ("none", []),
        ("", []),
        (None, []),
        ([], []),
    ],
)
def test_report_to_is_split_into_known_names(given, names):
    assert parse_report_to(given) == names


def test_report_to_all_is_what_is_installed():
    assert {"wandb", "tensorboard"} <= set(parse_report_to("all"))


def test_an_unknown_tracker_is_named_with_the_nearest_known_one():
    with pytest.raises(UserError, match=r"tensorbord.*did you mean 'tensorboard'"):
        parse_report_to("wandb,tensorbord")
    for alone in ("none", "auto", "all"):
        with pytest.raises(UserError, match=f"'{alone}' cannot be combined"):
            parse_report_to(f"wandb,{alone}")


def test_a_tracker_that_is_not_installed_is_an_error_that_names_the_package(monkeypatch, tmp_path):
    import importlib.util

    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed here")
    # A folder of that name in the working directory (trackio and wandb both make one) is not the package.
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="pip install trackio"):
        parse_report_to("trackio")


# --- configs -------------------------------------------------------------------------------------------------------


def test_any_config_becomes_plain_and_flat():
    config = plain(AWKWARD_CONFIG)
    assert config["dataclass"] == {"depth": 2, "channels": [64, 128]}
    assert config["path"] == "runs/x"
    assert config["none"] is None
    flat = flatten_config(AWKWARD_CONFIG)
    assert flat["block_out_channels"] == "[64, 128]"
    assert flat["nested.none"] == "none"
    assert flat["dataclass.depth"] == 2
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())


def test_numpy_and_torch_scalars_become_numbers():
    import numpy as np
    import torch

    assert plain(np.float32(0.5)) == 0.5
    assert plain(torch.tensor(3)) == 3


# --- W&B, offline --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_wandb_login")
def test_wandb_without_a_login_records_offline_in_the_run_folder_and_continues_when_resumed(tmp_path):
    run_dir, lines = tmp_path / "run", []
    common = {"project": "p", "run_name": "r", "run_dir": run_dir, "config": AWKWARD_CONFIG, "notify": lines.append}
    first = start_trackers(["wandb"], **common)
    for step in range(1, 6):
        first.log({"loss": 1 / step, "text": "no number"}, step)
    first.log_images(red_images(2), ["a red square"], 5)
    first.summary({"psnr": 30.5, "best": {"step": 3}})
    first.finish()
    time.sleep(1.1)  # W&B names its folders by the second
    second = start_trackers(["wandb"], previous_id=first.run_id, **common)
    second.log({"loss": 9.0}, 3)  # behind what was logged before: W&B drops such steps unless told otherwise
    second.finish()

    assert len(lines) == 2
    assert "no W&B key and no login" in lines[0]
    assert f"wandb sync {run_dir}" in lines[0] or "wandb sync ../" in lines[0]
    assert second.run_id == first.run_id
    assert len(list(run_dir.glob(f"wandb/offline-run-*-{first.run_id}"))) == 2
    rows = wandb_history(run_dir)
    assert [row["loss/loss"] for row in rows if "loss/loss" in row] == [1.0, 0.5, 1 / 3, 0.25, 0.2, 9.0]
    assert [row["step"] for row in rows if "loss/loss" in row] == [1, 2, 3, 4, 5, 3]
    assert all("text" not in row for row in rows)
    assert len(list(run_dir.glob("wandb/*/files/media/images/samples/*.png"))) >= 1
    metrics = [r.metric for r in wandb_records(run_dir) if r.WhichOneof("record_type") == "metric"]
    assert any(m.step_metric == "step" for m in metrics)


@pytest.mark.usefixtures("no_wandb_login")
def test_group_tags_and_entity_are_recorded_by_wandb(tmp_path):
    config = TrackerConfig(wandb_group="wide, 3 seeds", wandb_tags=["emoji", "64 px"], wandb_entity="a-team")
    common = {"project": "p", "run_name": "r", "config": {}, "notify": [].append}
    for name, options in (("set", wandb_options(vars(config))), ("unset", wandb_options(vars(TrackerConfig())))):
        start_trackers(["wandb"], run_dir=tmp_path / name, wandb=options, **common).finish()
    runs = {
        name: [r.run for r in wandb_records(tmp_path / name) if r.WhichOneof("record_type") == "run"][0]
        for name in ("set", "unset")
    }
    assert (runs["set"].run_group, list(runs["set"].tags)) == ("wide, 3 seeds", ["emoji", "64 px"])
    assert runs["set"].entity == "a-team"
    assert (runs["unset"].run_group, list(runs["unset"].tags), runs["unset"].entity) == ("", [], "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wandb_tags": ["a", "b" * 65]}, "--wandb_tags: 'b+' has 65 characters; W&B takes 1 to 64"),
        ({"wandb_tags": [""]}, "--wandb_tags: '' has 0 characters"),
        ({"wandb_group": "g" * 129}, "--wandb_group: 'g+' has 129 characters; W&B takes 1 to 128"),
    ],
)
def test_groups_and_tags_that_wandb_refuses(options, message):
    with pytest.raises(UserError, match=message):
        TrackerConfig(**options).validate()


@pytest.mark.usefixtures("no_wandb_login")
def test_wandb_with_a_key_but_no_network_goes_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing answers
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    lines = []
    trackers = start_trackers(
        ["wandb"], project="p", run_name="r", run_dir=tmp_path / "run", config={}, notify=lines.append
    )
    trackers.log({"loss": 0.25}, 1)
    trackers.finish()
    assert "could not be reached" in lines[0]
    assert wandb_history(tmp_path / "run")[0]["loss/loss"] == 0.25


@pytest.mark.usefixtures("no_wandb_login")
def test_wandb_mode_disabled_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    lines = []
    trackers = start_trackers(["wandb"], project="p", run_name="r", run_dir=tmp_path, config={}, notify=lines.append)
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert lines == []
    assert not list(tmp_path.glob("wandb/*"))


@pytest.mark.usefixtures("no_wandb_login")
def test_wandb_never_asks_even_at_a_terminal(tmp_path):
    """In a pseudo-terminal, where W&B would ask for a key: no question, and one line of output."""
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from training.reporting.tracking import start_trackers
        trackers = start_trackers(["wandb"], project="p", run_name="r", run_dir=Path(sys.argv[1]), config={})
        trackers.log({"loss": 1.0}, 1)
        trackers.finish()
        """
    )
    runner = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    done = subprocess.run(
        [sys.executable, "-c", runner, sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip("\r\n\x04\x08^D ")]
    assert done.returncode == 0, done.stdout
    assert len(lines) == 1, done.stdout
    assert "wandb sync" in lines[0]


# --- TensorBoard ---------------------------------------------------------------------------------------------------


def test_tensorboard_files_hold_metrics_images_config_and_summary(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = {"project": "p", "run_name": "r", "run_dir": tmp_path, "config": AWKWARD_CONFIG}
    first = start_trackers(["tensorboard"], **common)
    for step in range(1, 6):
        first.log({"loss": 1 / step}, step)
    first.log_images(red_images(3), ["one", "two", "three"], 5)
    first.finish()
    second = start_trackers(["tensorboard"], previous_id=first.run_id, first_step=3, **common)
    for step in range(3, 7):
        second.log({"loss": 2 / step}, step)
    second.summary({"psnr": 30.5, "note": "done", "nothing": None})
    second.finish()

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss/loss")}
    assert losses == pytest.approx({1: 1.0, 2: 0.5, 3: 2 / 3, 4: 0.5, 5: 0.4, 6: 1 / 3})
    assert len(events.Scalars("loss/loss")) == 6  # what the interrupted run wrote from step 3 on is gone
    assert [event.value for event in events.Scalars("summary/psnr")] == [30.5]
    assert "config/text_summary" in events.Tags()["tensors"]


# --- failures ------------------------------------------------------------------------------------------------------


class BrokenService:
    """A stand-in for an external service that has stopped answering."""

    name, run_id = "service", "abc"

    def __init__(self):
        self.calls = 0

    def _fail(self, *_args):
        self.calls += 1
        raise ConnectionError("gone\naway")

    log = log_images = summary = finish = _fail


def test_a_tracker_that_fails_warns_once_is_given_up_and_never_raises():
    lines: list[str] = []
    service = BrokenService()
    trackers = Trackers(notify=lines.append)
    trackers.add(service)  # type: ignore[arg-type]
    for step in range(10):
        trackers.log({"loss": math.inf}, step)
    trackers.log_images(red_images(1), [], 3)
    trackers.summary({})
    trackers.finish()
    assert len(lines) == 1
    assert "ConnectionError: gone away" in lines[0]
    assert service.calls == 3
    assert trackers.names == []


class SlowService(Backend):
    """An implementation of the interface for a service that takes its time for each call."""

    name, run_id = "service", "abc"

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.calls: list[Any] = []

    def _take(self, call: Any) -> None:
        time.sleep(self.seconds)
        self.calls.append(call)

    def log(self, metrics, step):
        self._take(step)

    def log_images(self, images, captions, step, name):
        self._take((step, len(images)))

    def summary(self, values):
        self._take(values)

    def finish(self):
        self._take("finish")


def slow_trackers(seconds: float, lines: list[str]) -> tuple[Trackers, SlowService]:
    service, trackers = SlowService(seconds), Trackers(notify=lines.append)
    trackers.add(service)
    return trackers, service


def test_a_slow_tracker_does_not_slow_down_the_steps_and_keeps_the_order():
    lines: list[str] = []
    trackers, service = slow_trackers(0.05, lines)
    started = time.monotonic()
    for step in range(40):
        trackers.log({"loss": 0.5}, step)
    trackers.log_images(red_images(2), [], 40)
    trackers.summary({"psnr": 30})
    assert time.monotonic() - started < 1.5  # the 42 calls take 2.1 s
    trackers.finish()
    assert service.calls == [*range(40), (40, 2), {"psnr": 30}, "finish"]
    assert lines == []


def test_the_end_of_a_run_waits_for_a_tracker_for_a_limited_time_or_until_a_stop():
    for limits in ({"seconds": 0.3}, {"stop_requested": lambda: True}):
        lines: list[str] = []
        trackers, service = slow_trackers(2.0, lines)
        for step in range(3):
            trackers.log({"loss": 0.5}, step)
        started = time.monotonic()
        trackers.finish(**limits)
        assert time.monotonic() - started < 1
        assert lines == ["warning: service did not answer in time; its last values may be missing"]
        assert len(service.calls) < 3


def test_values_that_a_tracker_is_too_slow_for_are_left_out_with_one_warning():
    lines: list[str] = []
    trackers, service = slow_trackers(0.002, lines)
    for step in range(MOST_WAITING + 200):
        trackers.log({"loss": 0.5}, step)
    trackers.finish()
    assert MOST_WAITING <= len(service.calls) - 1 < MOST_WAITING + 200
    assert len(lines) == 1
    assert "is too slow" in lines[0]
    assert service.calls[-1] == "finish"


def test_a_tracker_that_cannot_start_costs_one_warning(tmp_path):
    lines: list[str] = []
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder is expected")
    trackers = start_trackers(
        ["tensorboard"], project="p", run_name="r", run_dir=blocked, config={}, notify=lines.append
    )
    trackers.log({"loss": 1.0}, 1)
    assert len(lines) == 1
    assert "tensorboard could not be started" in lines[0]


def test_no_trackers_at_all(tmp_path):
    trackers = start_trackers([], project="p", run_name="r", run_dir=tmp_path, config={}, previous_id="kept")
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert trackers.run_id == "kept"


def test_importing_the_module_is_cheap():
    modules = (
        "training.reporting.tracking, training.reporting.recorder, training.core.previews, training.reporting.curves"
    )
    code = f"import sys, {modules}; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for heavy in ("wandb", "torch", "accelerate", "matplotlib", "tensorboard", "huggingface_hub"):
        assert f"'{heavy}'" not in modules

"""The benchmark: its goals, its errors, and (slow) one comparison of the loop with the bare loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipelines.tools.cli import UserError
from training.benchmarks import run as benchmarks
from training.benchmarks.run import BenchmarkConfig, Metric, describe, timed
from training.core.parsing import parse_config


@pytest.mark.parametrize(
    ("value", "goal", "at_most", "met"),
    [(0.98, 0.97, False, True), (0.96, 0.97, False, False), (2.4, 2.5, True, True), (2.6, 2.5, True, False)],
)
def test_verdicts(value: float, goal: float, at_most: bool, met: bool) -> None:
    metric = Metric("x", value, "s", goal, at_most)
    assert metric.met is met
    assert metric.line().endswith("met" if met else "MISSED")


def test_a_metric_without_a_goal_has_no_verdict() -> None:
    assert describe([Metric("x", 1.0)])["figures"] == [
        {"name": "x", "value": 1.0, "unit": "", "goal": None, "met": None}
    ]


def test_a_command_that_ends_otherwise_is_an_error() -> None:
    assert timed([sys.executable, "-c", "raise SystemExit(2)"], status=2) > 0
    with pytest.raises(UserError, match="ended with status 3: why"):
        timed([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])


def test_unknown_measurement() -> None:
    with pytest.raises(UserError, match="did you mean"):
        parse_config(BenchmarkConfig, ["--only", "[lop]"])


@pytest.mark.slow
def test_a_script_measures_in_a_process_of_its_own() -> None:
    """The smallest measurement: model and optimizer, without a training step."""
    measured = benchmarks._measured_by("captions", "--side memory --preset emoji_64 --batch_size 0 --device cpu")
    assert measured["parameters"] > 1e6
    assert measured["peak_mb"] > 4 * 4 * measured["parameters"] / 1e6  # weights, gradients and two moments


@pytest.mark.parametrize("script", ["captions", "decoder", "loops"])
def test_every_part_of_the_benchmark_is_a_script(script) -> None:
    assert f'_measured_by("{script}", ' in Path(benchmarks.__file__).read_text(encoding="utf-8")
    assert Path(benchmarks.__file__).with_name(f"{script}.py").is_file()


@pytest.mark.slow
def test_loop_against_bare_loop(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    words = [
        "--only",
        "[loop]",
        "--pairs",
        "1",
        "--steps",
        "10",
        "--threads",
        "1",
        "--work_dir",
        str(tmp_path / "work"),
    ]
    benchmarks.main([*words, "--output", str(output)])
    metrics = {f["name"]: f["value"] for f in json.loads(output.read_text())["figures"]}
    # After only ten steps, the metrics are present and plausible; `make bench` compares them with the goals.
    assert 0.5 < metrics["speed over the bare loop, by turns in one process"] < 2
    assert 0.3 < metrics["speed over the bare loop, whole processes"] < 3
    assert 0 < metrics["peak memory above the bare loop's, training steps"] < 1000

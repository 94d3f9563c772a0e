"""The benchmark: its goals, its errors, the page that it writes, and (slow) all of its parts with tiny networks."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipelines.common.latents import latent_shape
from pipelines.tools.cli import UserError
from tests.conftest import forget_accelerate
from tests.support.runs import ROOT
from tests.support.tiny_models import tiny_pipeline
from training import train_latent_diffusion
from training.benchmarks import extras, inputs, page, run, sampling, scale
from training.benchmarks.children import in_child, measured_by, peak_mb, timed
from training.benchmarks.inputs import BenchmarkConfig, Inputs
from training.benchmarks.launched import measure_start_of_run
from training.benchmarks.page import SUMMARY, page_text, read_machines, summary_table, update_page
from training.benchmarks.results import LOOP_RATIO, LOOP_SPEED, Metric, in_turns, ratio, short, spread
from training.core.draws import SampleKey
from training.core.parsing import parse_config
from training.data.latent_cache.check import check_cache
from training.data.latent_cache.dataset import LatentCache
from training.data.latent_cache.format import read_shard
from training.models.vae_loading import load_vae

MACHINE = {
    "processor": "Processor One",
    "cores": 2,
    "threads": 2,
    "instructions": ["AVX-512"],
    "memory_gb": 16.0,
    "gpu": None,
    "system": "Linux x86_64",
    "versions": {"python": "3.11.0", "torch": "2.9.0"},
}


@pytest.mark.parametrize(
    ("value", "goal", "at_most", "met"),
    [(0.98, 0.97, False, True), (0.96, 0.97, False, False), (2.4, 2.5, True, True), (2.6, 2.5, True, False)],
)
def test_verdicts(value: float, goal: float, at_most: bool, met: bool) -> None:
    metric = Metric("x", value, "s", goal, at_most)
    assert metric.met is met
    assert metric.line().endswith("met" if met else "MISSED")


def test_a_metric_without_a_goal_has_no_verdict() -> None:
    metric = Metric("x", 1.0)
    assert metric.met is None
    assert metric.line().split() == ["x", "1.00"]


def test_medians_have_their_quartiles() -> None:
    metric = spread("x", [5.0, 1.0, 2.0, 4.0, 3.0], "s")
    assert (metric.low, metric.value, metric.high) == (2.0, 3.0, 4.0)
    assert (spread("x", [7.0]).value, spread("x", [7.0]).low, spread("x", [7.0]).high) == (7.0, None, None)


def test_a_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    assert ratio("x", [2.0, 30.0, 8.0], [1.0, 10.0, 2.0]).value == 3.0


def test_sides_alternate() -> None:
    order: list[str] = []
    seconds = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, turns=2)
    assert order == ["a", "b"] * 3  # the first turn is warm-up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12,346"), (45.67, "45.7"), (1.234, "1.23"), (0.0123456, "0.0123")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_a_command_that_ends_otherwise_is_an_error() -> None:
    assert timed([sys.executable, "-c", "raise SystemExit(2)"], status=2) > 0
    with pytest.raises(UserError, match="ended with status 3: why"):
        timed([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])


def test_a_killed_measurement_is_an_error() -> None:
    with pytest.raises(UserError, match="_exit was killed; free memory"):
        in_child(False, os._exit, 9)


def test_a_measurement_starts_loader_workers_as_training_does() -> None:
    """A process that multiprocessing has spawned would spawn its own processes as well, which takes seconds."""
    assert in_child(False, multiprocessing.get_start_method) == multiprocessing.get_start_method()


def test_peak_memory_grows_with_what_a_process_keeps() -> None:
    before = peak_mb()
    kept = torch.ones(int((before + 150) * 1e6 / 4))  # more than what earlier work took and freed
    assert peak_mb() - before > 100
    del kept


def test_unknown_measurement() -> None:
    with pytest.raises(UserError, match="did you mean"):
        parse_config(BenchmarkConfig, ["--only", "[lop]"])


def test_every_part_has_a_function_and_a_title() -> None:
    assert set(run.MEASUREMENTS) == set(inputs.PARTS) == set(page.TITLES)
    for name in run.MEASUREMENTS.values():
        module, function = name.split(".")
        assert callable(getattr(importlib.import_module(f"training.benchmarks.{module}"), function))


@pytest.mark.parametrize("script", ["captions", "decoder"])
def test_the_other_scripts_of_the_benchmark_exist(script: str) -> None:
    assert f'measured_by("{script}", ' in Path(extras.__file__).read_text(encoding="utf-8")
    assert Path(extras.__file__).with_name(f"{script}.py").is_file()


def test_a_quick_run_does_not_replace_the_results() -> None:
    assert parse_config(BenchmarkConfig, []).page == Path("docs/benchmarks.md")
    quick = parse_config(BenchmarkConfig, ["--quick", "true"])
    assert quick.page.parts[0] == "runs"
    assert quick.work != parse_config(BenchmarkConfig, []).work


def test_a_run_keeps_other_machines_and_replaces_its_own_parts(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    other = {**MACHINE, "processor": "Processor Two", "gpu": "GPU Two"}
    update_page(file, MACHINE, {"loop": [Metric(LOOP_RATIO, 0.5, goal=0.97)], "start": [Metric("import", 2.0, "s")]})
    update_page(file, other, {"loop": [Metric(LOOP_RATIO, 0.99, goal=0.97)]})
    update_page(file, MACHINE, {"loop": [Metric(LOOP_RATIO, 0.98, goal=0.97, low=0.97, high=0.99)]})
    text = file.read_text(encoding="utf-8")
    assert [line.split(" |")[:3] for line in text.splitlines() if line.startswith("| Processor One")] == [
        ["| Processor One, 2 cores, 2 threads", " ", " 0.98"]
    ]
    assert text.count("GPU Two, Processor Two, 2 cores, 2 threads |") == 1
    assert "| 0.98 | 0.97 to 0.99 |  | ≥ 0.97 | met |" in text
    assert "| import | 2.00 |  | s |" in text
    assert "0.50" not in text
    assert page_text(read_machines(file.with_suffix(".json"))) == text


def test_the_page_in_the_repository_is_made_from_its_results() -> None:
    written = ROOT / parse_config(BenchmarkConfig, []).page
    assert written.read_text(encoding="utf-8") == page_text(read_machines(written.with_suffix(".json")))


def test_another_number_of_threads_is_a_row_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    for threads in (1, 2):
        update_page(file, {**MACHINE, "threads": threads}, {"loop": [Metric(LOOP_SPEED, 10.0 * threads)]})
    update_page(file, {**MACHINE, "threads": 4}, {"scale": [Metric("in no column of the table", 1.0)]})
    rows = summary_table(read_machines(file.with_suffix(".json"))).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| Processor One, 2 cores, 1 thread", "10.0"],
        ["| Processor One, 2 cores, 2 threads", "20.0"],
    ]


@pytest.mark.parametrize("content", ["", "[]", '{"machines": [{"parts": {}}]}', '{"machines": 3}'])
def test_damaged_results_are_reported_before_anything_is_measured(tmp_path: Path, content: str) -> None:
    (tmp_path / "page.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="page.json is damaged"):
        run.main(["--quick", "true", "--output", str(tmp_path / "page.md"), "--work_dir", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


def save_flow_model(folder: Path) -> Any:
    pipeline = tiny_pipeline("flow_prediction", patch_size=2)
    channels = pipeline.vae.config.latent_channels
    pipeline.vae.register_to_config(latents_mean=[0.1] * channels, latents_std=[0.5] * channels)
    pipeline.save_pretrained(folder)
    return pipeline


def test_pipeline_and_plain_loop_generate_the_same_images(tmp_path: Path) -> None:
    save_flow_model(tmp_path)
    measured = sampling.compare_with_plain_loop(str(tmp_path), threads=1, steps=3, turns=2)
    assert measured["difference"][0] <= sampling.TOLERANCE
    assert len(measured["pipeline"]) == len(measured["plain"]) == 2


def test_different_images_are_not_compared(tmp_path: Path) -> None:
    """A scheduler whose steps differ from those of the plain loop."""
    pipeline = save_flow_model(tmp_path)
    pipeline.set_scheduler("heun")
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="differ by .*more than 0.0001"):
        sampling.compare_with_plain_loop(str(tmp_path), threads=1, steps=3, turns=2)


def test_a_large_cache_is_one_of_the_trainer(tmp_path: Path) -> None:
    vae = str(tmp_path / "vae")
    scale.make_latent_cache(str(tmp_path / "latents"), vae, 2 * scale.SHARD_ROWS + 1)
    cache = LatentCache(tmp_path / "latents")
    config = train_latent_diffusion.Config(vae=vae, resolution=scale.LATENT_PIXELS, condition_on=["label"])
    check_cache(cache, load_vae(vae), vae, config)
    assert latent_shape(load_vae(vae), scale.LATENT_PIXELS, scale.LATENT_PIXELS) == cache.latent_shape == (4, 4, 4)
    data = cache.split("train")
    assert len(data) == 1025
    assert len(cache.manifest["splits"]["train"]["shards"]) == 3
    rows = [data[SampleKey(row, 0)] for row in (0, 511, 512, 1024)]
    assert [row["label"] for row in rows] == [0, 11, 12, 24]
    assert [row["caption"].split(",")[0] for row in rows][-1] == "image 1024 of class 24"
    assert len({row["mean"].sum().item() for row in rows}) == 4


def test_image_files_are_all_different(tmp_path: Path) -> None:
    scale.make_image_files(str(tmp_path / "images"), 250)
    files = sorted((tmp_path / "images").glob("*/*.png"))
    assert len(files) == len({file.read_bytes() for file in files}) == 250
    assert len({file.parent for file in files}) == scale.IMAGE_FOLDERS
    with Image.open(files[-1]) as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")


@pytest.mark.slow
def test_a_run_that_does_not_begin_is_an_error(tmp_path: Path) -> None:
    words = ["--condition_on", "[]", "--vae", "pixels", "--latent_cache", str(tmp_path / "missing")]
    with pytest.raises(UserError, match=r"(?s)the first step was not reached by: .*the latent cache .* does not exist"):
        measure_start_of_run(words)


@pytest.mark.slow
def test_a_script_measures_in_a_process_of_its_own() -> None:
    """The smallest measurement: model and optimizer, without a training step."""
    measured = measured_by("captions", "--side memory --preset emoji_64 --batch_size 0 --device cpu")
    assert measured["parameters"] > 1e6
    assert measured["peak_mb"] > 4 * 4 * measured["parameters"] / 1e6  # weights, gradients and two moments


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of `make bench` with tiny networks, beside which the page is."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["--quick", "true", "--threads", "1", "--work_dir", str(folder / "work")]
    run.main([*words, "--output", str(folder / "benchmarks.md")])
    return folder


@pytest.mark.slow
def test_everything_is_measured(quick: Path) -> None:
    (one,) = json.loads((quick / "benchmarks.json").read_text(encoding="utf-8"))["machines"]
    assert list(one["parts"]) == list(inputs.DEFAULT_PARTS)
    metrics = {metric["name"]: metric["value"] for part in one["parts"].values() for metric in part}
    assert set(SUMMARY.values()) <= set(metrics)
    assert all(value > 0 for name, value in metrics.items() if not name.startswith(("largest", "peak", "CPU time")))
    assert metrics["largest difference of the images"] <= sampling.TOLERANCE
    # After a few steps, the metrics are present and plausible; `make bench` compares them with the goals.
    assert 0.3 < metrics[LOOP_RATIO] < 2
    assert abs(metrics["peak memory above the bare loop's, training steps"]) < 1000
    assert 200 < metrics["sampling with guidance, 8 images: peak memory"] < 3000


@pytest.mark.slow
def test_the_page_names_neither_folders_nor_the_machine(quick: Path) -> None:
    text = (quick / "benchmarks.md").read_text(encoding="utf-8")
    for private in (str(quick), str(Path.home()), os.uname().nodename):
        assert private not in text


@pytest.mark.slow
def test_the_quality_of_samplers_is_measured_with_a_trained_model(quick: Path) -> None:
    made = Inputs(quick / "work")
    forget_accelerate()
    words = ["--config", str(made.recipe), "--output_dir", str(quick / "run"), "--max_train_steps", "2"]
    assert train_latent_diffusion.main(words) == 0
    forget_accelerate()
    words = ["--quick", "true", "--threads", "1", "--work_dir", str(made.folder), "--only", "[sampling]"]
    run.main([*words, "--model", str(quick / "run"), "--num_images", "8", "--output", str(quick / "kid.md")])
    (one,) = read_machines(quick / "kid.json")
    names = [metric["name"] for metric in one["parts"]["sampling"]]
    assert [name.split(" ±")[0] for name in names if "KID" in name] == ["euler, 25 steps: KID", "heun, 25 steps: KID"]


@pytest.mark.slow
def test_large_data_are_measured_and_made_once(quick: Path) -> None:
    words = ["--quick", "true", "--threads", "1", "--work_dir", str(quick / "work"), "--only", "[scale]"]
    run.main([*words, "--output", str(quick / "scale.md")])
    (one,) = read_machines(quick / "scale.json")
    metrics = {metric["name"]: metric for metric in one["parts"]["scale"]}
    goals = {name: metric["goal"] for name, metric in metrics.items() if metric["goal"]}
    assert list(goals.values()) == [15, 200, 60, 20]
    assert list(goals)[1] == "peak memory with 1,200 above that with 600"
    assert all(metric["value"] > 0 for name, metric in metrics.items() if not name.startswith("peak memory with"))
    assert 200 < metrics["1,200 cached latents: peak memory of 4 steps"]["value"] < 3000
    assert sorted(path.name for path in (quick / "work").glob("*_[0-9]*")) == [
        "images_200",
        "latents_1200",
        "latents_600",
    ]


@pytest.mark.slow
def test_a_large_cache_has_the_entries_of_one_with_encoded_images(quick: Path, tmp_path: Path) -> None:
    scale.make_latent_cache(str(tmp_path / "latents"), str(tmp_path / "vae"), 4)
    caches = [LatentCache(folder) for folder in (tmp_path / "latents", Inputs(quick / "work").latents)]
    synthetic, encoded = (cache.manifest for cache in caches)
    assert synthetic.keys() == encoded.keys()
    assert synthetic["splits"]["train"].keys() == encoded["splits"]["train"].keys()
    assert synthetic["splits"]["train"]["shards"][0].keys() == encoded["splits"]["train"]["shards"][0].keys()
    shards = [read_shard(cache.path / "train/shard-00000.safetensors") for cache in caches]
    shapes = [{name: tensor.ndim for name, tensor in shard.items()} for shard in shards]
    assert shapes[0] == shapes[1]
    # Latents have the type that --storage_dtype names, which is float32 for the posters.
    types = [{name: tensor.dtype for name, tensor in shard.items()} for shard in shards]
    assert {name for name in types[0] if types[0][name] != types[1][name]} == {"mean", "logvar"}

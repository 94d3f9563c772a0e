"""training/innovate.py as users start it, with tiny models: a search, its files, resuming, exports and user errors."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.common.design_brief import DesignBrief
from pipelines.common.poster_domain import GRAMMAR
from pipelines.tools.cli import UserError
from tests.conftest import forget_accelerate
from tests.scripts.test_bad_input import refusal
from tests.scripts.test_train_decoder import TINY as TINY_DECODER
from tests.support.runs import ROOT, command, environment, launch
from tests.support.tiny_published import PUBLISHED
from training import innovate, train_decoder

SCRIPT = ROOT / "training/innovate.py"
SMALL = ("--emitter", "cma_me", "--batch_size", "8", "--num_inference_steps", "2", "--noises", "4", "--cells", "20")
FORTY = ("--evaluations", "40")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A decoder and a reader; their weights are larger than new ones, so that posters and readings differ."""
    folder = tmp_path_factory.mktemp("models")
    for name, modules in (("poster_decoder", ["unet"]), ("layout_analysis", ["encoder", "abstractor"])):
        pipeline = PUBLISHED[name]()
        torch.manual_seed(1)
        for parameter in [p for module in modules for p in getattr(pipeline, module).parameters() if p.ndim > 1]:
            parameter.data += 0.2 * torch.randn_like(parameter)
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def flags(models, posters) -> tuple[str, ...]:
    data = ("--dataset_name", str(posters))
    return ("--model", str(models / "poster_decoder"), "--reader", str(models / "layout_analysis"), *data, *SMALL)


@pytest.fixture(scope="module")
def launched(flags, tmp_path_factory) -> Path:
    """The search of forty posters that the other ones are compared with."""
    folder = tmp_path_factory.mktemp("launched") / "search"
    done = launch(SCRIPT, *flags, *FORTY, "--output_dir", str(folder), cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "40 posters" in done.stdout
    return folder


def search(folder: Path, flags, *more: str) -> int:
    return innovate.main([*flags, "--output_dir", str(folder), *more])


def progress(folder: Path) -> list[dict[str, str]]:
    with open(folder / "progress.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a search but its config, in which the folder is named."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("config.yaml", ".lock")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_folder_of_a_search_is_complete(launched):
    batches = {f"batches/{number:06d}.npz" for number in range(5)}
    images = {"archive.png", "wall.png"}
    assert set(contents(launched)) == batches | images | {"search.json", "progress.csv", "archive.json"}
    for name in images:
        with Image.open(launched / name) as image:
            assert min(image.size) > 100
    rows = progress(launched)
    assert [int(row["evaluations"]) for row in rows] == [8, 16, 24, 32, 40]
    assert all(float(row["qd_score"]) <= 400 * float(row["coverage"]) + 1e-9 for row in rows)
    scores = [float(row["qd_score"]) for row in rows]
    assert scores == sorted(scores)
    assert scores[0] > 0


def test_the_archive_is_the_best_of_what_was_recorded(launched):
    archive = json.loads((launched / "archive.json").read_text())
    batches = [np.load(launched / f"batches/{number:06d}.npz") for number in range(5)]
    quality = np.concatenate([batch["quality"] for batch in batches])
    measures = np.concatenate([batch["measures"] for batch in batches])
    cells = np.clip((measures * 20 + 1e-6).astype(int), 0, 19)
    assert len({poster["evaluation"] for poster in archive["posters"]}) == len(archive["posters"]) > 1
    for poster in archive["posters"]:
        same = (cells == poster["cell"]).all(1)
        assert same[poster["evaluation"]]
        assert poster["quality"] == quality[same].max()
        assert DesignBrief.from_mapping(poster["brief"]).to_dict() == poster["brief"]
    assert archive["coverage"] == len(archive["posters"]) / 400
    assert archive["qd_score"] == pytest.approx(sum(poster["quality"] for poster in archive["posters"]))
    parts = np.concatenate([batch["obedience"] * batch["layout"] for batch in batches])
    copied = np.concatenate([batch["is_copy"] for batch in batches])
    assert np.allclose(quality, np.where(copied, 0, np.sqrt(parts)))


@pytest.mark.parametrize("emitter", ["cma_me", "gaussian", "random"])
def test_a_search_in_three_sessions_is_the_same_as_in_one(flags, tmp_path, emitter):
    words = ("--emitter", emitter)
    assert search(tmp_path / "one", flags, *words, *FORTY) == 0
    for evaluations in ("16", "24", "40"):
        assert search(tmp_path / "three", flags, *words, "--evaluations", evaluations) == 0
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def stopped(folder: Path, flags, number: int) -> subprocess.CompletedProcess:
    """Start a search, send it a signal after its second batch, and return how it ended."""
    words = command(SCRIPT, *flags, "--output_dir", str(folder), "--evaluations", "4000")
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 400
    try:
        while len(list(folder.glob("batches/*.npz"))) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=150)
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)],
    ids=["kill", "term", "int"],
)
def test_a_search_that_is_killed_or_stopped_resumes_as_if_undisturbed(launched, flags, tmp_path, number, status):
    done = stopped(tmp_path / "search", flags, number)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    if status > 0:
        assert "run the same command again to resume" in done.stdout
    batches = len(list((tmp_path / "search/batches").glob("*.npz")))
    assert 2 <= batches < 500
    assert search(tmp_path / "search", flags, "--evaluations", str(8 * max(batches, 5))) == 0
    both = contents(tmp_path / "search"), contents(launched)
    assert all(both[0][name] == content for name, content in both[1].items() if name.startswith("batches/"))
    assert progress(tmp_path / "search")[:5] == progress(launched)


def test_a_time_budget_ends_a_session_with_its_results(flags, tmp_path, capsys):
    assert search(tmp_path / "search", flags, "--evaluations", "100000", "--time_budget", "1s") == 0
    assert "the time budget is used; run the same command again" in capsys.readouterr().out
    assert len(progress(tmp_path / "search")) < 1000
    assert (tmp_path / "search/wall.png").is_file()


def test_measures_may_be_four_and_of_the_brief(flags, tmp_path):
    words = ("--measures", "energy,density,warmth,rhythm", "--cells", "4", "--evaluations", "16")
    assert search(tmp_path / "search", flags, *words) == 0
    for poster in json.loads((tmp_path / "search/archive.json").read_text())["posters"]:
        assert poster["measures"][::2] == [poster["brief"]["energy"], poster["brief"]["warmth"]]
        assert len(poster["cell"]) == 4


def test_a_copy_of_a_training_poster_has_no_quality_and_is_not_in_the_archive(posters):
    """Here the copies are training posters themselves."""
    import datasets

    from training.innovation.originality import CopyTest
    from training.metrics.neighbours import thumbnails

    real = list(datasets.load_dataset(str(posters), split="train")["image"])
    test = CopyTest(thumbnails(real), thumbnails(real), torch.arange(len(real)))
    ratios = test([real[3], real[5].transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.new("RGB", (64, 64), "blue")])
    assert (ratios < test.threshold).tolist() == [True, True, False]


def test_a_dry_run_says_what_the_search_will_be_and_writes_nothing(flags, tmp_path, capsys):
    assert search(tmp_path / "search", flags, "--dry_run", "--brief", "swiss") == 0
    said = capsys.readouterr().out
    assert "archive of 400 cells over balance, density" in said
    assert "125 batches take about" in said
    assert f"9 dimensions: {', '.join(GRAMMAR)}, noise" in said  # the file gives all other fields
    assert not (tmp_path / "search").exists()


def test_a_comparison_has_a_random_search_for_each_seed(flags, tmp_path, capsys):
    words = ("--compare", "--emitter", "cma_me", "--num_seeds", "2", "--evaluations", "16")
    assert search(tmp_path / "all", flags, *words) == 0
    names = {path.name for path in (tmp_path / "all").iterdir()}
    searches = {f"{emitter}_seed_{seed}" for emitter in ("cma_me", "random") for seed in (0, 1)}
    assert names == searches | {"comparison.png", "comparison.json"}
    last = json.loads((tmp_path / "all/comparison.json").read_text())
    assert {name: [row["evaluations"] for row in rows] for name, rows in last.items()} == {
        "cma_me": [16, 16],
        "random": [16, 16],
    }
    assert len({tuple(row.items()) for rows in last.values() for row in rows}) == 4
    before = contents(tmp_path / "all")
    assert search(tmp_path / "all", flags, *words) == 0
    assert contents(tmp_path / "all") == before
    assert "random    16 posters, 2 seeds" in capsys.readouterr().out


def test_a_decoder_trains_on_the_exported_posters(launched, flags, tmp_path):
    folder = tmp_path / "best"
    words = (*FORTY, "--export", "top:12", "--export_dir", str(folder))
    assert search(launched, flags, *words) == 0
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    archive = json.loads((launched / "archive.json").read_text())["posters"]
    assert [row["index"] for row in rows] == [poster["evaluation"] for poster in archive[:12]]
    with np.load(launched / f"batches/{rows[0]['index'] // 8:06d}.npz") as batch:
        place = rows[0]["index"] % 8
        assert np.array_equal(batch["posters"][place], np.asarray(Image.open(folder / rows[0]["file_name"])))
        assert [rows[0][name] for name in GRAMMAR] == pytest.approx(batch["grammar"][place], abs=1e-4)
        assert [rows[0]["text_blocks"], rows[0]["pictures"]] == batch["counts"][place].tolist()
    assert all(row["style"] == poster["brief"]["style"] for row, poster in zip(rows, archive))
    forget_accelerate()
    data = ("--dataset_name", str(folder), "--train_batch_size", "2", "--max_train_steps", "2")
    assert train_decoder.main([*TINY_DECODER, *data, "--output_dir", str(tmp_path / "again")]) == 0
    assert search(launched, flags, *words) == 0  # replaces its own export
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no exported posters"):
        search(launched, flags, *words[:-1], str(tmp_path / "other"))


def test_the_default_models_are_made_if_they_are_missing(tmp_path, monkeypatch, capsys):
    """The default paths have a recipe, which a dry run only names; a path that a user gives has none."""
    monkeypatch.chdir(tmp_path)
    assert innovate.main(["--dry_run"]) == 0
    said = capsys.readouterr().out
    for path, command_line in innovate.RECIPES.items():
        assert f"  {path}\n" in said
        assert command_line in said
        assert (ROOT / command_line.split()[-1]).is_file()
        assert f"output_dir: {path.removesuffix('/pipeline')}\n" in (ROOT / command_line.split()[-1]).read_text()
    assert not list(tmp_path.iterdir())
    assert innovate.Config(model="runs/mine", reader="runs/other").recipes() == {}


@pytest.mark.slow
def test_a_missing_model_is_made_and_then_used(models, posters, tmp_path, monkeypatch):
    """A recipe that trains a decoder for one step, in the place of the default one."""
    monkeypatch.chdir(tmp_path)
    words = (*TINY_DECODER, "--dataset_name", str(posters), "--max_train_steps", "1", "--preview_epochs", "0")
    made = " ".join(["training/train_decoder.py", *words, "--validation_epochs", "0", "--output_dir", "runs/decoder"])
    given = ("--model", "runs/decoder", "--reader", str(models / "layout_analysis"), "--evaluations", "8", *SMALL)
    recipes = json.dumps({"runs/decoder/pipeline": made})
    assert innovate.main([*given, "--prepare", recipes, "--output_dir", "search"]) == 0
    assert (tmp_path / "runs/decoder/record.json").is_file()
    assert (tmp_path / "search/archive.png").is_file()


MISTAKES = {
    "no free field": (["--fields", "none"], "the search has no free field: --fields is none"),
    "all fields fixed": (["--fields", "style", "--brief", "swiss"], "the search has no free field"),
    "an unknown field": (["--fields", "styl"], "did you mean 'style'"),
    "unknown measures": (["--measures", "balance,densty"], "'densty' is unknown; did you mean 'density'"),
    "one measure": (["--measures", "balance"], "two to four different names"),
    "a measure that is fixed": (["--measures", "energy,density", "--brief", "swiss"], "the same for all posters"),
    "an unknown emitter": (["--emitter", "cma"], "choose from cma_me, gaussian, random"),
    "a wrong export": (["--export", "best"], "it must be top:N"),
    "a wrong time": (["--time_budget", "soon"], "it must be a time such as 30m"),
    "tiny batches": (["--batch_size", "7"], "fewer than 4 posters"),
    "a comparison of the baseline with itself": (["--compare", "--emitter", "random"], "leave out --emitter random"),
    "a brief that does not exist": (["--brief", "nowhere.yaml"], "nowhere.yaml"),
    "no decoder": (["--model", "READER"], "is a LayoutAnalysisPipeline; give a run of train_decoder.py"),
    "no reader": (["--reader", "DECODER"], "cannot read posters"),
    "no such model": (["--model", "nowhere/at/all"], "found no pipeline"),
    "no posters": (["--dataset_name", "NOWHERE"], "does not exist"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_with_one_message(mistake, flags, models, tmp_path, capfd):
    words, message = MISTAKES[mistake]
    places = {"READER": models / "layout_analysis", "DECODER": models / "poster_decoder", "NOWHERE": tmp_path / "x.png"}
    given = [str(places.get(word, word)) for word in words]
    assert message in refusal(innovate, [*flags, "--output_dir", str(tmp_path / "search"), *given], capfd)
    assert not (tmp_path / "search").exists()


def test_an_archive_of_another_model_or_other_settings_is_refused(launched, flags, models, tmp_path, capfd):
    words = [*flags, *FORTY, "--output_dir", str(launched)]
    before = contents(launched)
    for name, module, said in (
        ("poster_decoder", "unet", "another decoder (--model)"),
        ("layout_analysis", "abstractor", "another reader (--reader)"),
    ):
        pipeline = PUBLISHED[name]()
        next(getattr(pipeline, module).parameters()).data += 0.01
        pipeline.save_pretrained(tmp_path / name)
        flag = "--model" if name == "poster_decoder" else "--reader"
        assert said in refusal(innovate, [*words, flag, str(tmp_path / name)], capfd)
    for other, said in (
        (("--check_copies", "false"), "other training posters"),
        (("--fields", "style,energy"), "another space of briefs"),
        (("--measures", "rhythm,density"), "--measures: ['balance', 'density'] → ['rhythm', 'density']"),
        (("--num_inference_steps", "3"), "--num_inference_steps: 2 → 3"),
        (("--seed", "1"), "--seed: 0 → 1"),
    ):
        assert said in refusal(innovate, [*words, *other], capfd)
    assert contents(launched) == before


def test_the_same_models_at_another_path_are_accepted(launched, flags, models, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(models)
    before = contents(launched)
    words = ("--model", str(moved / "poster_decoder"), "--reader", str(moved / "layout_analysis"))
    assert search(launched, flags, *FORTY, *words) == 0
    assert contents(launched) == before


def test_other_folders_and_damaged_records_are_refused(flags, tmp_path, capfd):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    words = [*flags, "--evaluations", "16", "--output_dir"]
    assert "is not empty and has no search in it" in refusal(innovate, [*words, str(tmp_path / "other")], capfd)
    assert search(tmp_path / "search", flags, "--evaluations", "16") == 0
    (tmp_path / "search/batches/000001.npz").write_bytes(b"half a file")
    assert "is missing or damaged" in refusal(innovate, [*words, str(tmp_path / "search")], capfd)
    (tmp_path / "search/search.json").unlink()
    assert "it is not a search" in refusal(innovate, [*words, str(tmp_path / "search")], capfd)
    assert search(tmp_path / "search", flags, "--evaluations", "16", "--overwrite") == 0
    assert list(tmp_path.glob("search.old-*"))

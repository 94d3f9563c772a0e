"""Tests of make_posters.py: equal bytes from any number of processes, a folder that loads, and correct rows."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from data_scripts.make_posters import MakePostersConfig, main
from data_scripts.posters.brief import CHARACTERS, PRIMARIES_ON
from data_scripts.posters.captions import PICTURE_WORDS, TITLE_WORDS
from data_scripts.posters.dataset import split_indices
from data_scripts.posters.grammar import design_grammar
from data_scripts.posters.layout import GRAMMARS
from data_scripts.posters.painting.lettering import font_path
from data_scripts.posters.painting.motifs import MOTIFS
from data_scripts.posters.records import COLUMNS, PosterOptions, make_row
from pipelines.common.poster_domain import (
    COLOR_ROLES,
    COLORS,
    GRAMMAR,
    STYLES,
    color_distance,
    nearest_color_name,
    rgb_color,
    style_words,
)
from pipelines.tools.cli import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "data_scripts" / "make_posters.py"


def image_array(row: dict, name: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row[name]["bytes"])))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def arguments(folder: Path, **changes: object) -> list[str]:
    options = {"num_posters": 40, "validation_fraction": 0.1, "test_fraction": 0.1, "num_workers": 1} | changes
    return ["--output_dir", str(folder)] + [
        word for name, value in options.items() for word in (f"--{name}", str(value))
    ]


@pytest.fixture(scope="module")
def plain_rows() -> list[dict]:
    return [make_row(PosterOptions(seed=3, resolution=64, complexity="plain"), index) for index in range(120)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("posters") / "made"
    assert main(arguments(path)) == 0
    return path


def test_colors_are_far_enough_apart_to_be_named() -> None:
    for (first, a), (second, b) in itertools.combinations(COLORS.items(), 2):
        assert color_distance(np.array(a), np.array(b)) > 80, (first, second)
    assert nearest_color_name((215, 40, 50)) == "red"
    assert nearest_color_name((215, 40, 50), ["blue", "cream"]) == "blue"


def test_each_style_has_a_character_a_grammar_and_motifs() -> None:
    assert set(CHARACTERS) == set(GRAMMARS) == set(STYLES)
    assert sorted(motif for character in CHARACTERS.values() for motif in character.motifs) == sorted(MOTIFS)
    assert set(PRIMARIES_ON) == set(COLORS)


def test_fonts_come_with_matplotlib() -> None:
    for grammar in GRAMMARS.values():
        assert font_path(grammar.font).is_relative_to(matplotlib.get_data_path())


@pytest.mark.parametrize("complexity", ["plain", "standard", pytest.param("rich", marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, complexity: str) -> None:
    for workers in (1, 3):
        main(arguments(tmp_path / str(workers), num_workers=workers, complexity=complexity))
    main(arguments(tmp_path / "other", seed=1, complexity=complexity))
    assert digests(tmp_path / "1") == digests(tmp_path / "3")
    train = "data/train-00000-of-00001.parquet"
    assert digests(tmp_path / "1")[train] != digests(tmp_path / "other")[train]


def test_folder_loads_with_splits_and_features(folder: Path, tmp_path: Path) -> None:
    import datasets

    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 32, "validation": 4, "test": 4}
    features = loaded["train"].features
    assert features["label"].names == list(STYLES)
    row = loaded["test"][0]
    assert row["image"].mode == "RGB"
    assert row["image"].size == row["hierarchy"].size == (64, 64)
    assert row["style"] == features["label"].int2str(row["label"])
    assert {kind["kind"] for kind in row["elements"]} >= {"title"}
    indices = sorted(index for rows in loaded.values() for index in rows["index"])
    assert indices == list(range(40))
    for row in loaded["train"]:
        assert {name: np.float32(value) for name, value in design_grammar(row["elements"]).items()} == {
            name: np.float32(row[name]) for name in GRAMMAR
        }
    assert {features[name].dtype for name in GRAMMAR} == {"float32"}


def test_folder_has_a_contact_sheet_and_a_card(folder: Path) -> None:
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 1000
    card = (folder / "README.md").read_text()
    assert "split: validation" in card
    assert "| `color_role` | class ids: 0 background" in card
    assert "| F_Tensor |" in card
    assert "F_Tensor" not in card.partition("| column |")[0], "internal names are explained after the table"


@pytest.mark.parametrize("complexity", ["plain", "standard", "rich"])
def test_grammar_can_be_recomputed_from_the_row(complexity: str) -> None:
    values = []
    for index in range(40):
        row = make_row(PosterOptions(1, 64, complexity), index)
        assert set(row) == set(COLUMNS)
        grammar = design_grammar(row["elements"])
        assert tuple(grammar) == GRAMMAR
        assert grammar == {name: row[name] for name in GRAMMAR}
        values.append(list(grammar.values()))
    # Every measure differs between posters.
    assert (np.std(values, axis=0) > 0.01).all()


def test_caption_names_what_is_measured(plain_rows: list[dict]) -> None:
    for row in plain_rows:
        main_colors = row["palette_names"][1:-1]
        expected = [style_words(row["style"]), f"on {row['background']}", " and ".join(main_colors), row["motif"]]
        expected += [PICTURE_WORDS[row["pictures"]], TITLE_WORDS[row["title_position"]]]
        assert all(words in row["text"] for words in expected), row["text"]
    assert len({row["text"] for row in plain_rows}) > 110
    assert {row["style"] for row in plain_rows} == set(STYLES)


def test_palette_is_what_is_drawn(plain_rows: list[dict]) -> None:
    for row in plain_rows:
        assert [nearest_color_name(rgb_color(code)) for code in row["palette"]] == row["palette_names"]
        assert len(set(row["palette"])) == len(row["palette"]) <= 5
        outside = image_array(row, "image")[image_array(row, "image_mask") == 0].reshape(-1, 3)
        colors, counts = np.unique(outside, axis=0, return_counts=True)
        assert tuple(int(value) for value in colors[counts.argmax()]) == COLORS[row["background"]]
        exact = (outside[:, None] == np.array([rgb_color(code) for code in row["palette"]])).all(-1).any(-1)
        assert exact.mean() > 0.7  # the rest are edges


@pytest.mark.parametrize("resolution", [64, 128, 256])
@pytest.mark.parametrize("complexity", ["plain", "standard", "rich"])
def test_feature_maps_agree_with_the_elements(resolution: int, complexity: str) -> None:
    for index in range(12):
        row = make_row(PosterOptions(3, resolution, complexity), index)
        kinds = [element["kind"] for element in row["elements"]]
        assert kinds.count("picture") == row["pictures"]
        assert kinds.count("text") + kinds.count("title") == row["text_blocks"]
        expected = np.zeros((resolution, resolution), dtype=np.uint8)
        for element in row["elements"]:
            x0, y0, x1, y1 = (round(element[name] * resolution) for name in ("x0", "y0", "x1", "y1"))
            assert 0 <= x0 < x1 <= resolution
            assert 0 <= y0 < y1 <= resolution
            if element["kind"] == "picture":
                expected[y0:y1, x0:x1] = 255
            if element["kind"] == "title":
                upright = complexity != "rich"  # a rotated title does not fill its box
                assert (image_array(row, "text_mask")[y0:y1, x0:x1] == 255).mean() > (0.999 if upright else 0.4)
                assert (image_array(row, "hierarchy")[y0:y1, x0:x1] == 255).mean() > (0.999 if upright else 0.4)
                assert (image_array(row, "color_role")[y0:y1, x0:x1] == COLOR_ROLES.index("ink")).any()
        mask = image_array(row, "image_mask")
        if complexity == "rich" and GRAMMARS[row["style"]].inverted:  # a rotated band may cover the corner of a picture
            assert (mask <= expected).all()
            assert mask.sum() > 0.75 * expected.sum() or not row["pictures"]
        else:
            assert np.array_equal(mask, expected)
        assert set(np.unique(image_array(row, "text_mask"))) <= {0, 255}
        assert image_array(row, "color_role").max() < len(COLOR_ROLES)


def test_role_map_gives_the_color_of_every_flat_pixel(plain_rows: list[dict]) -> None:
    """Inside shapes, letters and background (3 × 3 pixels of one colour), a pixel has the colour of its role."""
    for row in plain_rows[:60]:
        background, primary, *others, ink = (rgb_color(code) for code in row["palette"])
        accent = others[0] if others else primary
        colors = {"background": background, "primary": primary, "secondary": accent, "accent": accent, "ink": ink}
        image, roles = image_array(row, "image"), image_array(row, "color_role")
        inside = np.zeros((64, 64), dtype=bool)
        windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3), axis=(0, 1))
        inside[1:-1, 1:-1] = (windows == windows[..., 1:2, 1:2]).all(axis=(-1, -2, -3))
        inside &= image_array(row, "image_mask") == 0
        drawn = np.zeros(image.shape, dtype=np.uint8)
        for role, color in colors.items():
            drawn[roles == COLOR_ROLES.index(role)] = color
        assert inside.sum() > 400
        assert (drawn == image).all(-1)[inside].mean() > 0.995, row["text"]


def test_one_index_is_one_design_at_every_resolution() -> None:
    for index in range(8):
        small, large = (make_row(PosterOptions(0, pixels, "plain"), index) for pixels in (64, 256))
        for name in ("text", "palette", "elements", "title", "energy"):
            assert small[name] == large[name]
        averaged = image_array(large, "image").reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        # The differences are small text (letters at 256 px, bars at 64 px) and rounding in the pictures.
        assert np.abs(averaged - image_array(small, "image")).mean() < 12


def test_split_sizes_and_membership() -> None:
    config = MakePostersConfig(num_posters=1000)
    assert config.split_sizes() == {"train": 872, "validation": 64, "test": 64}
    assert MakePostersConfig(num_posters=4000).split_sizes() == {"train": 3600, "validation": 200, "test": 200}
    parts = split_indices(1000, config.split_sizes(), seed=0)
    assert sorted(sum(parts.values(), [])) == list(range(1000))
    assert parts != split_indices(1000, config.split_sizes(), seed=1)
    assert parts["test"][-1] > 700  # taken from all posters, not only from the first ones


def test_the_same_dataset_again_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(folder)
    assert main(arguments(folder, num_workers=2)) == 0
    assert "already holds" in capsys.readouterr().out
    assert digests(folder) == before


def test_other_contents_are_refused_or_set_aside(tmp_path: Path) -> None:
    target = tmp_path / "posters"
    small = {"num_posters": 10}
    main(arguments(target, **small))
    before = digests(target)
    with pytest.raises(UserError, match="seed is 0 there, 5 here.*--overwrite"):
        main(arguments(target, seed=5, **small))
    main(arguments(target, seed=5, overwrite=True, **small))
    assert digests(tmp_path / "posters_old_1") == before
    assert digests(target) != before
    next((target / "data").iterdir()).unlink()
    main(arguments(target, seed=5, **small))  # it was not complete, so it is made again
    assert (tmp_path / "posters_old_2/manifest.json").is_file()
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="not empty"):
        main(arguments(foreign, overwrite=True, **small))
    assert (foreign / "holiday.jpg").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_posters", 0, "num_posters is 0"),
        ("resolution", 100, "resolution"),
        ("complexity", "baroque", "complexity.*plain.*standard.*rich"),
        ("seed", -1, "seed is -1"),
        ("num_workers", -2, "num_workers is -2"),
        ("test_fraction", 1.5, "test_fraction is 1.5"),
        ("validation_fraction", 0.95, "nothing is left to train on"),
        ("num_poster", 10, "did you mean 'num_posters'"),
    ],
)
def test_bad_options(tmp_path: Path, option: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments(tmp_path / "posters", **{option: value}))
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        main(arguments(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written"):
        main(arguments(tmp_path / "file" / "posters"))


def test_help_names_the_complexities() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert all(f"{word}: " in " ".join(done.stdout.split()) for word in ("plain", "standard", "rich"))


def test_rich_posters_have_a_contact_sheet(tmp_path: Path) -> None:
    main(arguments(tmp_path / "rich", num_posters=6, complexity="rich"))
    with Image.open(tmp_path / "rich" / "contact_sheet.png") as sheet:
        assert len(sheet.getcolors(10**7) or ()) > 5000  # photographs


def test_error_of_the_real_command_is_one_message() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--num_posters", "0"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "num_posters is 0" in done.stderr


def test_killed_run_leaves_no_half_dataset(tmp_path: Path) -> None:
    target = tmp_path / "posters"
    command = [sys.executable, str(SCRIPT), *arguments(target, num_posters=20_000, num_workers=2)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    unfinished = tmp_path / ".writing-posters" / "data"
    deadline = time.monotonic() + 60
    while not (unfinished.is_dir() and any(unfinished.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert unfinished.is_dir(), "the run ended before it could be killed"
    assert not target.exists()
    assert main(arguments(target, num_posters=10)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".posters.lock", "posters"]


@pytest.mark.slow
@pytest.mark.parametrize(("complexity", "posters_per_second"), [("plain", 40), ("standard", 40), ("rich", 15)])
def test_posters_per_second_on_two_cores(complexity: str, posters_per_second: int) -> None:
    """At 256 px, in CPU time (unaffected by other processes): 40 posters/s is 50 ms per poster on each of two cores."""
    options = PosterOptions(0, 256, complexity)
    make_row(options, 0)
    started = time.process_time()
    for index in range(1, 61):
        make_row(options, index)
    assert (time.process_time() - started) / 60 < 2 / posters_per_second

"""Tests of make_emoji.py: names, classes and splits without a font; drawing with the system's font if there is one."""

from __future__ import annotations

from pathlib import Path

import datasets
import matplotlib
import numpy as np
import pytest
from PIL import Image

from data_scripts import make_emoji
from data_scripts.make_emoji import Emoji, label_of, name_of, split_by_base, without_mirrored_order
from pipelines.tools.cli import UserError
from training.core.draws import SampleKey
from training.data import emoji_font
from training.data.images import DataConfig, ImageDataset, load_split


@pytest.fixture(scope="module")
def font() -> Path:
    try:
        return make_emoji.find_font(None)
    except UserError:
        pytest.skip("no colour emoji font on this machine")


@pytest.mark.parametrize(
    ("text", "name", "label"),
    [
        ("😀", "grinning face", "emoticons"),
        ("🏃🏻‍♀️", "runner, woman, light skin tone", "symbols and pictographs"),
        ("👩🏿‍🦰", "woman, red hair, dark skin tone", "symbols and pictographs"),
        ("🇩🇪", "flag of d e", "flags"),
        ("🇩", "regional indicator letter d", "enclosed alphanumerics"),
        ("🏴󠁧󠁢󠁷󠁬󠁳󠁿", "flag of g b w l s", "flags"),
        ("1️⃣", "keycap digit one", "keycaps"),
        ("🦈", "shark", "supplemental pictographs"),
        ("❤️", "heavy black heart", "dingbats"),
        ("🚀", "rocket", "transport and map"),
    ],
)
def test_names_and_classes(text: str, name: str, label: str):
    codepoints = [ord(c) for c in text]
    assert name_of(codepoints) == name
    assert label_of(codepoints) == label


def test_signs_without_a_name_or_a_glyph():
    assert name_of([0xE000]) is None
    assert name_of([0x200D]) is None
    assert name_of([0x20E3]) == "combining enclosing keycap"


def test_a_sequence_listed_in_both_directions_is_kept_once():
    image, other = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    runner, mirrored, man = (Emoji(text, text, "x") for text in ("🏃‍♀", "♀‍🏃", "🏃‍♂"))
    kept = without_mirrored_order([(mirrored, image), (runner, image), (man, other)])
    assert [emoji.text for emoji, _ in kept] == sorted([runner.text, man.text])


def test_variants_of_an_emoji_are_held_out_together():
    texts = [chr(base) + tone for base in range(0x1F400, 0x1F464) for tone in ("", "🏻", "🏿")]
    rows = [(Emoji(text, "", ""), Image.new("RGB", (1, 1))) for text in texts]
    splits = split_by_base(rows, 0.1, seed=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 270, "validation": 30}
    bases = [{emoji.text[0] for emoji, _ in part} for part in splits.values()]
    assert not bases[0] & bases[1]
    assert splits["validation"] == split_by_base(rows, 0.1, seed=0)["validation"]
    assert splits["validation"] != split_by_base(rows, 0.1, seed=1)["validation"]
    assert list(split_by_base(rows, 0.0, seed=0)) == ["train"]


def test_glyphs_are_in_colour_and_missing_ones_are_skipped(font: Path):
    opened = make_emoji.open_font(font)
    grinning = make_emoji.draw(opened, "😀", 64)
    assert grinning is not None
    assert (grinning.size, grinning.mode) == ((64, 64), "RGB")
    pixels = np.asarray(grinning).astype(int)
    assert (abs(pixels[..., 0] - pixels[..., 2]) > 60).mean() > 0.2, "yellow, not grey"
    assert pixels[0, 0].tolist() == [255, 255, 255]
    for absent in ("\ue000", "\u4e00", "👩‍👩", " "):
        assert make_emoji.draw(opened, absent, 64) is None


@pytest.mark.slow
def test_the_dataset_trains(font: Path, tmp_path: Path):
    folder = tmp_path / "emoji"
    arguments = ["--output_dir", str(folder), "--resolution", "32", "--sequences", "none"]
    assert make_emoji.main(arguments) == 0
    loaded = datasets.load_dataset(str(folder))
    assert set(loaded) == {"train", "validation"}
    rows = [row for split in loaded.values() for row in zip(split["text"], split["codepoints"])]
    assert len(rows) > 1000
    assert len(set(rows)) == len(rows)
    assert ("an emoji of grinning face", "1f600") in rows
    config = DataConfig(dataset_name=str(folder), resolution=32)
    dataset = ImageDataset(load_split(config, "train", 0), config, labels=True)
    item = dataset[SampleKey(0, 0)]
    assert item["pixel_values"].shape == (3, 32, 32)
    assert item["caption"].startswith("an emoji of ")
    assert dataset.id2label[item["label"]]
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 500
    before = [file.read_bytes() for file in sorted((folder / "data").iterdir())]
    with pytest.raises(UserError, match="--overwrite true"):
        make_emoji.main(arguments)
    assert make_emoji.main([*arguments, "--overwrite", "true"]) == 0
    assert [file.read_bytes() for file in sorted((folder / "data").iterdir())] == before


def test_without_a_font_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emoji_font, "FONT_FOLDERS", (str(tmp_path),))
    with pytest.raises(UserError, match="fonts-noto-color-emoji.*--font"):
        make_emoji.main(["--output_dir", str(tmp_path / "emoji")])


def test_unusable_fonts_are_refused(tmp_path: Path):
    output = ["--output_dir", str(tmp_path / "emoji")]
    with pytest.raises(UserError, match="does not exist"):
        make_emoji.main([*output, "--font", "nowhere.ttf"])
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(UserError, match="cannot be read as a font"):
        make_emoji.main([*output, "--font", str(tmp_path / "text.ttf")])
    plain = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    with pytest.raises(UserError, match="without colour"):
        make_emoji.main([*output, "--font", str(plain)])

"""Datasets of images with captions: the tokenizer trained on them, ids and masks, and real datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipelines.tools.cli import UserError
from tests.support.tiny_captions import RESOLUTION, caption, draw_folder, tiny_caption_tokenizer
from training.core.batches import fetch
from training.core.draws import SampleKey
from training.data.captions import (
    CaptionDataConfig,
    CaptionedImages,
    captions_of,
    load_captioned,
    pixel_variance,
    tokenizer_for,
)
from training.data.images import load_split
from training.data.tokenization import CaptionTokens, report_on


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> CaptionDataConfig:
    folder = draw_folder(tmp_path_factory.mktemp("data") / "images")
    return CaptionDataConfig(train_data_dir=str(folder), resolution=RESOLUTION)


def test_one_pair_in_ten_is_held_out_by_seed(config):
    train, held_out = load_captioned(config, 0)
    assert (len(train), len(held_out)) == (43, 5)
    again, other = load_captioned(config, 0)[1], load_captioned(config, 1)[1]
    kept = [data.dataset[:]["image"] for data in (held_out, again, other)]
    assert kept[0] == kept[1] != kept[2]


def test_a_tokenizer_is_trained_on_the_training_captions(config):
    train, _ = load_captioned(config, 0)
    config.tokenizer_model = "word_level"
    one, again = (tokenizer_for(config, train.captioned, 12) for _ in range(2))
    assert one.get_vocab() == again.get_vocab()
    assert one.convert_tokens_to_ids(["<PAD>", "<START>", "<END>", "<UNK>"]) == [0, 1, 2, 3]
    assert one.model_max_length == 12
    assert one("a red zebra").input_ids[-2] == 3


def test_batches_are_padded_to_their_longest_caption_and_masked(config):
    tokenizer = tiny_caption_tokenizer()
    data, _ = load_captioned(config, 0, CaptionTokens(tokenizer, 12, "longest"))
    widths = set()
    for rows in ([0, 1, 2, 3], [40, 5, 17], [20]):
        batch = fetch(data, [SampleKey(row, row) for row in rows])
        expected = tokenizer(batch["caption"], padding="longest", return_tensors="pt")
        assert torch.equal(batch["input_ids"], expected.input_ids)
        assert torch.equal(batch["attention_mask"], expected.attention_mask)
        widths.add(batch["input_ids"].shape[1])
    assert len(widths) > 1, "all captions have the same length: padding was not tested"


def test_lists_of_captions(tmp_path, config):
    folder = draw_folder(tmp_path / "images", 4)
    rows = [json.dumps({"file_name": f"{i:03d}.png", "text": [caption(i), "a picture"]}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    several = CaptionDataConfig(train_data_dir=str(folder), resolution=RESOLUTION, validation_fraction=0)
    tokenizer = tiny_caption_tokenizer()
    tokens = CaptionTokens(tokenizer, 12, "longest")
    data = CaptionedImages(load_split(several, "train", 0), several, caption_tokens=tokens)
    assert list(captions_of(data.captioned, "text"))[:2] == [caption(0), "a picture"]
    batch = fetch(data, [SampleKey(0, key) for key in range(20)])
    assert set(batch["caption"]) == {caption(0), "a picture"}
    # The ids are those of the caption that was drawn, sample by sample.
    assert torch.equal(batch["input_ids"], tokenizer(batch["caption"], padding=True, return_tensors="pt").input_ids)


def test_a_column_of_numbers_has_no_captions(tmp_path):
    folder = draw_folder(tmp_path / "images", 4)
    rows = [json.dumps({"file_name": f"{i:03d}.png", "text": i}) for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    config = CaptionDataConfig(train_data_dir=str(folder), validation_fraction=0)
    with pytest.raises(UserError, match="holds int, not texts"):
        tokenizer_for(config, load_split(config, "train", 0), 12)


def test_pixel_variance_is_the_error_of_the_mean_image(config):
    train, _ = load_captioned(config, 0)
    pixels = torch.stack([train[SampleKey(i, 0)]["pixel_values"] for i in range(len(train))])
    error = (pixels - pixels.mean(0)).square().mean()
    assert pixel_variance(train, 1000) == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize(("name", "fit", "ratio"), [("noto_emoji", "crop", 1.0), ("nlvr_shapes", "stretch", 4.0)])
def test_real_captions(shared_dir: Path, name, fit, ratio):
    """Training captions have no unknown words, and held-out captions have few."""
    config = CaptionDataConfig(dataset_name=str(shared_dir / "data" / name), image_fit=fit)
    train, held_out = load_captioned(config, 0)
    tokenizer = tokenizer_for(config, train.captioned, 40)
    own = report_on(tokenizer, captions_of(train.captioned, "text"))
    other = report_on(tokenizer, captions_of(held_out.captioned, "text"))
    assert (own.unknown_words, own.cut) == (0, 0)
    assert own.round_trips > 0.9 * own.captions
    assert other.unknown_share < 0.1
    assert train.aspect_ratio() == ratio

"""Tokenizers: special ids, round trips, unknown words, and a folder that Transformers loads without this project."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_scripts import train_tokenizer as script
from pipelines.tools.cli import UserError
from tests.support.tiny_models import tiny_tokenizer
from training.data import tokenization
from training.data.tokenization import CaptionTokens, decode, normalized, report_on, train_tokenizer

ENGRAVING = "An engraving depicting a woman in a blue dress"
CAPTIONS = [ENGRAVING, "A red circle, on blue!", "medium-light skin tone", "a woman's blue hat", "CAFÉ in Köln"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    for split, captions in (("train", CAPTIONS * 3), ("validation", ["a red zebra", "a blue dress"])):
        lines = [json.dumps({"text": caption}) for caption in captions]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("model", ["word_level", "bpe"])
def test_special_tokens_and_round_trips(model: str):
    tokenizer = train_tokenizer(CAPTIONS, model=model)  # type: ignore[arg-type]
    assert tokenizer.convert_tokens_to_ids(["<PAD>", "<START>", "<END>", "<UNK>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        0,
        1,
        2,
        3,
    )
    ids = tokenizer(ENGRAVING).input_ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert decode(tokenizer, ids) == "an engraving depicting a woman in a blue dress"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "an engraving depicting a woman in a blue dress"
    for caption in CAPTIONS:
        assert decode(tokenizer, tokenizer(caption).input_ids) == caption.lower()


def test_word_level_keeps_the_most_frequent_words_and_marks_the_rest():
    captions = ["red red red blue blue green"]
    assert train_tokenizer(captions, vocab_size=6).get_vocab().keys() == {
        "<PAD>",
        "<START>",
        "<END>",
        "<UNK>",
        "red",
        "blue",
    }
    frequent = train_tokenizer(captions, min_frequency=2)
    assert frequent("green red").input_ids == [1, 3, frequent.get_vocab()["red"], 2]
    assert decode(frequent, frequent("green red").input_ids) == "<UNK> red"


def test_bpe_has_no_unknown_words():
    tokenizer = train_tokenizer(CAPTIONS, model="bpe", vocab_size=300)
    assert len(tokenizer) <= 300
    report = report_on(tokenizer, ["日本 poster", "zebra 🦓"])
    assert (report.unknown_words, report.round_trips) == (0, 2)


def test_case_can_be_kept():
    tokenizer = train_tokenizer(["Red red"], lowercase=False)
    assert decode(tokenizer, tokenizer("Red red").input_ids) == "Red red"
    assert normalized(tokenizer, "Red  red") == "Red red"


def test_batches_are_padded_and_truncated():
    tokenizer = train_tokenizer(CAPTIONS, model_max_length=5)
    batch = tokenizer(["a", ENGRAVING], padding="max_length", truncation=True, return_tensors="pt")
    assert batch.input_ids.shape == (2, 5)
    assert batch.input_ids[0, 3:].tolist() == [0, 0]
    assert batch.input_ids[1, 0] == 1
    assert batch.input_ids[1, -1] == 2, "a truncated caption still has <END>"
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]


BATCHES = [
    ["a red poster", "", "blue on cream"],
    ["blue on cream", "a red poster", "a red poster"],
    ["x", "y", "a poster of red circles, a poster of blue circles"],
]


def test_captions_padded_to_a_fixed_length_have_the_ids_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch):
    """In any order, cached or not, after the cache was emptied, and in a worker's copy."""
    monkeypatch.setattr(tokenization, "MAX_CACHED_CAPTIONS", 4)
    own, cached = tiny_tokenizer(), CaptionTokens(tiny_tokenizer(), 6, "max_length")
    for captions in [*BATCHES, *BATCHES]:
        expected = own(captions, padding="max_length", truncation=True, max_length=6, return_tensors="pt").input_ids
        for tokens in (cached, pickle.loads(pickle.dumps(cached))):
            result = tokens(captions)
            assert result.keys() == {"input_ids"}
            assert torch.equal(result["input_ids"], expected)


def test_captions_padded_to_the_longest_have_a_mask(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenization, "MAX_CACHED_CAPTIONS", 4)
    own, cached = tiny_tokenizer(), CaptionTokens(tiny_tokenizer(), 6, "longest")
    for captions in [*BATCHES, *BATCHES]:
        expected = own(captions, padding="longest", truncation=True, max_length=6, return_tensors="pt")
        for tokens in (cached, pickle.loads(pickle.dumps(cached))):
            result = tokens(captions)
            assert torch.equal(result["input_ids"], expected.input_ids)
            assert torch.equal(result["attention_mask"], expected.attention_mask)


def test_each_caption_is_tokenized_once():
    class Counting(CaptionTokens):
        seen: list[str] = []

        def _tokenize(self, captions):
            self.seen += captions
            return super()._tokenize(captions)

    tokens = Counting(tiny_tokenizer(), 6, "max_length")
    for captions in [*BATCHES, *BATCHES]:
        tokens(captions)
    assert sorted(tokens.seen) == sorted({caption for captions in BATCHES for caption in captions})


def test_the_report_counts_what_is_lost():
    tokenizer = train_tokenizer(["a red circle"], model_max_length=4)
    report = report_on(tokenizer, ["a red zebra", "a circle"])
    assert (report.captions, report.words, report.unknown_words) == (2, 5, 1)
    assert report.unknown_share == pytest.approx(0.2)
    assert (report.round_trips, report.longest, report.cut) == (1, 5, 1)


def test_captions_are_consumed_one_by_one():
    alive = 0

    def stream() -> Iterator[str]:
        nonlocal alive
        for i in range(20_000):
            alive = i
            yield f"word{i % 50} again"

    assert len(train_tokenizer(stream())) == 4 + 51
    assert alive == 19_999


def test_the_script_shows_what_it_made(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "tokenizer"
    arguments = ["--dataset_name", str(data), "--output_dir", str(folder), "--model", "word_level"]
    assert script.main(arguments) == 0
    output = capsys.readouterr().out
    assert "'a red zebra'" in output
    assert "'a red <UNK>'   (1 unknown)" in output
    assert "Of 6 words in 2 validation captions, 16.67% are unknown; 1 captions are unchanged after encoding" in output
    assert "To lower this share, use --model bpe, which has no unknown words.\n" in output
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    with pytest.raises(UserError, match="--overwrite true"):
        script.main(arguments)
    assert script.main([*arguments, "--overwrite", "true"]) == 0


@pytest.mark.slow
def test_the_folder_loads_without_this_project(data: Path, tmp_path: Path):
    folder = tmp_path / "tokenizer"
    script.main(["--dataset_name", str(data), "--output_dir", str(folder)])
    code = (
        "import sys\nfrom transformers import AutoTokenizer, PreTrainedTokenizerFast\n"
        f"for kind in (AutoTokenizer, PreTrainedTokenizerFast):\n"
        f"    t = kind.from_pretrained({str(folder)!r})\n"
        f"    special = (t.pad_token_id, t.bos_token_id, t.eos_token_id, t.unk_token_id)\n"
        f"    print(t({ENGRAVING!r}).input_ids, *special, t.model_max_length)\n"
        "assert not any(name in sys.modules for name in ('pipelines', 'training', 'data_scripts'))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    ids = train_tokenizer(CAPTIONS * 3, model="bpe")(ENGRAVING).input_ids
    assert run.stdout.splitlines() == [f"{ids} 0 1 2 3 77"] * 2


def suitable(captions: list[str], held_out: list[str], **settings: object) -> tuple[str, str]:
    tokenizer, choice = tokenization.train_suitable_tokenizer(lambda: captions, lambda: held_out, **settings)  # type: ignore[arg-type]
    return "word_level" if tokenization.is_word_level(tokenizer) else "bpe", choice


def test_the_kind_of_tokenizer_suits_the_captions():
    many = [f"a red circle and {i % 50} squares" for i in range(tokenization.FEW_CAPTIONS)]
    assert suitable(many[:-1], many) == (
        "bpe",
        "The tokenizer is bpe, because there are only 4,999 captions (fewer than 5,000).",
    )
    assert suitable(many, many[:100])[0] == "word_level"
    kind, choice = suitable(many, ["a zebra"])
    assert (kind, "50.00% of the words in other captions would be unknown" in choice) == ("bpe", True)
    assert suitable(many, ["a zebra"], model="word_level")[0] == "word_level"
    assert suitable(many[:9], many, vocab_size=100)[0] == "word_level", "100 entries are too few for pieces"
    with pytest.raises(UserError, match="all captions are empty"):
        suitable([], [])


def test_a_rare_word_is_not_one_piece():
    """Its pieces would never be trained, although they are all that prompts with other words consist of."""
    tokenizer = train_tokenizer(["a circle", "a circle", "a xylophone"], model="bpe")
    assert len(tokenizer("circle", add_special_tokens=False).input_ids) == 2  # pieces begin with a space
    assert len(tokenizer(" circle", add_special_tokens=False).input_ids) == 1
    assert len(tokenizer(" xylophone", add_special_tokens=False).input_ids) > 5


def test_advice_names_only_what_can_help():
    captions = ["red red red blue blue green"]
    advice = tokenization.unknown_words_advice
    bpe = "use --model bpe, which has no unknown words"
    assert advice(train_tokenizer(captions), "--model", vocab_size=8000) == bpe
    full = train_tokenizer(captions, vocab_size=6)
    assert advice(full, "--model", vocab_size=6) == f"{bpe}, or raise --vocab_size, because all 6 entries are used"
    frequent = train_tokenizer(captions, min_frequency=2)
    limits = {"vocab_size": 8000, "min_frequency": 2}
    assert advice(frequent, "--model", **limits) == f"{bpe}, or lower --min_frequency, which is 2"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--caption_column", "caption"], "no column 'caption'"),
        (["--vocab_size", "3"], "--vocab_size"),
        (["--model", "bpe", "--vocab_size", "200"], "260"),
        (["--min_frequency", "100"], "lower --min_frequency"),
        (["--model", "wordpiece"], "--model"),
        (["--output_dir", "/proc/nothing/here"], "--output_dir"),
    ],
)
def test_mistakes_are_user_errors(data: Path, tmp_path: Path, changed: list[str], message: str):
    with pytest.raises(UserError, match=message):
        script.main(["--dataset_name", str(data), "--output_dir", str(tmp_path / "tokenizer"), *changed])

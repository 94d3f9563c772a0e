"""train_encoder.py and train_abstractor.py as users start them: runs, resuming, loading, validation and user errors."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from data_scripts import make_posters
from pipelines.common.poster_domain import COUNTS, GRAMMAR
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.scripts.test_bad_input import nothing_was_trained, refusal
from tests.support.runs import ROOT, assert_same_state, launch, rows
from training import train_abstractor, train_encoder
from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.data.images import load_split
from training.data.posters import PosterDataset

COMMON = (
    *("--report_to", "none", "--cpu_threads", "1", "--resolution", "64", "--logging_steps", "1"),
    *("--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--lr_warmup_steps", "0"),
)
TINY_ENCODER = ("--model.block_out_channels", "[8,16]", "--model.patch_size", "2", "--learning_rate", "5e-3")
TINY_ABSTRACTOR = (
    *("--model.block_out_channels", "[8,8]", "--model.hidden_size", "16", "--model.sample_size", "16"),
    *("--learning_rate", "3e-3", "--model.dropout", "0"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """32 rich posters for training, 4 for validation, 4 for tests."""
    folder = tmp_path_factory.mktemp("data") / "posters"
    shares = ("--validation_fraction", "0.1", "--test_fraction", "0.1", "--complexity", "standard")
    make_posters.main(["--output_dir", str(folder), "--num_posters", "40", "--num_workers", "1", *shares])
    return folder


def flags_of(data: Path) -> tuple[str, ...]:
    return (*COMMON, *TINY_ENCODER, "--dataset_name", str(data))


def train(script, folder: Path, *flags: str) -> int:
    forget_accelerate()
    return script.main([*flags, "--output_dir", str(folder)])


@pytest.fixture(scope="module")
def encoder(data, tmp_path_factory) -> Path:
    """A run of two epochs, launched as a user does."""
    folder = tmp_path_factory.mktemp("runs") / "encoder"
    done = launch(
        ROOT / "training/train_encoder.py", *flags_of(data), "--num_train_epochs", "2", "--output_dir", str(folder)
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_encoder_learns_and_shows_it(encoder):
    logged = rows(encoder)
    metrics = {"val_text_iou", "val_image_iou", "val_color_accuracy", "val_hierarchy_mse"}
    assert metrics <= logged[-1].keys()
    assert all(0 <= float(logged[-1][name]) <= 1 for name in metrics)
    assert float(logged[-1]["val_loss"]) < float(logged[3]["val_loss"])
    with Image.open(encoder / "samples/epoch_0002.png") as grid:
        assert grid.width > 4 * 128  # poster, truth, prediction, error
    card = (encoder / "pipeline/README.md").read_text()
    assert "layout encoder" in card
    assert "pipeline(poster).overlays[0]" in card


def test_the_encoder_resumes_bit_for_bit(data, encoder, tmp_path):
    for epochs in ("1", "2"):
        assert train(train_encoder, tmp_path / "run", *flags_of(data), "--num_train_epochs", epochs) == 0
    assert_same_state(encoder, tmp_path / "run")


def test_validate_only_takes_any_model_and_split(data, encoder, tmp_path, capsys):
    """`--validate_only --validate_model DIR` validates a run without writing to any run folder."""
    place = tmp_path / "untouched"
    words = (*flags_of(data), "--validate_only", "--validate_model", str(encoder))
    assert train(train_encoder, place, *words) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val_"))
    assert float(printed["val_text_iou"]) == pytest.approx(float(rows(encoder)[-1]["val_text_iou"]), abs=1e-4)
    assert train(train_encoder, place, *words, "--validation_split", "test") == 0
    other = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val_"))
    assert other != printed
    assert not list(tmp_path.rglob("*.csv"))


def test_loss_weights_switch_their_terms_off(data):
    """A weight of 0 leaves exactly the gradients of the other terms."""
    config = parse_config(train_encoder.Config, [*flags_of(data), "--output_dir", "unused"])
    stage = train_encoder.LayoutEncoderStage(config, StageContext())
    batch = fetch(stage.train_data(), [SampleKey(i, i) for i in range(4)])
    gradients = {}
    for dice, ce, mse in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        config.dice_weight, config.ce_weight, config.mse_weight = dice, ce, mse
        stage.encoder.zero_grad()
        stage.phase(batch, Draws(0, 0, range(4)))[0].backward()
        gradients[dice, ce, mse] = {
            n: p.grad.clone() for n, p in stage.encoder.named_parameters() if p.grad is not None
        }
    for name, whole in gradients[1, 1, 1].items():
        parts = sum(gradients[key].get(name, torch.zeros(())) for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
        assert torch.allclose(whole, parts, atol=1e-5), name
    assert gradients[0, 0, 1]["heads.hierarchy.weight"].abs().sum() > 0
    assert gradients[0, 0, 1]["heads.text_mask.weight"].abs().sum() == 0
    assert gradients[0, 1, 0]["heads.hierarchy.weight"].abs().sum() == 0


def test_rare_roles_count_more(data):
    """Weights decrease with a role's share of the pixels and average to 1; with --role_balance 0 they are all 1."""
    words = [*flags_of(data), "--output_dir", "unused"]
    even = train_encoder.LayoutEncoderStage(
        parse_config(train_encoder.Config, [*words, "--role_balance", "0"]), StageContext()
    )
    assert torch.allclose(even.phase.role_weights, torch.ones(6))
    stage = train_encoder.LayoutEncoderStage(parse_config(train_encoder.Config, words), StageContext())
    roles = torch.stack([stage.train_data()[SampleKey(row, 0)]["color_role"] for row in range(32)])
    shares = torch.bincount(roles.flatten(), minlength=6) / roles.numel()
    weights = stage.phase.role_weights
    assert (weights * shares).sum().item() == pytest.approx(1, rel=1e-3)
    assert weights.argsort().tolist() == shares.argsort(descending=True).tolist()


def test_maps_are_cut_and_mirrored_as_their_poster(data):
    """A flip mirrors the image and its maps; augmentation changes only the image, and depends only on the key."""
    words = [*flags_of(data), "--output_dir", "unused"]
    plain = parse_config(train_encoder.Config, words)
    varied = parse_config(train_encoder.Config, [*words, "--random_flip", "true", "--photometric_augmentation", "1"])
    split = load_split(plain, "train", 0)
    still, moving = PosterDataset(split, plain), PosterDataset(split, varied)
    flipped = 0
    for key in range(12):
        a, b = still[SampleKey(3, key)], moving[SampleKey(3, key)]
        again = moving[SampleKey(3, key)]
        assert all(torch.equal(b[name], again[name]) for name in ("pixel_values", "color_role"))
        mirrored = not torch.equal(a["color_role"], b["color_role"])
        flipped += mirrored
        for name in ("text_mask", "image_mask", "color_role", "hierarchy"):
            assert torch.equal(a[name].flip(-1) if mirrored else a[name], b[name])
        assert not torch.equal(a["pixel_values"].flip(-1) if mirrored else a["pixel_values"], b["pixel_values"])
    assert 0 < flipped < 12
    held_out = PosterDataset(split, varied, augment=False)
    assert torch.equal(held_out[SampleKey(3, 1)]["pixel_values"], still[SampleKey(3, 7)]["pixel_values"])


@pytest.fixture(scope="module")
def abstractor(data, encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "abstractor"
    flags = (*COMMON, *TINY_ABSTRACTOR, "--dataset_name", str(data), "--encoder", str(encoder))
    done = launch(ROOT / "training/train_abstractor.py", *flags, "--num_train_epochs", "2", "--output_dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_the_abstractor_reads_features_true_and_predicted(abstractor):
    last = rows(abstractor)[-1]
    for prefix in ("val_", "val_predicted_"):
        assert {f"{prefix}{what}_{name}" for what in ("r2", "mae") for name in GRAMMAR} <= last.keys()
        assert all(0 <= float(last[f"{prefix}{name}_accuracy"]) <= 1 for name in COUNTS)
    pipeline = load_pipeline(abstractor)
    assert pipeline.encoder is not None
    reading = pipeline(Image.new("RGB", (70, 50), "red"))
    assert set(reading.grammar[0]) == set(GRAMMAR)
    assert set(reading.counts[0]) == set(COUNTS)
    assert (abstractor / "samples/epoch_0002.png").is_file()


def test_the_frozen_encoder_does_not_move(abstractor, encoder):
    own, origin = load_pipeline(abstractor).encoder, load_pipeline(encoder).encoder
    for name, tensor in origin.state_dict().items():
        assert torch.equal(tensor, own.state_dict()[name]), name


def test_the_abstractor_without_an_encoder_reads_features_alone(data, tmp_path):
    flags = (*COMMON, *TINY_ABSTRACTOR, "--dataset_name", str(data))
    assert train(train_abstractor, tmp_path / "run", *flags, "--num_train_epochs", "1") == 0
    pipeline = load_pipeline(tmp_path / "run")
    assert pipeline.encoder is None
    assert not any("predicted" in name for name in rows(tmp_path / "run")[-1])


def test_a_dataset_of_something_else_is_refused(tmp_path, capfd):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for row in range(8):
        Image.new("RGB", (64, 64), (row, 0, 0)).save(folder / f"{row}.png")
        lines.append(json.dumps({"file_name": f"{row}.png", "text": "a picture"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for script, flags in ((train_encoder, TINY_ENCODER), (train_abstractor, TINY_ABSTRACTOR)):
        words = [*COMMON, *flags, "--dataset_name", str(folder), "--output_dir", str(tmp_path / "run")]
        message = refusal(script, words, capfd)
        assert "is not a poster dataset" in message
        assert "text_mask" in message
        assert "make_posters.py" in message
        assert nothing_was_trained(tmp_path / "run")


def test_a_mask_of_another_size_is_refused(data, tmp_path, capfd):
    posters = datasets.load_dataset(str(data), cache_dir=str(tmp_path / "cache"))

    def shrunk(row, index):
        return {"text_mask": row["text_mask"].resize((32, 32))} if index == 5 else {"text_mask": row["text_mask"]}

    posters["train"] = posters["train"].map(shrunk, with_indices=True)
    posters.save_to_disk(str(tmp_path / "damaged"))
    words = [*COMMON, *TINY_ENCODER, "--dataset_name", str(tmp_path / "damaged"), "--output_dir", str(tmp_path / "run")]
    message = refusal(train_encoder, words, capfd)
    assert "text_mask" in message
    assert "32×32" in message
    assert "64×64" in message
    assert nothing_was_trained(tmp_path / "run")


@pytest.mark.parametrize(
    ("script", "words", "named"),
    [
        (train_encoder, ["--model.block_out_channels", "[8,12]"], "norm_num_groups"),
        (train_encoder, ["--dice_weight", "0", "--ce_weight", "0", "--mse_weight", "0"], "nothing to learn from"),
        (train_encoder, ["--model.block_out_channels", "[8,8,8,8,8,8,8]"], "--model.block_out_channels"),
        (train_encoder, ["--validate_model", "nowhere"], "--validate_only"),
        (train_encoder, ["--validate_only", "--validate_model", "nowhere"], "nowhere"),
        (train_abstractor, ["--encoder", "nowhere"], "nowhere"),
        (train_abstractor, ["--predicted_share", "1.5"], "--predicted_share"),
    ],
)
def test_invalid_settings_are_refused(script, words, named, data, tmp_path, capfd):
    tiny = TINY_ENCODER if script is train_encoder else TINY_ABSTRACTOR
    message = refusal(
        script, [*COMMON, *tiny, "--dataset_name", str(data), "--output_dir", str(tmp_path / "run"), *words], capfd
    )
    assert named in message
    assert nothing_was_trained(tmp_path / "run")

"""train_autoencoder.py with heads: each loss trains what it should and nothing else; the run shows the predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.common.poster_domain import COLOR_ROLES, STYLES
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.support.runs import rows
from training import train_autoencoder
from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.data.fingerprints import vae_fingerprint
from training.data.images import DataConfig, load_split
from training.models.autoencoder_heads import count_mask_classes
from training.models.vae_loading import load_vae
from training.run.checkpoint import load_tensors

HEADS = (
    *("--heads", "[segmentation,classification]", "--mask_column", "color_role"),
    *("--mask_class_names", f"[{','.join(COLOR_ROLES)}]"),
)
ADVERSARIAL = ("--adversarial_weight", "0.1", "--discriminator_start", "0")
ENCODER = ("encoder.", "quant_conv.")
FEATURES = ("post_quant_conv.", "decoder.body.")
IMAGE = ("decoder.body.conv_out.", "decoder.shortcut.")
# For each loss, prefixes of the names of the autoencoder's parameters that it trains, and prefixes of the exceptions.
REACHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(
        ("l1", "l2", "perceptual", "adversarial", "scale_equivariance_loss"), ((*ENCODER, *FEATURES, *IMAGE), ())
    ),
    "kl": (ENCODER, ()),
    "segmentation": ((*ENCODER, *FEATURES, "segmentation_head."), IMAGE),
    "classification": ((*ENCODER, "classification_head."), ()),
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """A tiny ResNet, saved as Transformers saves one."""
    from transformers import ResNetBackbone, ResNetConfig

    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetBackbone(ResNetConfig(**sizes, out_features=["stage1", "stage2"])).save_pretrained(folder)
    return folder


def stage_of(*words: str) -> train_autoencoder.AutoencoderStage:
    return train_autoencoder.AutoencoderStage(parse_config(train_autoencoder.Config, [*words]), StageContext())


@pytest.fixture(scope="module")
def everything(autoencoder_flags, backbone) -> train_autoencoder.AutoencoderStage:
    """A stage with all losses, whose frozen parts are frozen in the same way as by the loop."""
    perceptual = ("--perceptual_weight", "0.5", "--perceptual_backbone", str(backbone), "--l2_weight", "2")
    more = (*perceptual, "--scale_equivariance", "0.25")
    stage = stage_of(*autoencoder_flags, *HEADS, *ADVERSARIAL, *more, "--learned_loss_weights", "true")
    for module in stage.frozen:
        module.requires_grad_(False)
    return stage


@pytest.fixture
def clean(everything) -> Iterator[train_autoencoder.AutoencoderStage]:
    """The stage, without gradients before and after the test."""
    for phase in everything.phases:
        phase.zero_grad()
    yield everything
    for phase in everything.phases:
        phase.zero_grad()


def first_batch(stage: train_autoencoder.AutoencoderStage) -> tuple[dict, Draws]:
    return dict(fetch(stage.train_data(), [SampleKey(0, 0), SampleKey(1, 1)])), Draws(0, 0, range(2))


def reached(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("name", REACHES)
def test_a_loss_reaches_the_parameters_it_should_and_no_others(clean, name):
    generator, discriminator = clean.phases
    generator.losses(*first_batch(clean))[name].backward()
    begins, excepted = REACHES[name]
    names = {n for n, _ in clean.autoencoder.named_parameters()}
    expected = {n for n in names if n.startswith(begins) and not n.startswith(excepted or "-")}
    result = reached(clean.autoencoder)
    assert result == expected, (sorted(result - expected), sorted(expected - result))
    assert {n for n in reached(generator) if n.startswith("loss_weights")} == set()
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.grad is None for module in clean.frozen for p in module.parameters())


def test_no_loss_is_left_out_of_that_table(clean):
    assert set(clean.generator.losses(*first_batch(clean))) == set(REACHES)


def test_all_losses_together_reach_every_parameter(clean):
    clean.generator(*first_batch(clean))[0].backward()
    assert reached(clean.generator) == {name for name, _ in clean.generator.named_parameters()}
    assert {f"loss_weights.log_variances.{n}" for n in ("reconstruction", "segmentation", "classification")} <= reached(
        clean.generator
    )


def test_the_discriminators_loss_reaches_the_discriminator_alone(clean):
    generator, discriminator = clean.phases
    discriminator(*first_batch(clean))[0].backward()
    assert all(p.grad is None for p in generator.parameters())
    # Weights only: within the margin of the hinge loss, the last bias gets -1 from real and +1 from fake images.
    assert {n for n, p in discriminator.named_parameters() if p.ndim > 1} <= reached(discriminator)


def test_learned_weights_start_with_the_gradients_of_fixed_ones(autoencoder_flags):
    """Both stages have the same weights, because nothing random depends on how the losses are weighted."""
    words = (*autoencoder_flags, *HEADS, "--l2_weight", "2", "--segmentation_weight", "0.3")
    gradients = []
    for learned in ("false", "true"):
        stage = stage_of(*words, "--learned_loss_weights", learned)
        stage.generator(*first_batch(stage))[0].backward()
        gradients.append([p.grad for p in stage.autoencoder.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True))


# --- runs ----------------------------------------------------------------------------------------------------------


def train(folder: Path, *words: str) -> Path:
    forget_accelerate()
    assert train_autoencoder.main([*words, "--output_dir", str(folder)]) == 0
    forget_accelerate()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, autoencoder_flags) -> Path:
    """Two epochs of four steps with both heads, learned weights and a discriminator."""
    more = (*HEADS, *ADVERSARIAL, "--learned_loss_weights", "true", "--num_train_epochs", "2")
    kept = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "9", "--preview_epochs", "2")
    return train(tmp_path_factory.mktemp("heads") / "run", *autoencoder_flags, *more, *kept)


def test_every_part_moves(run):
    for name in ("phase_autoencoder.safetensors", "phase_discriminator.safetensors"):
        first, last = (load_tensors(run / f"checkpoints/step-{step:08d}" / name) for step in (1, 8))
        assert [key for key in first if torch.equal(first[key], last[key])] == []
    learned = load_tensors(run / "checkpoints/latest/phase_autoencoder.safetensors")
    assert sum("log_variances" in key for key in learned) == 3


def test_metrics_have_the_total_each_part_and_each_weight(run):
    logged = rows(run)
    parts = {"loss", "l1", "kl", "adversarial", "segmentation", "classification"}
    weights = {f"weight_{name}" for name in ("reconstruction", "segmentation", "classification")}
    assert all(row[name] for row in logged for name in parts | weights)
    assert float(logged[0]["weight_segmentation"]) == pytest.approx(0.01, rel=0.05)
    validated = {name: float(value) for name, value in logged[-1].items() if name.startswith("val_")}
    metrics = {"val_psnr", "val_ssim", "val_pixel_accuracy", "val_mean_iou", "val_top1_accuracy"}
    assert metrics <= validated.keys()
    assert 0 < validated["val_mean_iou"] <= validated["val_pixel_accuracy"] <= 1
    assert validated["val_top1_accuracy"] * 4 == pytest.approx(round(validated["val_top1_accuracy"] * 4))


def test_the_grid_shows_masks_in_the_colours_of_their_classes(run):
    from pipelines.common.class_colors import class_color

    prompts = json.loads((run / "record.json").read_text())["prompts"]
    first = prompts[:4]
    assert first[0].removeprefix("original, ") in STYLES
    assert "dB, predicted: " in first[1]
    assert first[2] == "mask"
    assert first[3].startswith("predicted mask, IoU 0.")
    assert prompts[-1] == f"from top to bottom: {', '.join(COLOR_ROLES)}"
    assert len(prompts) == 4 * 4 + 1
    colors = {color for _, color in Image.open(run / "samples/epoch_0002.png").getcolors(1 << 24)}
    assert {class_color(id_) for id_ in range(6)} <= colors


def test_the_runs_pipeline_keeps_the_heads_and_its_card_names_the_classes(run, posters):
    config = DataConfig(dataset_name=str(posters))
    images = [row["image"] for row in load_split(config, "validation", 0)]
    pipeline = load_pipeline(run)
    masks, classes = pipeline.segment(images, output_type="np"), pipeline.classify(images)
    assert masks.shape == (4, 64, 64)
    assert masks.max() < 6
    assert all(set(shares) == set(STYLES) for shares in classes)
    card = (run / "pipeline/README.md").read_text()
    assert all(word in card for word in ("| 5 | ink |", "art_deco", "pipeline.segment", "pipeline.classify"))


def test_what_a_diffusion_model_takes_has_no_heads(run, tmp_path):
    vae = load_vae(str(run))
    assert not any("_head" in name for name in vae.state_dict())
    assert vae.config.latents_std is not None
    vae.save_pretrained(tmp_path)
    assert vae_fingerprint(load_vae(str(tmp_path))) == vae_fingerprint(vae)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(vae(pixels).sample, load_pipeline(run).vae(pixels).sample)


def test_a_stopped_run_gives_its_best_and_keeps_the_latest(tmp_path, autoencoder_flags):
    """No improvement is large enough, so the first validation stays the best and the second ends the run."""
    stop = ("--early_stopping_patience", "1", "--early_stopping_min_delta", "1000", "--num_train_epochs", "6")
    folder = train(tmp_path / "run", *autoencoder_flags, *HEADS, *stop, "--preview_epochs", "0")
    best, latest = (folder / "checkpoints" / name for name in ("best", "latest"))
    steps = [json.loads((path / "trainer_state.json").read_text())["step"] for path in (best, latest)]
    assert steps == [4, 8]
    record = json.loads((folder / "record.json").read_text())
    assert record["best"]["metric"] == "val_psnr"
    assert record["best"]["step"] == 4
    exported, kept, last = (
        load_pipeline(path).vae.state_dict() for path in (folder / "pipeline", best / "pipeline", latest / "pipeline")
    )
    assert all(torch.equal(exported[name], kept[name]) for name in exported)
    assert not torch.equal(exported["segmentation_head.0.weight"], last["segmentation_head.0.weight"])


# --- counting ------------------------------------------------------------------------------------------------------


def test_classes_are_counted_in_the_masks(tmp_path):
    lines = []
    for row, ids in enumerate(([0, 1], [3, 255], [2, 0])):
        Image.new("RGB", (2, 1)).save(tmp_path / f"{row}.png")
        Image.fromarray(np.array([ids], np.uint8)).save(tmp_path / f"{row}_mask.png")
        lines.append(json.dumps({"file_name": f"{row}.png", "mask_file_name": f"{row}_mask.png"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert count_mask_classes(DataConfig(train_data_dir=str(tmp_path))) == 4

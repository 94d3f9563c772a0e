"""training/evaluate.py with a model of each kind, as users start it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from pipelines.tools.cli import UserError
from tests.conftest import forget_accelerate
from tests.support.logs import collected
from tests.support.runs import ROOT, launch
from tests.support.tiny_published import PUBLISHED
from tests.support.wandb_files import wandb_ids, wandb_summary
from training import evaluate
from training.metrics.generators import generator_of

SCRIPT = ROOT / "training/evaluate.py"
FLAGS = ("--cpu_threads", "1", "--extractor_resolution", "32", "--num_images", "12", "--batch_size", "5")
WORDS = ["a red poster", "a blue poster of circles"]


def evaluated(*words: str) -> dict:
    """Run the command in this process; return what it wrote."""
    forget_accelerate()
    evaluate.main([*FLAGS, *words])
    return json.loads(Path(words[words.index("--output") + 1]).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """60 training images and 12 for validation, with captions and labels."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("validation", 12)):
        (folder / split).mkdir()
        lines = []
        for i in range(count):
            small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((8, 8)).save(folder / split / f"{i:02}.png")
            lines.append(json.dumps({"file_name": f"{i:02}.png", "text": WORDS[i % 2], "label": f"kind {i % 2}"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def saved(name: str, folder: Path) -> Path:
    PUBLISHED[name]().save_pretrained(folder / name)
    return folder / name


def test_the_progress_of_the_images_is_shown(tmp_path, images, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.tools.progress.SECONDS_BETWEEN_LINES", 0)
    words = ("--model", str(saved("captioned", tmp_path)), "--dataset_name", str(images), "--num_inference_steps", "1")
    evaluated(*words, "--output", str(tmp_path / "e.json"), "--replay_images", "8")
    shown = [line.split(",")[0] for line in capsys.readouterr().err.splitlines() if " of " in line and "%" in line]
    assert shown == [
        *("generated 5 of 12 (42%)", "generated 10 of 12 (83%)", "generated 12 of 12 (100%)"),
        *("for training rows 5 of 8 (62%)", "for training rows 8 of 8 (100%)"),
    ]


@pytest.mark.parametrize("name", ["captioned", "labelled", "captioned_and_labelled", "unconditional"])
def test_a_diffusion_model(tmp_path, images, name):
    model = saved(name, tmp_path)
    words = ("--model", str(model), "--dataset_name", str(images), "--num_inference_steps", "2")
    results = evaluated(*words, "--output", str(tmp_path / "e.json"), "--grid", str(tmp_path / "grid.png"))
    assert results["kind"] == "diffusion model"
    assert (results["num_images"], results["real_images"]) == (12, {"train": 60, "validation": 12})
    assert results["sampling"] == {
        "steps": 2, "scheduler": results["sampling"]["scheduler"], "guidance_scale": 2.5, "seed": 0,
    }  # fmt: skip
    assert results["extractor"]["name"] == "efficientnet-lite0"
    assert results["floor"]["images"] == 12
    assert results["floor"]["kid"]["std"] > 0
    assert results["metrics"]["kid"] > results["floor"]["kid"]["mean"] + 2 * results["floor"]["kid"]["std"]
    assert results["refused"]["fd"] == "72 images are too few for the covariance of 1280 features"
    assert [report["space"] for report in results["copies"]] == ["pixels", "latents"]
    assert "no sign of copied training images so far" in results["verdict"]
    # A class or nothing at all does not describe a single training image, a caption does.
    described = [(report["space"], report["num_images"]) for report in results.get("replay", [])]
    assert described == ([("pixels", 60), ("latents", 60)] if name.startswith("captioned") else [])
    with Image.open(tmp_path / "grid.png") as grid:
        assert min(grid.size) > 300


def test_guidance_by_an_earlier_checkpoint_in_an_interval(tmp_path, images):
    """Also of a model without conditions, which has no other guidance."""
    model = saved("unconditional", tmp_path)
    earlier = PUBLISHED["unconditional"]()
    with torch.no_grad():
        for parameter in earlier.unet.parameters():
            parameter += 0.1
    earlier.save_pretrained(tmp_path / "checkpoints/step-00000007/pipeline")
    words = ("--model", str(model), "--dataset_name", str(images), "--num_inference_steps", "2", "--output")
    own = evaluated(*words, str(tmp_path / "own.json"))
    guide = ("--guide", str(tmp_path / "checkpoints/step-00000007"), "--autoguidance_scale", "3")
    guided = evaluated(*words, str(tmp_path / "e.json"), *guide, "--guidance_interval", "[0.1,0.9]")
    facts = {name: guided["sampling"].get(name) for name in ("guide", "autoguidance_scale", "guidance_interval")}
    assert facts == {"guide": "step-00000007", "autoguidance_scale": 3, "guidance_interval": "0.1 to 0.9"}
    assert "guidance_scale" not in guided["sampling"]
    assert guided["metrics"]["kid"] != own["metrics"]["kid"]
    with pytest.raises(UserError, match="--guide .* has the same weights as the model"):
        evaluated(*words, str(tmp_path / "e.json"), "--guide", str(model))


def test_an_autoencoder_reconstructs_and_is_not_searched_for_copies(tmp_path, images):
    model = saved("autoencoder", tmp_path)
    words = ("--model", str(model), "--dataset_name", str(images), "--resolution", "16")
    results = evaluated(*words, "--output", str(tmp_path / "e.json"))
    assert results["kind"] == "autoencoder"
    assert results["num_images"] == 12
    assert 0 < results["metrics"]["psnr"] < 40
    assert "copies" not in results


def test_a_pipeline_of_diffusers(tmp_path, images):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    words = ("--model", str(tmp_path / "ddpm"), "--dataset_name", str(images), "--num_inference_steps", "2")
    results = evaluated(*words, "--output", str(tmp_path / "e.json"))
    assert results["resolution"] == 8
    assert math.isfinite(results["metrics"]["kid"])


def test_copies_in_a_folder_are_found_and_real_images_are_near(tmp_path, images):
    folder = tmp_path / "copied"
    folder.mkdir()
    for i in range(12):
        with Image.open(images / f"train/{i:02}.png") as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / f"{i}.png")
    words = ("--images", str(folder), "--dataset_name", str(images), "--resolution", "8", "--output")
    results = evaluated(*words, str(tmp_path / "e.json"), "--copies_sheet", str(tmp_path / "sheet.png"))
    (report,) = results["copies"]
    assert report["copies"] == report["exact_copies"] == 12
    assert "there are signs of copied training images: 12 of 12" in results["verdict"]
    assert (tmp_path / "sheet.png").is_file()
    own = evaluated("--images", str(images / "validation"), *words[2:], str(tmp_path / "own.json"))
    assert own["copies"][0]["copies"] <= 2
    assert abs(own["metrics"]["kid"]) < results["floor"]["kid"]["std"] * 3
    assert own["metrics"]["precision"] == 1  # they are among the real images


def test_generated_images_are_kept_and_measured_again(tmp_path, images):
    kept, model = tmp_path / "kept", ("--model", str(saved("unconditional", tmp_path)), "--num_inference_steps", "2")
    words = ("--dataset_name", str(images), "--resolution", "16", "--copy_spaces", "[]", "--output")
    first = evaluated(*model, "--keep_images", str(kept), *words, str(tmp_path / "1.json"))
    assert sorted(file.name for file in kept.iterdir()) == [f"{i:05d}.png" for i in range(12)]
    again = evaluated("--images", str(kept), *words, str(tmp_path / "2.json"))
    assert again["metrics"]["kid"] == pytest.approx(first["metrics"]["kid"], abs=1e-6)
    with pytest.raises(UserError, match="is not an empty folder; give a new folder, or empty it"):
        evaluated(*model, "--keep_images", str(kept), *words, str(tmp_path / "3.json"))
    with pytest.raises(UserError, match="is not an empty folder"):
        evaluated(*model, "--keep_images", str(tmp_path / "1.json"), *words, str(tmp_path / "3.json"))


@pytest.mark.parametrize("name", ["controlnet", "poster_controlnet"])
def test_a_controlnet_is_compared_with_other_controls(tmp_path, posters, name):
    model, reader = saved(name, tmp_path), saved("layout_encoder", tmp_path)
    words = ("--model", str(model), "--dataset_name", str(posters), "--num_inference_steps", "2", "--split", "test")
    words += ("--conditioning_image_column", "[text_mask,image_mask]", "--reader", str(reader))
    metrics = evaluated(*words, "--output", str(tmp_path / "e.json"))["metrics"]
    assert {f"{kind}_iou" for kind in ("control", "shuffled", "base", "real")} <= metrics.keys()
    assert math.isfinite(metrics["gain_in_standard_errors"])


def test_a_poster_decoder_is_compared_with_its_briefs(tmp_path, posters):
    model, reader = saved("poster_decoder", tmp_path), saved("layout_analysis", tmp_path)
    words = ("--model", str(model), "--dataset_name", str(posters), "--num_inference_steps", "2", "--split", "test")
    results = evaluated(*words, "--reader", str(reader), "--output", str(tmp_path / "e.json"))
    assert results["kind"] == "poster decoder"
    assert {"grammar_correlation", "palette_distance", "real_palette_distance"} <= results["metrics"].keys()
    assert results["metrics"]["real_palette_distance"] < results["metrics"]["palette_distance"]


def test_captions_are_scored_and_posters_too_small_to_read_are_left_out(tmp_path, posters):
    model, scorer = saved("captioned", tmp_path), saved("image_caption", tmp_path)
    words = ("--model", str(model), "--dataset_name", str(posters), "--num_inference_steps", "2", "--split", "test")
    metrics = evaluated(*words, "--scorer", str(scorer), "--output", str(tmp_path / "e.json"))["metrics"]
    assert -1 <= metrics["caption_alignment"] <= 1
    assert "picture_count_share" not in metrics


def test_pairs_that_an_image_caption_model_invents_are_compared_with_its_training_pairs(tmp_path, images):
    model = saved("image_caption", tmp_path)
    words = ("--model", str(model), "--dataset_name", str(images), "--replay_images", "7", "--split", "train")
    results = evaluated(*words, "--output", str(tmp_path / "e.json"))
    assert results["kind"] == "image–caption model"
    assert [report["num_images"] for report in results["replay"]] == [7]
    (report,) = results["invented"]["copies"]
    assert report["num_images"] == 12
    assert 0 <= results["invented"]["known_captions"] <= 1


def test_a_table_compares_several_models(tmp_path, images, capsys):
    models = [saved(name, tmp_path) for name in ("captioned", "unconditional")]
    forget_accelerate()
    words = ["--models", f"[{models[0]},{models[1]}]", "--dataset_name", str(images), "--num_inference_steps", "2"]
    evaluate.main([*FLAGS, *words, "--table", str(tmp_path / "table.md")])
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"|  | {models[0]} | {models[1]} |"
    assert any(line.startswith("| kid | ") for line in lines)
    assert lines[0] in capsys.readouterr().out


@pytest.mark.slow
def test_the_trackers_of_the_run_get_the_metrics(tmp_path, diffusion_flags):
    run = tmp_path / "run"
    flags = (*diffusion_flags, "--max_train_steps", "4", "--output_dir", str(run), "--report_to", "wandb,tensorboard")
    assert launch(ROOT / "training/train_latent_diffusion.py", *flags).returncode == 0
    words = ("--model", str(run), "--num_inference_steps", "2", *FLAGS)
    done = launch(SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    summary = wandb_summary(run)
    assert len(set(wandb_ids(run))) == 1
    for name in ("kid", "kid_standard_error", "precision", "lightness"):
        assert summary[f"quality/{name}"] == results["metrics"][name]
    assert summary["quality/kid_floor"] == results["floor"]["kid"]["mean"]
    assert summary["quality/copy_rate_pixels"] == results["copies"][0]["copy_rate"]
    assert summary["best"]["metric"] == "val_loss"  # the summary of the run itself is still there
    assert launch(SCRIPT, *words, "--report_to", "none").returncode == 0
    assert len(wandb_ids(run)) == 2


@pytest.mark.slow
def test_any_batch_size_and_number_of_processes_give_the_same_numbers(tmp_path, images):
    model = saved("captioned", tmp_path)
    words = ("--model", str(model), "--dataset_name", str(images), "--num_inference_steps", "2", *FLAGS[:6])
    metrics = []
    for number, (batch, processes) in enumerate(((1, 1), (5, 2), (12, 1))):
        output = tmp_path / f"{number}.json"
        done = launch(SCRIPT, *words, "--batch_size", str(batch), "--output", str(output), processes=processes)
        assert done.returncode == 0, done.stderr
        metrics.append(json.loads(output.read_text(encoding="utf-8"))["metrics"])
    assert "real against real" in done.stdout
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one of --model"),
        (("--model", "x", "--images", "y"), "give one of --model"),
        (("--images", "y"), "--images needs --dataset_name"),
        (("--model", "x"), "found no pipeline, run or checkpoint at 'x'"),
        (("--models", "[x]", "--output", "y"), "use --table"),
        (("--images", "y", "--dataset_name", "x", "--keep_images", "z"), "are kept already"),
        (("--model", "x", "--report_to", "wandbb"), "unknown tracker.*did you mean 'wandb'"),
        (("--model", "x", "--extractor", "efficientnet-lite9"), "its weights are not installed"),
    ],
)
def test_bad_input(words, message):
    forget_accelerate()
    with pytest.raises(UserError, match=message):
        evaluate.main(["--cpu_threads", "1", *words])


def test_a_model_without_data_and_one_that_makes_no_images(tmp_path, images):
    forget_accelerate()
    with pytest.raises(UserError, match="--dataset_name is missing"):
        evaluate.main([*FLAGS, "--model", str(saved("captioned", tmp_path))])
    with pytest.raises(UserError, match="needs images, so it cannot generate images"):
        evaluate.main([*FLAGS, "--model", str(saved("layout_encoder", tmp_path)), "--dataset_name", str(images)])


def test_every_published_kind_that_makes_images_has_a_generator():
    kinds = {}
    for name, make in PUBLISHED.items():
        if not name.startswith("layout"):
            kinds[name] = generator_of(make(), evaluate.EvaluationConfig(model="m")).kind
    assert kinds["controlnet"] == kinds["poster_controlnet"] == "ControlNet"
    assert kinds["poster_decoder"] == "poster decoder"
    assert kinds["image_caption"] == "image–caption model"


@pytest.mark.parametrize("name", ["captioned", "image_caption"])
def test_an_evaluation_names_no_unknown_words_and_later_prompts_do(name):
    pipeline = PUBLISHED[name]()
    generate = generator_of(pipeline, evaluate.EvaluationConfig(model="m", num_inference_steps=1))
    caption = f"a numbat for the {name} model"
    with collected("pipelines.common.words") as messages:
        generate([{"caption": caption}], [0])
        assert not messages
        pipeline.draw(caption) if name == "image_caption" else pipeline(caption, num_inference_steps=1)
    assert any("'numbat'" in text for _, text in messages)

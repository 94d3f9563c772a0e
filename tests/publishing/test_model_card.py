"""Model cards: they are valid for the Hub, and state the facts of the record and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipelines.common.compatibility import OLDEST_VERSIONS
from pipelines.tools.cli import UserError
from tests.support.toy import ToyConfig, ToyStage
from training.engine.session import train
from training.publishing.energy import estimated_energy
from training.publishing.model_card import (
    HUB_LICENSES,
    TEMPLATES,
    check_card,
    is_hub_dataset,
    needs_remote_code,
    write_model_card,
)

TEMPLATE_NAMES = sorted(path.name for path in TEMPLATES.glob("*.md.jinja") if path.name != "base.md.jinja")
WITHOUT_COPIES = ("autoencoder", "layout_encoder", "grammar_abstractor")
SECRET = "hf_" + "s" * 34
RECORD = {
    "stage": "latent diffusion",
    "model_name": "Posters & co",
    "license": "cc-by-4.0",
    "dataset": "ada/posters",
    "num_train_images": 1900,
    "resolution": 64,
    "steps": 1500,
    "epochs": 25.4,
    "global_batch_size": 32,
    "images_seen": 48000,
    "hardware": "1 × cpu",
    "cpu_cores": 2,
    "elapsed_seconds": 3725.4,
    "config": {
        "learning_rate": 1e-3,
        "hub_token": SECRET,
        "tokenizer": "/home/ada/secret_project/tokenizer",
        "model": {"block_out_channels": [128, 192], "norm": None},
        "condition_on": ["caption"],
    },
    "metrics": {"val_loss": 0.41234, "fid": 12.5, "nan": float("nan")},
    "best": {"metric": "val_loss", "value": 0.4, "step": 1400},
    "prompts": ["a minimalist poster | blue", 'with "quotes"\nand a newline'],
    "samples_file": "samples.png",
    "versions": {"torch": "2.13.0"},
    "hub_model_id": "ada/posters-64",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    index = {
        "_class_name": ["latent_diffusion_3f2a9c1b", "LatentDiffusionPipeline"],
        "_diffusers_version": "0.42.1",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "samples.png").write_bytes(b"a picture")
    return tmp_path


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_states_the_facts_of_the_record(folder):
    text = write_model_card(folder, "latent_diffusion.md.jinja", RECORD).read_text()
    metadata = front_matter(text)
    assert metadata.pop("model-index")[0]["name"] == "Posters & co"
    assert metadata == {
        "library_name": "diffusers",
        "license": "cc-by-4.0",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "halftone", "latent-diffusion"],
        "datasets": ["ada/posters"],
    }
    for words in (
        "# Latent diffusion on `ada/posters`\n\nThis is the model of the run Posters & co. It loads with diffusers",
        "![Samples](samples.png)",
        'DiffusionPipeline.from_pretrained("ada/posters-64", trust_remote_code=True)',
        'pipeline("a minimalist poster | blue")',
        "1,900 training images",
        "1,500 (25.4 epochs)",
        "1 h 2 min",
        "| validation loss | 0.4123 |",
        "| FID | 12.5 |",
        "| nan | not finite |",
        "Best validation loss: 0.4, at step 1,400.",
        "not measured",
        "torch 2.13.0",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("facts", "title"),
    [
        ({"stage": "distillation", "dataset": "data/posters_64"}, "Distilled latent diffusion on posters_64"),
        ({"stage": "ControlNet", "dataset": "/home/ada/my_images/"}, "ControlNet on my_images"),
        ({"stage": "poster decoder"}, "Poster decoder"),
        ({}, "run_7"),
    ],
)
def test_the_title_says_what_the_model_is_and_the_name_of_the_run_follows(tmp_path, facts, title):
    text = write_model_card(tmp_path, "latent_diffusion.md.jinja", {"model_name": "run_7", **facts}).read_text()
    assert f"\n# {title}\n" in text
    assert ("This is the model of the run run_7. It loads" in text) == ("stage" in facts)


def test_nothing_private_gets_in(folder):
    text = write_model_card(folder, "latent_diffusion.md.jinja", RECORD).read_text()
    assert SECRET not in text
    assert "hub_token" not in text
    assert "/home/ada" not in text
    assert "tokenizer: tokenizer" in text


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_an_empty_record_makes_a_card_that_claims_nothing(tmp_path, template):
    text = write_model_card(tmp_path, template, {}).read_text()
    before_code, _, after_code = text.split("---\n", 2)[2].split("```")
    for name, version in OLDEST_VERSIONS.items():  # of these, every card speaks
        before_code = before_code.replace(f"{name} {version}", "")
    assert "None" not in text
    assert "from scratch" not in text
    assert "No metrics were recorded" in text
    assert "has not specified a licence" in text
    assert "license" not in front_matter(text)
    assert not any(character.isdigit() for character in before_code + after_code.split("---")[0])


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_the_hubs_own_reader_takes_every_card(folder, template):
    from huggingface_hub import ModelCard

    for record in ({}, RECORD, {**RECORD, "license": None, "dataset": None}):
        card = ModelCard.load(write_model_card(folder, template, record))
        assert card.data.library_name == "diffusers"
        assert card.data.license == record.get("license")
        assert "\n\n\n" not in card.content


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_the_python_in_a_card_is_python(folder, template):
    text = write_model_card(folder, template, RECORD).read_text()
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, template, "exec")
    assert len([line for line in code.splitlines() if line.strip()]) <= 5


def test_a_licence_that_the_hub_does_not_know_goes_under_other(folder):
    text = write_model_card(folder, "autoencoder.md.jinja", {"license": "My Museum's Licence 2"}).read_text()
    assert front_matter(text)["license"] == "other"
    assert front_matter(text)["license_name"] == "my-museum-s-licence-2"
    assert (
        front_matter(write_model_card(folder, "autoencoder.md.jinja", {"license": "MIT"}).read_text())["license"]
        == "mit"
    )
    assert "apache-2.0" in HUB_LICENSES


def test_a_local_folder_is_not_a_dataset_on_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "my" / "pictures").mkdir(parents=True)
    assert is_hub_dataset("ada/posters")
    assert not is_hub_dataset("my/pictures")
    assert not is_hub_dataset("data/posters_64")
    assert not is_hub_dataset("/abs/pictures")
    assert not is_hub_dataset("a/b/c")
    assert not is_hub_dataset(None)
    text = write_model_card(folder, "latent_diffusion.md.jinja", {**RECORD, "dataset": "/home/ada/images"}).read_text()
    assert "datasets" not in front_matter(text)
    assert "- images (local files" in text


def test_samples_that_are_not_there_are_not_shown(folder):
    (folder / "samples.png").unlink()
    assert "samples.png" not in write_model_card(folder, "latent_diffusion.md.jinja", RECORD).read_text()


EVALUATION = {
    "model": "/home/ada/runs/posters",
    "kind": "diffusion model",
    "dataset": "/home/ada/secret_project/posters",
    "split": "validation",
    "num_images": 256,
    "real_images": {"validation": 240},
    "resolution": 64,
    "extractor": {"name": "efficientnet-lite0", "fingerprint": "0123456789abcdef0123", "resolution": 224},
    "sampling": {"steps": 25, "scheduler": "FlowMatchEulerDiscreteScheduler", "guidance_scale": None, "seed": 0},
    "metrics": {"kid": 0.0123456, "kid_standard_error": 0.00123, "fd": None, "diversity": 0.5},
    "floor": {"images": 120, "kid": {"mean": -0.0001, "std": 0.0004}},
    "real": {"diversity": 0.625},
    "refused": {"fd": "256 images are too few for the covariance of 1280 features"},
    "copies": [
        {
            "space": "pixels", "num_images": 256, "num_training": 1800, "num_held_out": 200, "threshold": 0.4,
            "false_positive_rate": 0.01, "copies": 1, "exact_copies": 0, "copy_rate": 1 / 256, "lowest_rate": 0.0007,
            "highest_rate": 0.0217,
        }
    ],
    "verdict": "no sign of copied training images so far: 1 of 256",
    "replay": [
        {
            "space": "latents", "num_images": 100, "returned": 40, "nearest": 73, "rate": 0.4, "lowest_rate": 0.309,
            "highest_rate": 0.498, "false_positive_rate": 0.02,
        }
    ],
    "invented": {"copies": [{"space": "pixels", "num_images": 64, "copies": 3}], "known_captions": 0.125},
    "step": 1500,
}  # fmt: skip
GENERATORS = [name for name in TEMPLATE_NAMES if name.split(".")[0] not in WITHOUT_COPIES]


def test_an_evaluation_is_stated_with_all_that_it_depends_on(folder):
    text = write_model_card(folder, "latent_diffusion.md.jinja", {**RECORD, "evaluation": EVALUATION}).read_text()
    for words in (
        "- images of the model (n): 256",
        "- real images: posters, 240 of validation",
        "efficientnet-lite0 at 224 pixels, fingerprint 0123456789abcdef",
        "steps 25, scheduler FlowMatchEulerDiscreteScheduler, seed 0",
        "| metric | this model | real images (mean ± SD) |",
        "| KID (lower is better) | 0.01235 (standard error 0.00123) | -0.0001 ± 0.0004 |",
        "| diversity (mean pairwise distance) | 0.5 | 0.625 |",
        "two random parts of the real images, of 120 images each.",
        "not computed: 256 images are too few for the covariance of 1280 features",
        "Verdict: no sign of copied training images so far.",
        "| pixels | 256 | 1 | 0 | 0.391 % (0.07 % to 2.17 %) | 1 % | 1,800 | 200 |",
        "| latents | 100 | 40 | 73 | 40 % (30.9 % to 49.8 %) | 2 % |",
        "12.5 % of their captions are captions of",
        "| pixels | 64 | 3 |",
    ):
        assert words in text
    assert "ot measured" not in text.split("## Limitations")[0]
    assert "/home/ada" not in text


@pytest.mark.parametrize("template", GENERATORS)
@pytest.mark.parametrize("kept", ["kid", "num_images", "copies", "nothing"])
def test_an_evaluation_that_lacks_keys_is_stated_without_them(folder, template, kept):
    some = {name: value for name, value in EVALUATION.items() if name == kept} | {"metrics": {"kid": 0.5}}
    text = write_model_card(folder, template, {**RECORD, "evaluation": some}).read_text()
    assert "| 0.5 | – |" in text
    assert "None" not in text
    assert ("Not measured. Run `training/evaluate.py" in text) == (kept != "copies")


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_what_was_not_measured_is_named_with_the_command_that_measures_it(folder, template):
    """Models that generate nothing have no distances and no copies."""
    text = write_model_card(folder, template, RECORD).read_text()
    measures_images = template.split(".")[0] not in ("layout_encoder", "grammar_abstractor")
    assert ("not measured. Run `training/evaluate.py" in text) == measures_images
    assert ("### Copies of training images\n\nNot measured" in text) == (template in GENERATORS)
    assert "Time, device and energy were not measured" in write_model_card(folder, template, {}).read_text()


def test_the_last_validation_is_stated_with_its_number_of_images_and_the_energy_as_an_estimate(folder):
    record = {**RECORD, "num_validation_images": 100, "energy": estimated_energy("cpu", 1, 2, 3600)}
    text = write_model_card(folder, "autoencoder.md.jinja", record).read_text()
    assert "on 100 validation images:" in text
    assert "- energy, a rough estimate: 0.02 kWh (10 W for each of 2 CPU cores: an assumption)" in text


def test_the_hub_reads_the_results_and_writes_them_again(folder):
    from huggingface_hub import ModelCard

    record = {**RECORD, "num_validation_images": 100, "evaluation": EVALUATION}
    data = ModelCard.load(write_model_card(folder, "latent_diffusion.md.jinja", record)).data
    known = {result.metric_type: result for result in data.eval_results}
    assert list(known) == ["kid", "diversity", "val_loss", "fid"]
    assert known["kid"].metric_value == 0.0123456
    assert known["kid"].task_type == "text-to-image"
    assert known["kid"].dataset_name == known["kid"].dataset_type == "posters"
    assert known["kid"].metric_args == {
        "num_images": 256, "extractor": "efficientnet-lite0", "floor_mean": -0.0001, "floor_std": 0.0004,
        "standard_error": 0.00123,
    }  # fmt: skip
    assert known["val_loss"].dataset_type == "ada/posters"
    assert known["val_loss"].metric_args == {"num_images": 100}
    assert yaml.safe_load(data.to_yaml()) == data.to_dict()


def test_remote_code_is_needed_where_a_class_is_not_stock(folder):
    assert needs_remote_code(folder)
    stock = {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"], "requires": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(stock))
    assert not needs_remote_code(folder)
    assert "trust_remote_code" not in write_model_card(folder, "autoencoder.md.jinja", RECORD).read_text()
    (folder / "model_index.json").write_text(json.dumps({**stock, "vae": ["my_vae", "MyVAE"]}))
    assert needs_remote_code(folder)


def test_a_model_trained_on_from_another_does_not_claim_to_be_from_scratch(folder):
    record = {**RECORD, "config": {"init_from": "/runs/first"}}
    text = write_model_card(folder, "latent_diffusion.md.jinja", record).read_text()
    assert "from scratch" not in text
    assert "from the weights of first" in text


def test_an_unknown_template_is_named_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"latent_difusion.md.jinja.*did you mean 'latent_diffusion.md.jinja'"):
        write_model_card(tmp_path, "latent_difusion.md.jinja", {})


def test_a_missing_template_is_known_before_the_first_step(tmp_path):
    class MistypedTemplate(ToyStage):
        card_template = "autoencodr.md.jinja"

    config = ToyConfig(output_dir=str(tmp_path / "run"), report_to="none", max_train_steps=1)
    with pytest.raises(UserError, match="no card template autoencodr.md.jinja .*did you mean 'autoencoder.md.jinja'"):
        train(MistypedTemplate, config)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_every_template_can_be_checked(template):
    check_card(template)

"""LoRA with train_latent_diffusion.py as users start it: what is trained, saved, resumed, published and refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from pipelines import sample
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.support.hub_server import hub  # noqa: F401  (a fixture)
from tests.support.runs import ROOT, assert_same_state, launch, rows, tensors
from tests.support.tiny_models import tiny_pipeline
from training import push_to_hub, train_latent_diffusion
from training.run.checkpoint import load_tensors

SCRIPT = ROOT / "training/train_latent_diffusion.py"
PROMPT = "a minimalist poster, blue on cream"
FILE = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = ("--lora_rank", "2", "--lora_alpha", "4", "--learning_rate", "1e-2", "--num_train_epochs", "2")
TOLERANCE = 1e-5  # images are in [0, 1]


def train(*flags: str) -> int:
    forget_accelerate()
    return train_latent_diffusion.main([*flags])


def generate(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, num_inference_steps=3, generator=0, output_type="np", num_images_per_prompt=2).images


@pytest.fixture(scope="module")
def base(tmp_path_factory, diffusion_flags) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    assert train(*diffusion_flags, "--output_dir", str(folder), "--num_train_epochs", "1", "--preview_epochs", "0") == 0
    return folder


@pytest.fixture(scope="module")
def flags(diffusion_flags, base) -> tuple[str, ...]:
    return (*diffusion_flags, *LORA, "--init_from", str(base))


@pytest.fixture(scope="module")
def run(tmp_path_factory, flags) -> Path:
    """`python training/train_latent_diffusion.py --lora_rank 2 …`, from another folder."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    done = launch(SCRIPT, *flags, "--output_dir", str(folder), cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "LoRA of rank 2" in done.stderr + done.stdout
    return folder


def test_the_base_is_unchanged_and_the_adapter_alone_is_trained_and_saved(run, base):
    """Bit for bit: all weights of the exported pipeline but those of the layers that have an adapter."""
    adapter = load_tensors(run / "pipeline/lora" / FILE)
    adapted = {key.removeprefix("unet.").split(".lora_")[0] + ".weight" for key in adapter}
    assert adapted
    before, after = load_tensors(base / "pipeline" / UNET), load_tensors(run / "pipeline" / UNET)
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == adapted
    text = "text_encoder/model.safetensors"
    frozen, same = load_tensors(base / "pipeline" / text), load_tensors(run / "pipeline" / text)
    assert all(torch.equal(frozen[key], same[key]) for key in frozen)
    assert all(adapter[key].abs().max() > 0 for key in adapter)


def test_checkpoints_optimizers_and_ema_contain_the_adapter_alone(run):
    checkpoint = run / "checkpoints/latest"
    adapter = load_tensors(run / "pipeline/lora" / FILE)
    size = sum(tensor.numel() for tensor in adapter.values())
    phase = load_tensors(checkpoint / "phase_diffusion.safetensors")
    assert set(phase) == {f"adapter.{key}" for key in adapter}
    ema = load_tensors(checkpoint / "ema.safetensors")
    assert set(ema) == set(phase)
    assert all(torch.equal(ema[f"adapter.{key}"], adapter[key]) for key in adapter)
    assert not all(torch.equal(ema[key], phase[key]) for key in phase)
    optimizer = load_tensors(checkpoint / "optimizer_diffusion.safetensors")
    assert sum(t.numel() for key, t in optimizer.items() if key.endswith("exp_avg")) == size
    assert {key.split("/")[0] for key in optimizer} == {str(i) for i in range(len(adapter))}
    record = json.loads((run / "record.json").read_text())
    assert record["trained_parameters"] == record["adapter"]["parameters"] == size
    unet = load_tensors(run / "pipeline" / UNET)
    assert record["adapter"]["model_parameters"] == sum(tensor.numel() for tensor in unet.values())


def test_the_base_with_the_adapter_draws_what_the_pipeline_of_the_run_draws(run, base):
    expected, before = generate(load_pipeline(run)), generate(load_pipeline(base))
    assert np.abs(expected - before).max() > 0.01
    pipeline = load_pipeline(base)
    pipeline.load_lora_weights(str(run / "pipeline/lora"))
    assert np.abs(generate(pipeline) - expected).max() <= TOLERANCE
    checkpoint = load_pipeline(base)
    checkpoint.load_lora_weights(str(run / "checkpoints/latest/pipeline/lora"))
    assert np.abs(generate(checkpoint) - expected).max() <= TOLERANCE


def test_a_run_killed_and_resumed_equals_the_undisturbed_one_bit_for_bit(tmp_path, run, flags, monkeypatch):
    forward = train_latent_diffusion.LatentDiffusionPhase.forward

    def terminated(self, batch, draws):
        if draws.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return forward(self, batch, draws)

    with monkeypatch.context() as patched:
        patched.setattr(train_latent_diffusion.LatentDiffusionPhase, "forward", terminated)
        assert train(*flags, "--output_dir", str(tmp_path / "run")) == 75
    assert train(*flags, "--output_dir", str(tmp_path / "run")) == 0
    assert_same_state(tmp_path / "run", run)
    ours, theirs = (tensors(folder / "pipeline", "**/*.safetensors") for folder in (tmp_path / "run", run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_moved_base_resumes_and_another_base_is_refused(tmp_path, run, flags, base, capsys):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    shutil.copytree(base, tmp_path / "moved", symlinks=True)
    more = ("--output_dir", str(tmp_path / "run"), "--num_train_epochs", "3", "--preview_epochs", "0")
    assert train(*flags, *more, "--init_from", str(tmp_path / "moved")) == 0
    assert rows(tmp_path / "run")[-1]["step"] == "12"
    file = tmp_path / "moved/pipeline" / UNET
    changed = load_tensors(file)
    changed["conv_in.bias"] = changed["conv_in.bias"] + 1
    save_file(changed, file)
    more = (*more[:3], "4", *more[4:], "--init_from", str(tmp_path / "moved"))
    done = launch(SCRIPT, *flags, *more)
    assert done.returncode == 2
    assert "the base model of the run" in done.stderr
    assert "fingerprint" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--init_from", "null"), ["--lora_rank 2", "--init_from"]),
        (("--lora_rank", "0"), ["--lora_alpha 4", "--lora_rank"]),
        (("--lora_targets", "[attenton]"), ["attenton", "attention"]),
        (("--model.layers_per_block", "2"), ["--init_from", "unet differs"]),
        (("--init_from", "/nowhere/run"), ["/nowhere/run"]),
    ],
)
def test_flags_that_do_not_fit_are_one_message(tmp_path, flags, changes, words, capsys):
    with pytest.raises(UserError) as error:
        train(*flags, "--output_dir", str(tmp_path / "run"), *changes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_sample_draws_with_an_adapter_and_its_scale_and_refuses_that_of_another_network(tmp_path, run, base):
    images = {}
    common = ("--prompt", PROMPT, "--num_images", "1", "--num_inference_steps", "2", "--scale", "1", "--no_titles")
    cases = {
        "base": (base,),
        "lora": (base, "--lora", str(run)),
        "half": (base, "--lora", str(run / "pipeline/lora"), "--lora_scale", "0.5"),
        "run": (run,),
    }
    for name, (model, *more) in cases.items():
        file = tmp_path / f"{name}.png"
        assert not sample.main(["--model", str(model), *common, *more, "--output", str(file)])
        images[name] = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert np.abs(images["lora"] - images["run"]).max() <= 1
    assert np.abs(images["lora"] - images["base"]).max() > 1
    assert np.abs(images["half"] - images["base"]).max() > 0
    assert np.abs(images["half"] - images["lora"]).max() > 0
    assert Image.open(tmp_path / "half.png").text["lora_scale"] == "0.5"
    tiny_pipeline().save_pretrained(tmp_path / "other")
    script = ROOT / "pipelines/sample.py"
    done = launch(script, "--model", str(tmp_path / "other"), *common, "--lora", str(run))
    assert done.returncode == 2
    assert "made for another network" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_hub_gets_the_adapter_alone_with_a_card_that_names_its_base(tmp_path, run, base, hub):  # noqa: F811
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    assert push_to_hub.main([str(tmp_path / "run"), "--hub_model_id", "adapter"]) == 0
    files = hub.files("ada/adapter")
    assert set(files) - {".gitattributes"} == {FILE, "README.md", "samples.png"}
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert "lora" in header["tags"]
    assert 'pipeline.load_lora_weights("ada/adapter")' in card
    with safe_open(run / "pipeline/lora" / FILE, "pt") as opened:
        fingerprint = opened.metadata()["base_fingerprint"]
    assert fingerprint[:12] in card
    assert "base, which is not on the Hub" in card
    assert str(base.parent) not in card


def test_the_card_of_an_adapter_of_a_published_base_links_to_it(tmp_path, flags, base, hub):  # noqa: F811
    shutil.copytree(base, tmp_path / "base", symlinks=True)
    assert push_to_hub.main([str(tmp_path / "base"), "--hub_model_id", "base"]) == 0
    more = ("--max_train_steps", "1", "--preview_epochs", "0", "--output_dir", str(tmp_path / "tuned"))
    assert train(*flags, *more, "--init_from", str(tmp_path / "base"), "--push_to_hub") == 0
    files = hub.files("ada/tuned")
    assert FILE in files
    assert "model_index.json" not in files
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["base_model"], header["base_model_relation"]) == ("ada/base", "adapter")
    assert 'DiffusionPipeline.from_pretrained("ada/base", trust_remote_code=True)' in card

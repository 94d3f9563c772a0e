"""Every script of the project is run once as users type it, with flags that make it tiny, each on what others made."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from data_scripts.make_emoji import find_font
from pipelines.tools.cli import UserError
from tests.repository.test_site import generate_reference
from tests.scripts.conftest import COMMON, TINY_AUTOENCODER, TINY_DIFFUSION
from tests.scripts.test_distill_latent_diffusion import TINY as TINY_STUDENT
from tests.scripts.test_train_controlnet import MASKS
from tests.scripts.test_train_controlnet import TINY as TINY_CONTROLNET
from tests.scripts.test_train_decoder import TINY as TINY_DECODER
from tests.scripts.test_train_image_caption import TINY as TINY_CAPTIONS
from tests.scripts.test_train_layout import COMMON as LAYOUT
from tests.scripts.test_train_layout import TINY_ABSTRACTOR, TINY_ENCODER
from tests.support.hub_server import HubServer, hub  # noqa: F401  (a fixture)
from tests.support.runs import ROOT, environment
from tests.support.tiny_captioners import save_blip

pytestmark = pytest.mark.slow

# Scripts that start many others, and take minutes, or that need models of their own: the tests that run them.
ELSEWHERE = {
    "training/quickstart.py": "tests/scripts/test_quickstart.py",
    "training/evaluate.py": "tests/scripts/test_evaluate.py",
    "training/innovate.py": "tests/scripts/test_innovate.py",
    "training/doctor.py": "tests/scripts/test_doctor.py",
    "pipelines/demo.py": "tests/pipelines/test_studio.py",
    "training/run_experiments.py": "tests/scripts/test_run_experiments.py",
    "training/finetune_decoder.py": "tests/scripts/test_finetune_decoder.py",
    "training/benchmarks/run.py": "tests/benchmarks/test_benchmarks.py",
    "training/benchmarks/recipes.py": "tests/benchmarks/test_recipes.py",
    "training/hpc/submit.py": "tests/hpc/test_scripts.py",
}
SCRIPTS = [path.relative_to(ROOT).as_posix() for path in generate_reference.scripts()]
# No test runs commands that need other machines or an account: srun and sbatch (a cluster), torchrun and accelerate
# launch on several GPUs, hf auth login, wandb login. tests/repository/test_readme.py parses them.
SHARES = ("--validation_fraction", "0.1", "--test_fraction", "0.1")
DATA = ("--dataset_name", "data/posters")
SHORT = ("--max_train_steps", "2", "--preview_epochs", "0")

# (script, flags, a file that it makes or an empty string), in an order in which each finds what it needs.
COMMANDS: list[tuple[str, Sequence[str], str]] = [
    (
        "data_scripts/make_posters.py",
        ("--output_dir", "data/posters", "--num_posters", "40", "--num_workers", "1", *SHARES),
        "data/posters/contact_sheet.png",
    ),
    ("data_scripts/make_emoji.py", ("--output_dir", "data/emoji", "--resolution", "8"), "data/emoji"),
    (
        "data_scripts/import_captions.py",
        ("scans.json", "--image_dir", "scans", "--output_dir", "data/scans"),
        "data/scans/metadata.jsonl",
    ),
    (
        "data_scripts/caption_images.py",
        ("--train_data_dir", "pictures", "--model", "captioner", "--max_new_tokens", "6"),
        "pictures/metadata.jsonl",
    ),
    (
        "data_scripts/check_dataset.py",
        ("--train_data_dir", "data/scans", "--near_duplicates_dir", "copies"),
        "copies/near_duplicates.png",
    ),
    (
        "data_scripts/make_controls.py",
        (*DATA, "--kind", "soft_edges", "--output_dir", "data/controls", "--num_workers", "1"),
        "data/controls/contact_sheet.png",
    ),
    ("data_scripts/train_tokenizer.py", (*DATA, "--output_dir", "data/tokenizer"), "data/tokenizer/tokenizer.json"),
    (
        "training/train_autoencoder.py",
        (*COMMON, *TINY_AUTOENCODER, *DATA, *SHORT, "--output_dir", "runs/autoencoder"),
        "runs/autoencoder/pipeline/README.md",
    ),
    (
        "data_scripts/precompute_latents.py",
        (*DATA, "--vae", "runs/autoencoder", "--output_dir", "data/latents"),
        "data/latents",
    ),
    (
        "training/train_latent_diffusion.py",
        (
            *(*COMMON, *TINY_DIFFUSION, *DATA, *SHORT, "--tokenizer", "data/tokenizer", "--vae", "runs/autoencoder"),
            *("--latent_cache", "data/latents", "--output_dir", "runs/diffusion"),
        ),
        "runs/diffusion/pipeline/README.md",
    ),
    (
        "training/train_controlnet.py",
        (
            *(*COMMON, *TINY_CONTROLNET, *DATA, *MASKS, *SHORT, "--base_model", "runs/diffusion"),
            *("--output_dir", "runs/controlnet"),
        ),
        "runs/controlnet/pipeline/README.md",
    ),
    (
        "training/distill_latent_diffusion.py",
        (*COMMON, *TINY_STUDENT, *DATA, *SHORT, "--teacher", "runs/diffusion", "--output_dir", "runs/distilled"),
        "runs/distilled/pipeline/README.md",
    ),
    (
        "training/train_encoder.py",
        (*LAYOUT, *TINY_ENCODER, *DATA, *SHORT, "--output_dir", "runs/encoder"),
        "runs/encoder/pipeline/README.md",
    ),
    (
        "training/train_abstractor.py",
        (*LAYOUT, *TINY_ABSTRACTOR, *DATA, *SHORT, "--encoder", "runs/encoder", "--output_dir", "runs/abstractor"),
        "runs/abstractor/pipeline/README.md",
    ),
    (
        "training/train_decoder.py",
        (*TINY_DECODER, *DATA, *SHORT, "--output_dir", "runs/decoder"),
        "runs/decoder/pipeline/README.md",
    ),
    (
        "training/train_image_caption.py",
        (*TINY_CAPTIONS, *DATA, *SHORT, "--output_dir", "runs/joint"),
        "runs/joint/pipeline/README.md",
    ),
    (
        "pipelines/sample.py",
        ("--model", "runs/diffusion", "--prompt", "a poster", "--num_inference_steps", "2", "--output", "grid.png"),
        "grid.png",
    ),
    (
        "pipelines/caption.py",
        ("scans/0.png", "--model", "runs/joint", "--output", "captions.jsonl"),
        "captions.jsonl",
    ),
    ("pipelines/analyze.py", ("scans/0.png", "--model", "runs/abstractor", "--output_dir", "report"), "report"),
    (
        "pipelines/export.py",
        ("--model", "runs/diffusion", "--format", "onnx", "--output", "exported"),
        "exported/onnx_latent_diffusion.py",
    ),
    ("training/push_to_hub.py", ("runs/diffusion", "--hub_model_id", "diffusion"), "runs/diffusion/hub.json"),
    (
        "training/benchmarks/pixels.py",
        (
            *(
                "--train_data_dir",
                "pictures",
                "--resolution",
                "16",
                "--max_train_steps",
                "6",
                "--train_batch_size",
                "2",
            ),
            *("--block_out_channels", "[32,32]", "--output_dir", "runs/pixels"),
        ),
        "runs/pixels/model_index.json",
    ),
    (
        "training/benchmarks/captions.py",
        ("--side", "memory", "--preset", "tiny", "--batch_size", "0", "--device", "cpu", "--output", "captions.json"),
        "captions.json",
    ),
    ("training/benchmarks/decoder.py", ("--batch_size", "0", "--output", "decoder.json"), "decoder.json"),
    (
        "training/hpc/make_inputs.py",
        ("data/few_posters", "--configs", "autoencoder/few.yaml"),
        "data/few_posters/contact_sheet.png",
    ),
    (
        "training/hpc/requeue.py",
        ("--status", "0", "--run", "runs/diffusion", "--job", "12_1", "--log_dir", "hpc"),
        "",
    ),
]
# A config with an input that it makes, for make_inputs.py.
FEW = """
dataset_name: data/few_posters
output_dir: runs/few
prepare:
  data/few_posters: data_scripts/make_posters.py --output_dir data/few_posters --num_posters 12 --num_workers 1
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "scans").mkdir()
    save_blip(folder / "captioner")
    for number in range(4):
        Image.linear_gradient("L").rotate(90 * (number % 3)).convert("RGB").save(folder / "scans" / f"{number}.png")
    shutil.copytree(folder / "scans", folder / "pictures")
    lines = [{"file_name": f"{number}.png", "caption": f"scan {number}"} for number in range(4)]
    (folder / "scans.json").write_text(json.dumps(lines), encoding="utf-8")
    (folder / "autoencoder").mkdir()
    (folder / "autoencoder/few.yaml").write_text(FEW, encoding="utf-8")
    return folder


def test_every_script_is_among_these() -> None:
    listed = {script for script, _, _ in COMMANDS} | ELSEWHERE.keys()
    assert set(SCRIPTS) == listed
    for test in ELSEWHERE.values():
        assert (ROOT / test).is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_has_help(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.startswith("usage: ")
    assert "--help" in done.stdout


@pytest.mark.parametrize(("script", "flags", "made"), COMMANDS, ids=lambda value: value if ".py" in value else "")
def test_it_runs(script: str, flags: Sequence[str], made: str, workplace: Path, hub: HubServer) -> None:  # noqa: F811
    if script == "data_scripts/make_emoji.py":
        try:
            find_font(None)
        except UserError:
            pytest.skip("needs a colour emoji font")
    variables = environment(PYTHONPATH=str(ROOT), **hub.env())
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags], cwd=workplace, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert (workplace / made).exists()

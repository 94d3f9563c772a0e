"""A finished run folder says nothing about its user: no token, no home folder and no user name in any of its files."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.scripts.conftest import COMMON
from tests.support.runs import ROOT, command, environment
from tests.support.tiny_models import tiny_text_encoder, tiny_tokenizer
from tests.support.wandb_files import wandb_summary

pytestmark = pytest.mark.slow

USER, TOKEN = "jóna-qvist", "hf_" + "Qv7" * 12
DIFFUSION, EVALUATE = ROOT / "training/train_latent_diffusion.py", ROOT / "training/evaluate.py"


class Home:
    """The home folder of a user with an unusual name, who starts commands in it."""

    def __init__(self, folder: Path):
        self.path = folder / USER
        self.path.mkdir()
        names = ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "NETRC")
        variables = {
            "HOME": str(self.path), "USER": USER, "LOGNAME": USER, "USERNAME": USER, "HF_TOKEN": TOKEN,
            "HF_DATASETS_CACHE": str(self.path / ".cache/datasets"), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.environment = {name: value for name, value in environment(**variables).items() if name not in names}

    def run(self, script: Path, *flags: str, status: int = 0) -> str:
        done = subprocess.run(
            command(script, *flags), cwd=self.path, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def private_files(self, folder: Path) -> dict[str, list[str]]:
        """Return what is private in the names and the bytes of all files below `folder`."""
        found: dict[str, list[str]] = {}
        secrets = {"token": TOKEN, "home": str(self.path), "user": USER}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            content = path.read_bytes() if path.is_file() else b""
            text = name.encode() + b"\n" + content
            spelled = {
                w: (s.encode(), json.dumps(s)[1:-1].encode(), ascii(s)[1:-1].encode()) for w, s in secrets.items()
            }
            here = [what for what, spellings in spelled.items() if any(spelling in text for spelling in spellings)]
            if here:
                found[name] = here
        return found


def flags_without_paths(flags: Sequence[str]) -> list[str]:
    pairs = zip(flags[::2], flags[1::2], strict=True)
    left_out = ("--dataset_name", "--tokenizer", "--vae", "--report_to")
    return [word for pair in pairs for word in pair if pair[0] not in left_out]


@pytest.fixture(scope="module")
def home(tmp_path_factory, posters, tokenizer, autoencoder) -> Home:
    home = Home(tmp_path_factory.mktemp("homes"))
    for folder, name in ((posters, "posters"), (tokenizer, "tokenizer"), (autoencoder, "autoencoder")):
        shutil.copytree(folder, home.path / name, symlinks=True)
    return home


@pytest.fixture(scope="module")
def run(home, diffusion_flags) -> Path:
    """A run of two sessions with an evaluation. Its paths are typed in full, and for the second session with ~."""
    given = flags_without_paths(diffusion_flags)
    folder = home.path / "runs" / "latent"
    for steps, start in (("2", str(home.path)), ("4", "~"), ("4", str(home.path))):
        paths = {"output_dir": "runs/latent", "dataset_name": "posters", "tokenizer": "tokenizer", "vae": "autoencoder"}
        typed = [word for name, path in paths.items() for word in (f"--{name}", f"{start}/{path}")]
        output = home.run(DIFFUSION, *given, *typed, "--report_to", "wandb,tensorboard", "--max_train_steps", steps)
    assert "the run in" in output
    assert "complete: 4 steps" in output
    words = ("--num_images", "8", "--extractor_resolution", "32", "--num_inference_steps", "2", "--cpu_threads", "1")
    home.run(EVALUATE, "--model", str(folder), *words)
    return folder


def test_no_file_of_a_run_names_the_user(home, run):
    wandb_summary(run)  # waits for its files
    assert home.private_files(run) == {}


def test_the_test_would_notice_private_words(home, run, tmp_path):
    (tmp_path / "state.bin").write_bytes(b"\0" + json.dumps(f"{home.path}/x {TOKEN}").encode())
    assert home.private_files(tmp_path) == {"state.bin": ["token", "home", "user"]}


def test_no_file_of_a_run_from_cached_latents_and_its_controlnet_names_the_user(home, run, diffusion_flags):
    given, start = flags_without_paths(diffusion_flags), home.path
    tiny_text_encoder().save_pretrained(start / "clip")
    tiny_tokenizer().save_pretrained(start / "clip")
    data = ("--dataset_name", f"{start}/posters", "--resolution", "64", "--vae", f"{start}/autoencoder")
    home.run(ROOT / "data_scripts/precompute_latents.py", *data, "--output_dir", f"{start}/latents")
    latents = ("--latent_cache", f"{start}/latents", "--vae", f"{start}/autoencoder", "--dataset_name", data[1])
    encoder = ("--pretrained_text_encoder", f"{start}/clip", "--tokenizer", f"{start}/clip", "--report_to", "none")
    home.run(DIFFUSION, *given, *latents, *encoder, "--max_train_steps", "2", "--output_dir", f"{start}/runs/cached")
    base = ("--base_model", str(run), "--dataset_name", data[1], "--report_to", "none", "--max_train_steps", "2")
    small = ("--train_batch_size", "4", "--num_previews", "1", "--preview_inference_steps", "2")
    masks = ("--conditioning_image_column", "[text_mask,image_mask]", *small, *COMMON[2:])
    home.run(ROOT / "training/train_controlnet.py", *base, *masks, "--output_dir", f"{start}/runs/controlnet")
    assert home.private_files(start / "runs") == {}
    assert home.private_files(start / "latents") == {}


def test_settings_name_the_home_folder_by_a_tilde(run):
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["dataset_name"] == "~/posters"
    assert config["vae"] == "~/autoencoder"
    assert json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["dataset"] == "~/posters"
    assert "--output_dir '~/runs/latent'" in (run / "sessions.md").read_text(encoding="utf-8")


def test_a_run_of_an_earlier_version_resumes(home, run, diffusion_flags, tmp_path):
    """Its config.yaml contains the paths as they were typed."""
    older = shutil.copytree(run, home.path / "older", symlinks=True)
    file = older / "config.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("~/", f"{home.path}/"), encoding="utf-8")
    words = ("--config", str(older / "config.yaml"), "--output_dir", str(older), "--max_train_steps", "4")
    output = home.run(DIFFUSION, *words)
    assert "complete: 4 steps" in output
    assert "moved" not in output
    for file in (run, older):  # and the config.yaml of this version starts the same run elsewhere
        words = ("--config", str(file / "config.yaml"), "--output_dir", "~/copies/run", "--dry_run", "--print_config")
        assert "posters" in home.run(DIFFUSION, *words)

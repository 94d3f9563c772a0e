"""Runs and pipelines from before the code moved into folders: the runs resume, and the pipelines load.

The code of the commit `BEFORE` is unpacked and started as users started it. Then the current code takes over.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipelines.common.poster_domain import COLOR_ROLES
from tests.scripts.conftest import COMMON, TINY_AUTOENCODER, TINY_DIFFUSION
from tests.support.environments import environment_without_halftone
from tests.support.runs import ROOT, environment, rows, tensors

# The first test that runs starts all runs that it needs, so each one may take long.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BEFORE = "2f86a53"
INTERRUPTED = ROOT / "tests/support/interrupted.py"
PUBLISHED = ROOT / "tests/support/published.py"
# Two epochs of four steps each; the run is stopped in the second epoch.
STEPS, STOPPED_AT = 8, 4
TWO_EPOCHS = ("--num_train_epochs", "2")
# Keys of trainer_state.json that depend on the clock or on the number of sessions.
OF_THE_SESSION = {"elapsed_seconds", "sessions", "tracker_id"}
# Heads, a second phase that starts late, and learned loss weights: everything that a checkpoint may contain.
AUTOENCODER = (
    *("--heads", "[segmentation,classification]", "--mask_column", "color_role"),
    *("--mask_class_names", f"[{','.join(COLOR_ROLES)}]", "--learned_loss_weights", "true"),
    *("--adversarial_weight", "0.1", "--discriminator_start", "2"),
)
CACHED = ("--condition_on", "[caption,label]", "--balance_by", "style", "--caption_prior.hidden_size", "16")
CONTROLNET = (
    *("--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"),
    *("--lr_warmup_steps", "0", "--num_previews", "2", "--preview_inference_steps", "2", "--num_read", "3"),
    *("--conditioning_image_column", "[text_mask, image_mask]"),
)
# Pipelines that are not made by a run here; they are built from the tiny models in the tests of that commit.
SAVE_TINY_PIPELINES = """
import sys
from pathlib import Path

from tests import test_layout_analysis, test_poster_decoder, tiny_captions, tiny_controlnets

here = Path(sys.argv[1])
test_layout_analysis.tiny_pipeline().save_pretrained(here / "layout_analysis")
test_poster_decoder.tiny_decoder().save_pretrained(here / "poster_decoder")
tiny_controlnets.tiny_controlled_decoder("film").save_pretrained(here / "poster_controlnet")
tiny_captions.tiny_caption_pipeline().save_pretrained(here / "image_caption")
"""
TINY_PIPELINES = ("layout_analysis", "poster_decoder", "poster_controlnet", "image_caption")


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """The folder with the code of the commit `BEFORE`."""
    known = ["git", "-C", str(ROOT), "cat-file", "-e", f"{BEFORE}^{{commit}}"]
    if shutil.which("git") is None or subprocess.run(known, capture_output=True).returncode != 0:
        pytest.skip(f"the commit {BEFORE} is not in this clone (a shallow one, or no clone at all)")
    folder = tmp_path_factory.mktemp("before")
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", BEFORE], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def python(code: Path, *words: str | Path, status: int = 0, cwd: Path | None = None) -> None:
    """Run Python with the arguments `words` and the packages in the folder `code`."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd or code, env=environment(PYTHONPATH=str(code)), capture_output=True, text=True,
    )  # fmt: skip
    output = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == status, f"status {done.returncode} of {' '.join(map(str, words))}\n{output}"


def known_before(*flags: str) -> tuple[str, ...]:
    """Leave out the option that the old code does not have. The current code then completes the command by itself."""
    at = flags.index("--recipe")
    return flags[:at] + flags[at + 2 :]


class Trials:
    """Runs of each stage: complete ones of the old code, and ones that it started and the current code finished."""

    def __init__(self, before: Path, folder: Path):
        self.before, self.folder = before, folder
        self.posters, self.tokenizer, self.cache = folder / "posters", folder / "tokenizer", folder / "latents"
        shares = ("--validation_fraction", "0.1", "--test_fraction", "0.1", "--num_workers", "1")
        self._old("data_scripts/make_posters.py", "--num_posters", "40", *shares, "--output_dir", self.posters)
        self._old("data_scripts/train_tokenizer.py", *self.data, "--output_dir", self.tokenizer)

    @property
    def data(self) -> tuple[str, ...]:
        return "--dataset_name", str(self.posters)

    def _old(self, script: str, *flags: str | Path) -> None:
        python(self.before, self.before / script, *flags, cwd=self.folder)

    def flags(self, case: str) -> tuple[str, tuple[str, ...]]:
        """Return the stage and the flags of a case; make the inputs that it needs."""
        if case == "autoencoder":
            return "autoencoder", (*COMMON, *known_before(*TINY_AUTOENCODER), *AUTOENCODER, *self.data)
        vae = self.whole("autoencoder")
        inputs = (*self.data, "--tokenizer", str(self.tokenizer), "--vae", str(vae))
        diffusion = (*COMMON, *known_before(*TINY_DIFFUSION), *inputs)
        if case == "latent_diffusion":
            return "latent_diffusion", diffusion
        if case == "latent_diffusion_cached":
            if not self.cache.exists():
                encoded = ("--resolution", "64", "--mask_column", "color_role", "--vae", vae)
                self._old("data_scripts/precompute_latents.py", *self.data, *encoded, "--output_dir", self.cache)
            return "latent_diffusion", (*diffusion, *CACHED, "--latent_cache", str(self.cache))
        assert case == "controlnet"
        base = self.whole("latent_diffusion")
        return "controlnet", (*COMMON, *CONTROLNET, *self.data, "--base_model", str(base))

    def whole(self, case: str) -> Path:
        """Return a complete run of the old code that was never interrupted."""
        run = self.folder / "whole" / case
        if not run.exists():
            stage, flags = self.flags(case)
            self._old(f"training/train_{stage}.py", *flags, *TWO_EPOCHS, "--output_dir", run)
        return run

    def begun_before(self, case: str) -> Path:
        """Return a run that the old code started, a SIGTERM stopped in mid-epoch, and the current code finished."""
        run = self.folder / "begun" / case
        stage, flags = self.flags(case)
        script, words = f"training/train_{stage}.py", (*flags, *TWO_EPOCHS, "--output_dir", run)
        stopped = (INTERRUPTED, str(STOPPED_AT), self.before / script)
        python(self.before, *stopped, *words, status=75, cwd=self.folder)
        step = state(run)["step"]
        assert STEPS // 2 < step < STEPS, f"stopped after step {step}, but should have stopped in its second epoch"
        python(ROOT, ROOT / script, *words, cwd=self.folder)
        return run


def state(run: Path) -> dict:
    return json.loads((run / "checkpoints/latest/trainer_state.json").read_text(encoding="utf-8"))


def pipeline_tensors(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "pipeline").rglob("*.safetensors"))
    # Text encoders were saved without the prefix that older versions of Transformers need.
    return {
        f"{file.parent.name}:{name.removeprefix('text_model.')}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


def assert_equal_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert expected
    assert actual.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert different == [], f"{len(different)} of {len(expected)} tensors differ"


@pytest.fixture(scope="module")
def trials(before, tmp_path_factory) -> Trials:
    return Trials(before, tmp_path_factory.mktemp("trials"))


@pytest.mark.parametrize("case", ["autoencoder", "latent_diffusion", "latent_diffusion_cached", "controlnet"])
def test_a_run_begun_before_ends_with_the_same_bits(trials, case):
    whole, run = trials.whole(case), trials.begun_before(case)
    assert_equal_tensors(tensors(run), tensors(whole))
    assert_equal_tensors(pipeline_tensors(run), pipeline_tensors(whole))
    earlier = rows(whole)
    # The loss by noise level was added since; every other value is the same.
    assert [{name: row[name] for name in earlier[0]} for row in rows(run)] == earlier
    ours, theirs = state(run), state(whole)
    shared = ours.keys() & theirs.keys() - OF_THE_SESSION
    assert ours["step"] == STEPS
    for name in shared:
        value = ours[name]
        if isinstance(value, dict):  # metrics may have been added
            value = {key: value[key] for key in theirs[name]}
        assert value == theirs[name], name


def test_measured_latent_statistics_are_the_same(trials):
    """Compare the latent statistics of the finished autoencoder, which are in its config and not among its tensors."""
    runs = (trials.whole("autoencoder"), trials.folder / "begun/autoencoder")
    if not runs[1].exists():
        trials.begun_before("autoencoder")
    configs = [json.loads((run / "pipeline/vae/config.json").read_text(encoding="utf-8")) for run in runs]
    assert configs[0]["latents_mean"]
    for name in ("latents_mean", "latents_std", "scaling_factor"):
        assert configs[0][name] == configs[1][name]


@pytest.fixture(scope="module")
def published(trials, tmp_path_factory) -> dict[str, Path]:
    """One pipeline folder of each kind, written by the old code."""
    folder = tmp_path_factory.mktemp("published")
    script = folder / "save.py"
    script.write_text(SAVE_TINY_PIPELINES)
    python(trials.before, script, folder, cwd=folder)
    folders = {name: folder / name for name in TINY_PIPELINES}
    for case in ("autoencoder", "latent_diffusion", "latent_diffusion_cached", "controlnet"):
        folders[case] = folder / case
        folders[case].symlink_to(trials.whole(case) / "pipeline")
    return folders


@pytest.fixture(scope="module")
def outputs(trials, published, tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """Outputs of all pipelines with the old code, with the current code, and without Halftone."""
    here = tmp_path_factory.mktemp("outputs")
    folders = list(published.values())
    python(trials.before, PUBLISHED, "pipelines.loading", here / "before.npz", *folders, cwd=here)
    python(ROOT, PUBLISHED, "pipelines.tools.loading", here / "now.npz", *folders, cwd=here)
    outside = environment_without_halftone(here / "venv")
    done = subprocess.run(
        [outside, PUBLISHED, "diffusers", here / "alone.npz", *folders],
        cwd=here, env=environment(PYTHONPATH="", HF_HOME=str(here / "cache"), HF_HUB_OFFLINE="1"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: dict(np.load(here / f"{name}.npz")) for name in ("before", "now", "alone")}


@pytest.mark.parametrize("how", ["now", "alone"])
def test_pipelines_published_before_give_the_same_outputs(outputs, how):
    expected, actual = outputs["before"], outputs[how]
    kinds = {name.split("/")[0] for name in expected}
    assert kinds > set(TINY_PIPELINES)
    assert len(kinds) == 8
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(actual[name], expected[name])] == []
    assert all(value.std() > 0 for name, value in expected.items() if name.endswith("/images")), "a blank image"

"""A run resumes with inputs that were moved, if their content is the same, and with no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_scripts import precompute_latents
from pipelines.tools.cli import UserError
from tests.conftest import forget_accelerate
from tests.scripts.conftest import COMMON, TINY_AUTOENCODER, TINY_DIFFUSION
from tests.support.runs import tensors
from tests.support.tiny_captions import draw_folder
from training import train_autoencoder, train_latent_diffusion
from training.data import source as data_source


def run(train, flags, folder: Path, steps: int) -> int:
    forget_accelerate()
    data_source._open_source.cache_clear()
    return train.main([*flags, "--output_dir", str(folder), "--max_train_steps", str(steps)])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "images", 20, (64, 64))


def with_data(folder: Path | str, flag: str = "--train_data_dir") -> tuple[str, ...]:
    return (*COMMON, *TINY_AUTOENCODER, flag, str(folder))


@pytest.fixture
def begun(tmp_path, images) -> Path:
    """A run of an autoencoder that has done one step of three."""
    assert run(train_autoencoder, with_data(images), tmp_path / "run", 1) == 0
    return tmp_path / "run"


@pytest.mark.parametrize(
    "place",
    [
        "copy",
        "link",
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("trailing slash", "relative", "other flag")),
    ],
)
def test_the_same_images_at_another_place(tmp_path, images, begun, place, capsys, monkeypatch):
    moved: Path | str = tmp_path / "scratch/images"
    if place == "copy":
        shutil.copytree(images, moved)
        shutil.rmtree(images)
    elif place == "trailing slash":
        moved = f"{images}/"
    elif place == "relative":
        monkeypatch.chdir(tmp_path)
        moved = "images"
    elif place == "link":
        (tmp_path / "scratch").mkdir()
        Path(moved).symlink_to(images)
    else:
        moved = images
    flags = with_data(moved, "--dataset_name" if place == "other flag" else "--train_data_dir")
    assert run(train_autoencoder, flags, begun, 3) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "the data moved" in line]
    assert len(told) == 1
    assert "and its content is the same" in told[0]
    whole = draw_folder(tmp_path / "again", 20, (64, 64))
    assert run(train_autoencoder, with_data(whole), tmp_path / "whole", 3) == 0
    one, other = tensors(begun), tensors(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert run(train_autoencoder, flags, begun, 4) == 0  # the new place is now that of the run
    assert "the data moved" not in capsys.readouterr().out


@pytest.mark.parametrize("moved", [True, False])
def test_other_images_with_the_same_number_of_rows_are_refused(tmp_path, images, begun, moved):
    folder = images
    if moved:
        folder = tmp_path / "other"
        shutil.copytree(images, folder)
    Image.new("RGB", (64, 64), "white").save(sorted(folder.glob("*.png"))[7])
    before = sorted(path.name for path in (begun / "checkpoints").iterdir())
    with pytest.raises(UserError, match=r"the data of the run in .* had another content.*fingerprint .* then, .* now"):
        run(train_autoencoder, with_data(folder), begun, 3)
    assert sorted(path.name for path in (begun / "checkpoints").iterdir()) == before


def test_a_checkpoint_without_fingerprints_resumes_as_before(tmp_path, images, begun):
    from training.run import checkpoint

    folder = (begun / "checkpoints/latest").resolve()
    state = json.loads((folder / "trainer_state.json").read_text())
    del state["inputs"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / checkpoint.MANIFEST).unlink()
    checkpoint._seal(folder)
    shutil.copytree(images, tmp_path / "moved")
    with pytest.raises(UserError, match=r"other settings: --train_data_dir: .*images → .*moved"):
        run(train_autoencoder, with_data(tmp_path / "moved"), begun, 3)
    assert run(train_autoencoder, with_data(images), begun, 2) == 0
    assert json.loads((begun / "checkpoints/latest/trainer_state.json").read_text())["inputs"]["data"]


@pytest.fixture
def diffusion(tmp_path, posters, tokenizer, autoencoder) -> dict[str, Path]:
    """Inputs of a diffusion model, at a place of their own, with a cache of its latents."""
    inputs = {"tokenizer": tokenizer, "vae": autoencoder / "pipeline"}
    for name, source in inputs.items():
        inputs[name] = Path(shutil.copytree(source, tmp_path / "first" / name))
    cache = tmp_path / "first/cache"
    flags = f"--dataset_name {posters} --vae {inputs['vae']} --resolution 64 --output_dir {cache}"
    assert precompute_latents.main(flags.split()) == 0
    return {**inputs, "latent_cache": cache}


def diffusion_flags(inputs: dict[str, Path]) -> tuple[str, ...]:
    return (*COMMON, *TINY_DIFFUSION, *(word for name, path in inputs.items() for word in (f"--{name}", str(path))))


def test_a_vae_a_tokenizer_and_a_cache_at_another_place(tmp_path, diffusion, capsys):
    assert run(train_latent_diffusion, diffusion_flags(diffusion), tmp_path / "run", 1) == 0
    shutil.move(tmp_path / "first", tmp_path / "second")
    moved = {name: tmp_path / "second" / path.name for name, path in diffusion.items()}
    assert run(train_latent_diffusion, diffusion_flags(moved), tmp_path / "run", 2) == 0
    output = capsys.readouterr().out
    for name in ("vae", "tokenizer", "latent cache"):
        assert f"the {name} moved, and its content is the same" in output


@pytest.mark.parametrize("name", ["tokenizer", "vae"])
def test_another_tokenizer_or_vae_at_the_same_place_is_refused(tmp_path, posters, diffusion, name):
    del diffusion["latent_cache"]
    flags = (*diffusion_flags(diffusion), "--dataset_name", str(posters))
    assert run(train_latent_diffusion, flags, tmp_path / "run", 1) == 0
    if name == "tokenizer":
        file = diffusion[name] / "tokenizer.json"
        content = json.loads(file.read_text())
        words = content["model"]["vocab"]
        content["model"]["vocab"] = {("other" if i == 9 else word): i for word, i in words.items()}
        file.write_text(json.dumps(content))
    else:
        from safetensors.torch import load_file, save_file

        file = next(diffusion[name].rglob("vae/*.safetensors"))
        tensors = load_file(file)
        first = sorted(tensors)[0]
        save_file({**tensors, first: tensors[first] + torch.tensor(0.5)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"the {name} of the run in .* had another content"):
        run(train_latent_diffusion, flags, tmp_path / "run", 2)

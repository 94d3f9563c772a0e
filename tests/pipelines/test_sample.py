"""sample.py as users call it, and the kinds of `--model`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.common.design_brief import FIELDS, DesignBrief
from pipelines.sample import BRIEF_FIELDS, main, parse_arguments, read_briefs
from pipelines.tools.cli import UserError
from pipelines.tools.grids import PLAIN_GAP as GAP
from pipelines.tools.loading import find_pipeline, load_pipeline
from tests.support.hub_server import HubServer, hub  # noqa: F401  (a fixture)
from tests.support.tiny_controlnets import (
    CLASSES,
    MASKS,
    PICTURE,
    controlled,
    tiny_controlled,
    tiny_controlled_decoder,
    tiny_net,
)
from tests.support.tiny_models import tiny_pipeline

SIDE, SHOWN = 8, 128  # pixels of a tiny image, and of the same image in a grid
SCRIPT = Path(__file__).parent.parent.parent / "pipelines" / "sample.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    tiny_pipeline("flow_prediction", classes=2).save_pretrained(folder)
    return folder


def cells(path: Path, rows: int, columns: int) -> np.ndarray:
    """Return the images of a grid, which shows each pixel as a square: rows columns SIDE SIDE 3."""
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (rows * (SHOWN + GAP) + GAP, columns * (SHOWN + GAP) + GAP, 3)
    starts = [GAP + i * (SHOWN + GAP) for i in range(max(rows, columns))]
    shown = np.array([[sheet[y : y + SHOWN, x : x + SHOWN] for x in starts[:columns]] for y in starts[:rows]])
    factor = SHOWN // SIDE
    images = shown[:, :, ::factor, ::factor]
    assert np.array_equal(shown, images.repeat(factor, 2).repeat(factor, 3))
    return images


def test_prompts_are_rows_and_seeds_columns(model, tmp_path, capsys):
    common = ["--model", str(model), "--num_inference_steps", "3", "--device", "cpu", "--no_titles"]
    grid = tmp_path / "new" / "grid.png"
    main([*common, "--prompt", "a red poster", "blue", "--num_images", "3", "--seed", "4", "--output", str(grid)])
    assert str(grid) in capsys.readouterr().out
    drawn = cells(grid, 2, 3)
    assert len({image.tobytes() for image in drawn.reshape(6, -1)}) == 6
    # Generate one of the images again on its own.
    alone = tmp_path / "alone.png"
    main([*common, "--prompt", "blue", "--num_images", "1", "--seed", "6", "--output", str(alone)])
    assert np.abs(cells(alone, 1, 1)[0, 0].astype(int) - drawn[1, 2]).max() <= 1
    split = tmp_path / "split.png"
    arguments = ["--prompt", "a red poster", "blue", "--num_images", "3", "--seed", "4", "--batch_size", "4"]
    main([*common, *arguments, "--output", str(split)])
    assert np.abs(cells(split, 2, 3).astype(int) - drawn).max() <= 1


def test_labels_sampler_size_and_precision(model, tmp_path):
    output = tmp_path / "grid.png"
    arguments = ["--class_label", "kind 1", "0", "--scheduler", "dpm", "--num_images", "2", "--dtype", "bfloat16"]
    size = ["--height", "16", "--width", "16", "--num_inference_steps", "2", "--device", "cpu", "--no_titles"]
    main(["--model", str(model), *arguments, *size, "--output", str(output)])
    assert Image.open(output).size == (2 * (SHOWN + GAP) + GAP, 2 * (SHOWN + GAP) + GAP)


def test_an_unconditional_model(tmp_path):
    tiny_pipeline(text=False).save_pretrained(tmp_path / "model")
    output = tmp_path / "grid.png"
    main(
        ["--model", str(tmp_path / "model"), "--num_images", "3", "--num_inference_steps", "2", "--output", str(output)]
    )
    drawn = cells(output, 1, 3)
    assert len({image.tobytes() for image in drawn[0]}) == 3


# --- design briefs


def paint(decoder: Path, output: Path, *arguments: str) -> np.ndarray:
    size = ["--height", str(SIDE), "--width", str(SIDE), "--num_inference_steps", "3", "--device", "cpu", "--no_titles"]
    main(["--model", str(decoder), *size, "--output", str(output), *arguments])
    side = SHOWN + GAP
    shape = Image.open(output).size
    return cells(output, (shape[1] - GAP) // side, (shape[0] - GAP) // side).astype(int)


def test_a_brief_from_a_file_and_from_flags(decoder, tmp_path):
    file = tmp_path / "brief.yaml"
    file.write_text("style: swiss\npalette: ['#d33', '#fff']\npictures: 2\nenergy: 0.8\n")
    options = ["--num_images", "2", "--scheduler", "ddim", "--guidance_scale", "4"]
    from_file = paint(decoder, tmp_path / "file.png", "--brief", str(file), *options)
    fields = ["--style", "swiss", "--palette", "#d33,#fff", "--pictures", "2", "--energy", "0.8"]
    assert np.abs(paint(decoder, tmp_path / "flags.png", *fields, *options) - from_file).max() <= 1
    other = paint(decoder, tmp_path / "other.png", "--brief", str(file), "--style", "pop", *options)
    assert np.abs(other - from_file).max() > 1, "a flag overrides the file"
    assert from_file.shape[:2] == (1, 2)


def test_several_briefs_are_rows_and_none_means_an_empty_one(decoder, tmp_path):
    (tmp_path / "a.yaml").write_text("style: swiss")
    rows = paint(decoder, tmp_path / "rows.png", "--brief", str(tmp_path / "a.yaml"), "random", "--num_images", "3")
    assert rows.shape[:2] == (2, 3)
    assert paint(decoder, tmp_path / "none.png", "--num_images", "2").shape[:2] == (1, 2)


def test_a_random_brief_depends_on_the_seed_and_is_printed(decoder, tmp_path, capsys):
    paint(decoder, tmp_path / "grid.png", "--brief", "random", "--seed", "3", "--pictures", "0", "--num_images", "1")
    printed = capsys.readouterr().out.split("1 x 1 images")[0]
    (tmp_path / "again.yaml").write_text(printed)
    again = DesignBrief.from_yaml(tmp_path / "again.yaml")
    assert again.to_dict() == DesignBrief.random(3).to_dict() | {"pictures": 0}


def test_every_field_is_a_flag():
    assert set(BRIEF_FIELDS) == set(FIELDS)
    values = dict.fromkeys(FIELDS, "0.5") | {"style": "pop", "palette": "red", "pictures": "1", "text_blocks": "1"}
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    (brief,) = read_briefs(parse_arguments(["--model", "m", *words]))
    assert set(brief.to_dict()) == set(FIELDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--style", "swis"], "style must be one of swiss, .*, but is 'swis'; did you mean 'swiss'"),
        (["--palette", "#d33,blurple"], "palette: 'blurple' is not a colour"),
        (["--energy", "1.2"], r"energy must be a number in \[0, 1\], but is 1.2"),
        (["--pictures", "7"], "pictures must be a whole number from 0 to 3, but is 7"),
        (["--balance", "high"], "--balance: invalid float value: 'high'"),
        (["--brief", "none.yaml"], "found no file 'none.yaml'"),
        (
            ["--prompt", "a poster"],
            "^PosterDecoderPipeline does not accept --prompt; use --brief, --style, --palette",
        ),
        (["--class_label", "0"], "PosterDecoderPipeline does not accept --class_label"),
        (["--height", "9"], "`height` must be a multiple of 2"),
    ],
)
def test_bad_briefs(decoder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(["--model", str(decoder), "--num_inference_steps", "1", *arguments])


@pytest.mark.parametrize("arguments", [["--brief", "random"], ["--style", "pop"], ["--pictures", "0"]])
def test_a_latent_diffusion_model_does_not_accept_a_brief(model, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    flag = arguments[0]
    with pytest.raises(
        UserError, match=f"^LatentDiffusionPipeline does not accept {flag}; use --prompt or --class_label"
    ):
        main(["--model", str(model), *arguments])


# --- controls


@pytest.fixture(scope="module")
def steered(tmp_path_factory) -> Path:
    """Save a latent diffusion model with a ControlNet for two masks."""
    folder = tmp_path_factory.mktemp("steered") / "pipeline"
    tiny_controlled("film", MASKS).save_pretrained(folder)
    return folder


def save_masks(folder: Path, names: str, side: int = SIDE) -> list[str]:
    """Save a random mask for each letter, as a grey image."""
    for letter in names:
        noise = np.random.default_rng(ord(letter)).integers(0, 2, (side, side), dtype=np.uint8) * 255
        Image.fromarray(noise).save(folder / f"{letter}.png")
    return [str(folder / f"{letter}.png") for letter in names]


def steer(model: Path, output: Path, *arguments: str) -> np.ndarray:
    """Return the images of the grid, rows columns SIDE SIDE 3; the first column shows the controls."""
    fixed = ["--num_inference_steps", "3", "--device", "cpu", "--no_titles", "--output", str(output)]
    main(["--model", str(model), *fixed, *arguments])
    width, height = Image.open(output).size
    return cells(output, height // (SHOWN + GAP), width // (SHOWN + GAP)).astype(int)


def test_one_control_for_several_prompts_is_shown_in_every_row(steered, tmp_path):
    files = save_masks(tmp_path, "ab")
    common = ["--control_image", *files, "--num_images", "2"]
    drawn = steer(steered, tmp_path / "grid.png", *common, "--prompt", "a red poster", "blue")
    assert drawn.shape[:2] == (2, 3)
    masks = [np.asarray(Image.open(file)) for file in files]
    for row in drawn:
        assert np.array_equal(row[0].max(2), np.maximum(masks[0], masks[1] * 0.9).round())
    alone = steer(steered, tmp_path / "alone.png", *common, "--prompt", "blue", "--num_images", "1", "--seed", "1")
    assert np.abs(alone[0, 1] - drawn[1, 2]).max() <= 1
    without = steer(steered, tmp_path / "base.png", "--num_images", "2", "--prompt", "a red poster", "blue")
    weak = [*common, "--controlnet_conditioning_scale", "0", "--prompt", "a red poster", "blue"]
    assert np.abs(without - steer(steered, tmp_path / "weak.png", *weak)[:, 1:]).max() <= 1
    assert np.abs(without - drawn[:, 1:]).max() > 1


@pytest.mark.parametrize("prompt", [[], ["--prompt", "blue"], ["--prompt", "blue", "a red poster"]])
def test_several_controls_are_rows(steered, tmp_path, prompt):
    files = save_masks(tmp_path, "abcd")
    both = steer(steered, tmp_path / "both.png", *prompt, "--num_images", "3", "--control_image", *files)
    assert both.shape[:2] == (2, 4)
    of_last = [*prompt[:1], *prompt[1:][-1:]]
    last = steer(steered, tmp_path / "last.png", *of_last, "--num_images", "3", "--control_image", *files[2:])
    assert np.abs(last[0] - both[1]).max() <= 1
    parts = ["--batch_size", "2", "--num_images", "3", "--control_image", *files]
    assert np.abs(steer(steered, tmp_path / "parts.png", *prompt, *parts) - both).max() <= 1


def test_briefs_with_a_control(tmp_path):
    tiny_controlled_decoder().save_pretrained(tmp_path / "model")
    size = ["--height", str(SIDE), "--width", str(SIDE)]
    common = [*size, "--num_images", "1", "--control_image", *save_masks(tmp_path, "ab")]
    (tmp_path / "brief.yaml").write_text("style: swiss")
    briefs = ["--brief", str(tmp_path / "brief.yaml"), "random"]
    drawn = steer(tmp_path / "model", tmp_path / "grid.png", *common, *briefs)
    assert drawn.shape[:2] == (2, 2)
    assert np.array_equal(drawn[0, 0], drawn[1, 0])
    (swiss,) = steer(tmp_path / "model", tmp_path / "one.png", *common, "--style", "swiss")
    assert np.abs(swiss - drawn[0]).max() <= 1
    assert steer(tmp_path / "model", tmp_path / "open.png", *common).shape[:2] == (1, 2)


def test_files_are_assigned_to_two_controlnets_in_order_each_with_its_scale(tmp_path):
    base = tiny_pipeline()
    nets = tiny_net(base, "add", MASKS, 1), tiny_net(base, "gated", PICTURE, 2)
    controlled(base, *nets).save_pretrained(tmp_path / "two")
    controlled(base, nets[1]).save_pretrained(tmp_path / "one")
    masks = save_masks(tmp_path, "ab")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(tmp_path / "c.png")
    files = [*masks, str(tmp_path / "c.png")]
    two = steer(
        tmp_path / "two", tmp_path / "2.png", "--prompt", "blue", "--num_images", "1", "--control_image", *files,
        "--controlnet_conditioning_scale", "0", "1",
    )  # fmt: skip
    assert two.shape[:2] == (1, 3)
    assert np.array_equal(two[0, 1], np.asarray(Image.open(files[2])))
    arguments = ["--prompt", "blue", "--num_images", "1", "--control_image", files[2]]
    assert np.abs(steer(tmp_path / "one", tmp_path / "1.png", *arguments)[0] - two[0, 1:]).max() <= 1


def test_a_control_of_another_size_and_the_same_aspect_ratio_is_scaled_with_a_message(steered, tmp_path, capsys):
    files = save_masks(tmp_path, "ab", side=2 * SIDE)
    large = steer(steered, tmp_path / "large.png", "--control_image", *files)
    assert f"{files[0]} is 16×16 pixels; it is scaled to 8×8." in capsys.readouterr().out
    for file in files:
        image = Image.open(file)
        image.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(file)
    assert np.array_equal(steer(steered, tmp_path / "small.png", "--control_image", *files), large)
    assert "scaled" not in capsys.readouterr().out


def test_class_ids_are_resized_with_nearest_neighbour(tmp_path):
    """An average of two class ids would be the id of a third class."""
    tiny_controlled("add", CLASSES).save_pretrained(tmp_path / "model")
    ids = np.zeros((2 * SIDE, 2 * SIDE), dtype=np.uint8)
    ids[:, SIDE - 1 :] = 2
    Image.fromarray(ids).save(tmp_path / "ids.png")
    arguments = ["--num_images", "1", "--control_image", str(tmp_path / "ids.png")]
    shown = steer(tmp_path / "model", tmp_path / "grid.png", *arguments)[0, 0]
    assert {tuple(color) for color in shown.reshape(-1, 3)} == {(255, 0, 0), (0, 0, 255)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--control_image", "a.png"], r"has 1 files, but .* takes 2 .*: 2 grey images \(text_mask, image_mask\)"),
        (["--control_image", "a.png", "b.png", "c.png"], "has 3 files, but this model takes 2 for each control"),
        (["--control_image", "a.png", "none.png"], "--control_image none.png cannot be read as an image .No such file"),
        (
            ["--control_image", "a.png", "words.png"],
            "--control_image words.png cannot be read as an image .cannot identify",
        ),
        (
            ["--control_image", "a.png", "wide.png"],
            "wide.png is 16×8 pixels, but the generated image is 8×8, .*; crop",
        ),
        (["--control_image", "a.png", "b.png", "--height", "9"], "`height` must be a multiple of 2"),
        (
            ["--control_guidance_start", "0.5"],
            "--control_guidance_start has no effect without a control",
        ),
        (
            ["--control_image", "a.png", "b.png", "--control_guidance_end", "0"],
            "`control_guidance_start` must be below `control_guidance_end`",
        ),
        (
            ["--control_image", "a.png", "b.png", "--controlnet_conditioning_scale", "1", "1"],
            "`controlnet_conditioning_scale` has 2 entries for 1 ControlNets",
        ),
        (
            ["--control_image", *["a.png", "b.png", "b.png", "a.png"], "--prompt", "blue", "red", "a"],
            "--control_image has 2 controls and --prompt 3 entries",
        ),
    ],
)
def test_bad_controls(steered, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_masks(tmp_path, "abc")
    (tmp_path / "words.png").write_text("hello")
    Image.new("L", (2 * SIDE, SIDE)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match=message):
        main(["--model", str(steered), "--num_inference_steps", "1", *arguments])


@pytest.mark.parametrize("arguments", [["--control_image", "a.png"], ["--controlnet_conditioning_scale", "1"]])
def test_a_model_without_a_controlnet_does_not_accept_a_control(model, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    save_masks(tmp_path, "a")
    with pytest.raises(UserError, match="^LatentDiffusionPipeline does not accept --control.* no ControlNet; use"):
        main(["--model", str(model), *arguments])


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheduler", "ddim"], "'ddim' does not suit this model.*use one of dpm, dpm_sde, euler, unipc, heun"),
        (["--scheduler", "eular"], "unknown scheduler 'eular'"),
        (["--promt", "a"], "unknown argument --promt; did you mean 'prompt'"),
        (["--class_label", "cat"], "'cat', which is not a class of this model; its classes are kind 0, kind 1"),
        (["--prompt", "a", "--height", "9"], "`height` must be a multiple of 2"),
        (["--num_images", "0"], "--num_images must be at least 1, but is 0"),
        (["--num_images", "many"], "--num_images: invalid int value: 'many'"),
        (["--prompt", "a", "--output", "grid.txt"], "--output must be an image file"),
        (["--prompt", "a", "--device", "warp9"], "--device warp9 cannot be used here"),
        (["--prompt", "a", "b", "--class_label", "0", "1", "0"], "--prompt has 2 entries and --class_label 3"),
    ],
)
def test_bad_input(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(["--model", str(model), "--num_inference_steps", "1", *arguments])


def test_as_a_program_bad_input_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, SCRIPT, "--model", "runs/none/such"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "RANK": "0"})
    assert result.returncode == 2
    assert result.stderr.startswith("error: found no pipeline, run or checkpoint at 'runs/none/such'")
    assert len(result.stderr.splitlines()) == 1


# --- kinds of --model


@pytest.fixture
def run(tmp_path) -> Path:
    """Create a run folder like that of a training run, with empty pipelines."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (10, 20):
        (checkpoints / f"step-{step:08d}" / "pipeline").mkdir(parents=True)
        (checkpoints / f"step-{step:08d}" / "pipeline" / "model_index.json").write_text("{}")
    (checkpoints / "best").symlink_to("step-00000010")
    (checkpoints / "latest").symlink_to("step-00000020")
    return tmp_path / "run"


def test_a_run_gives_its_final_pipeline_or_its_best_or_its_latest_checkpoint(run):
    def resolved(*arguments) -> str:
        return find_pipeline(*arguments).resolve().relative_to(run.resolve()).as_posix()

    best, latest = "checkpoints/step-00000010/pipeline", "checkpoints/step-00000020/pipeline"
    assert resolved(run) == resolved(run / "checkpoints" / "best") == resolved(run, "best") == best
    for path in ((run, "latest"), (run, "step-00000020"), (run / "checkpoints" / "latest",)):
        assert resolved(*path) == latest
    (run / "pipeline").mkdir()
    (run / "pipeline" / "model_index.json").write_text("{}")
    assert resolved(run) == resolved(run / "pipeline") == "pipeline"
    shutil.rmtree(run / "pipeline")
    (run / "checkpoints" / "best").unlink()
    assert resolved(run) == latest


def test_a_folder_without_a_pipeline_is_an_error_that_lists_what_exists(run, tmp_path):
    with pytest.raises(UserError, match="no checkpoint 'bets' with a pipeline; did you mean 'best'"):
        find_pipeline(run, "bets")
    with pytest.raises(UserError, match="does not contain a pipeline"):
        find_pipeline(tmp_path)
    (run / "pipeline").mkdir()
    (run / "pipeline" / "model_index.json").write_text('{"_class_name": "LatentDiffusionPipeline"}')
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pipeline(run)


def test_custom_code_is_not_run_without_permission(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": ["their_code", "Theirs"]}')
    (tmp_path / "their_code.py").write_text("raise RuntimeError('run')\n")
    with pytest.raises(UserError, match="--trust_remote_code"):
        load_pipeline(tmp_path)


@pytest.mark.slow
def test_a_hub_id_is_downloaded(hub: HubServer, model, tmp_path, monkeypatch):  # noqa: F811
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    HfApi().create_repo("ada/posters")
    HfApi().upload_folder(repo_id="ada/posters", folder_path=model)
    # Use a new process: the client keeps the endpoint that was set when it was imported.
    environment = {**os.environ, **hub.env(home=tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, SCRIPT, "--model", "ada/posters", "--prompt", "blue", "--num_inference_steps", "2"]
    command += ["--no_titles"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    cells(tmp_path / "grid.png", 1, 4)


def test_a_hub_id_that_cannot_be_downloaded_is_a_user_error(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'ada/nothing' is not a local folder and cannot be downloaded from the Hub"):
        find_pipeline("ada/nothing")

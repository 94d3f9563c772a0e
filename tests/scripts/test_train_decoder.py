"""train_decoder.py as users start it: all parameters train, fields of briefs are dropped as configured, and resuming.

B samples, L fields of a brief.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Image
from diffusers import DiffusionPipeline

from pipelines.common.design_brief import DesignBrief, brief_tensors
from pipelines.common.poster_domain import GRAMMAR
from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.support.runs import ROOT, assert_same_state, launch, rows
from training import train_decoder
from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.data.briefs import PARTS, drop_fields
from training.data.images import load_split
from training.run.checkpoint import load_tensors

SCRIPT = ROOT / "training/train_decoder.py"
CONFIGS = sorted((ROOT / "configs/experiments/posters").glob("decoder*.yaml"))
BRIEF = {"style": "swiss", "palette": ["cream", "red"], "pictures": 1}
TINY = (
    *("--report_to", "none", "--cpu_threads", "1", "--logging_steps", "1", "--resolution", "32"),
    *("--model.block_out_channels", "[16,32]", "--model.norm_num_groups", "8", "--model.attention_head_dim", "8"),
    *("--model.layers_per_block", "1", "--model.attention_resolutions", "[16]"),
    *("--brief_encoder.token_width", "16", "--brief_encoder.global_width", "16"),
    *("--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"),
    *("--lr_warmup_steps", "0", "--num_previews", "2", "--preview_inference_steps", "2"),
)


@pytest.fixture(scope="session")
def flags(posters) -> tuple[str, ...]:
    return (*TINY, "--dataset_name", str(posters))


def train(folder: Path, flags, *more: str) -> int:
    forget_accelerate()
    return train_decoder.main([*flags, "--output_dir", str(folder), "--num_train_epochs", "1", *more])


def stage_of(flags, *more: str) -> train_decoder.PosterDecoderStage:
    return train_decoder.PosterDecoderStage(parse_config(train_decoder.Config, [*flags, *more]), StageContext())


def generate(pipeline, brief=BRIEF, **options) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(brief, num_inference_steps=3, generator=generator, output_type="np", **options).images


@pytest.fixture(scope="module")
def launched(tmp_path_factory, flags) -> Path:
    """`python training/train_decoder.py …`, two epochs of four steps, from another folder."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    done = launch(SCRIPT, *flags, "--output_dir", str(folder), "--num_train_epochs", "2", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder


def test_the_run_folder_is_complete(launched):
    files = {"config.yaml", "metrics.csv", "training_curves.png", "run.log", "record.json"}
    assert {path.name for path in launched.iterdir()} >= files | {"samples", "checkpoints", "pipeline"}
    samples = {"epoch_0001.png", "epoch_0002.png", "progress.png"}
    assert {p.name for p in (launched / "samples").iterdir()} == samples
    assert "Step 8 of 8 (epoch 2 of 2) after 1 session" in (launched / "sessions.md").read_text()
    card = (launched / "pipeline/README.md").read_text()
    assert "generates posters of 32 × 32 pixels from design briefs" in card
    assert rows(launched)[-1]["val_loss"]


def test_the_pipeline_draws_here_and_as_remote_code_alike(launched):
    ours = generate(load_pipeline(launched))
    theirs = generate(DiffusionPipeline.from_pretrained(launched / "pipeline", trust_remote_code=True))
    assert ours.shape == (1, 32, 32, 3)
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, generate(load_pipeline(launched), {"style": "pop"}, guidance_scale=5.0))


def test_the_pipeline_has_the_ema_weights(launched):
    ema = load_tensors(launched / "checkpoints/latest/ema.safetensors")
    for folder in (launched / "pipeline", launched / "checkpoints/latest/pipeline"):
        for part in ("unet", "brief_encoder"):
            exported = load_tensors(folder / part / "diffusion_pytorch_model.safetensors")
            assert all(torch.equal(tensor, ema[f"{part}.{name}"]) for name, tensor in exported.items())


@pytest.mark.parametrize("attention", ["[16]", "[]"])
def test_every_parameter_trains(tmp_path, flags, attention):
    """Every parameter changes, except those of fields that no row has (the grammar, in an old dataset)."""
    more = ("--model.attention_resolutions", attention, "--checkpointing_steps", "1", "--checkpoints_total_limit", "99")
    # With half of the fields dropped, a few steps reach the parameters of absent fields as well as all others.
    more += ("--field_dropout", "0.5", "--preview_epochs", "0", "--weight_decay", "0", "--num_train_epochs", "2")
    train(tmp_path / "run", flags, *more)
    first, last = (
        load_tensors(tmp_path / f"run/checkpoints/step-{step:08d}/phase_decoder.safetensors") for step in (1, 8)
    )
    still = {key for key in first if torch.equal(first[key], last[key])}
    has_grammar = bool(stage_of(flags).train_data().brief(0).balance is not None)
    no_grammar = {f"brief_encoder.numbers.{3 + i}.{w}" for i in range(len(GRAMMAR)) for w in ("weight", "bias")}
    assert still == (set() if has_grammar else no_grammar)
    assert {key.split(".")[0] for key in first} == {"unet", "brief_encoder"}
    assert any("attn2" in key for key in first) == (attention != "[]")


TRANSFORMER = (
    *("--denoiser", "transformer", "--transformer.hidden_size", "16", "--transformer.num_layers", "1"),
    *("--transformer.num_attention_heads", "2", "--transformer.bottleneck_size", "4", "--transformer.conv_layers", "1"),
    *("--prediction_type", "flow_prediction", "--timestep_sampling", "logit_normal", "--logit_mean", "0.8"),
)


def test_a_transformer_denoises_in_the_place_of_the_unet(tmp_path, flags):
    """It trains, follows its brief, is resumed with the same bits, and draws as remote code."""
    more = (*TRANSFORMER, "--learning_rate", "1e-2", "--field_dropout", "0.5", "--weight_decay", "0")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(whole, flags, *more, "--num_train_epochs", "2") == 0
    for _ in range(2):
        assert train(halves, flags, *more, "--extra_epochs", "1") == 0
    assert_same_state(halves, whole)
    state = load_tensors(whole / "checkpoints/latest/phase_decoder.safetensors")
    assert {key.split(".")[0] for key in state} == {"transformer", "brief_encoder"}
    ours = generate(load_pipeline(whole))
    theirs = generate(DiffusionPipeline.from_pretrained(whole / "pipeline", trust_remote_code=True))
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, generate(load_pipeline(whole), {"style": "pop"}, guidance_scale=5.0))
    with pytest.raises(ValueError, match="multiple of 8 \\(the transformer's patch size\\), but is 36"):
        generate(load_pipeline(whole), height=36)


def test_the_vector_of_a_brief_reaches_the_transformer(flags):
    """Not only the tokens: the network's prediction changes with the vector alone."""
    torch.manual_seed(0)
    network = stage_of(flags, *TRANSFORMER).phase.denoiser
    torch.nn.init.normal_(network.modulation_out.weight)
    torch.nn.init.normal_(network.convolutions.last.weight)
    x, tokens = torch.randn(1, 3, 32, 32), torch.randn(1, 5, 16)
    one, other = (network(x, 500, tokens, torch.full((1, 16), value)).sample for value in (0.0, 1.0))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--prediction_type", "v_prediction"), "requires --prediction_type flow_prediction, which is v_prediction"),
        (("--transformer.patch_size", "12"), "--transformer.patch_size 12 must divide the side of the samples"),
    ],
)
def test_a_transformer_that_cannot_be_trained(flags, more, message):
    with pytest.raises(UserError, match=message):
        stage_of(flags, *TRANSFORMER, *more)


# --- sessions


@pytest.mark.slow
def test_sessions_add_up(tmp_path, launched, flags):
    """Two sessions of one epoch each (--extra_epochs) give the same weights and rows as one session of two epochs."""
    for _ in range(2):
        assert train(tmp_path / "run", flags, "--extra_epochs", "1") == 0
    assert_same_state(tmp_path / "run", launched)


@pytest.mark.slow
def test_two_epochs_and_two_more_are_four_at_once(tmp_path, flags):
    """Launched as users do: the weights are equal, and so are the rows of metrics; none is missing or repeated."""
    for folder, sessions in (("parts", 2), ("once", 1)):
        for _ in range(sessions):
            epochs = str(4 // sessions)
            done = launch(SCRIPT, *flags, "--output_dir", str(tmp_path / folder), "--extra_epochs", epochs)
            assert done.returncode == 0, done.stderr
    assert_same_state(tmp_path / "parts", tmp_path / "once")
    steps = [int(row["step"]) for row in rows(tmp_path / "parts")]
    assert steps == list(range(1, 17))
    state = json.loads((tmp_path / "parts/checkpoints/latest/trainer_state.json").read_text())
    assert (state["sessions"], state["step"]) == (2, 16)


def test_a_start_from_other_weights(tmp_path, launched, flags):
    more = ("--init_from", str(launched), "--learning_rate", "1e-12", "--max_train_steps", "1", "--weight_decay", "0")
    train(tmp_path / "run", flags, *more, "--preview_epochs", "0")
    trained = load_tensors(tmp_path / "run/checkpoints/latest/phase_decoder.safetensors")
    source = load_tensors(launched / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(trained[f"unet.{name}"], tensor, atol=1e-9) for name, tensor in source.items())


# --- briefs


def test_batches_carry_the_briefs_of_their_rows(flags):
    stage = stage_of(flags)
    data = stage.train_data()
    batch = fetch(data, [SampleKey(i, 0) for i in (3, 1)])
    stored = load_split(stage.config, "train", 0)
    expected = brief_tensors([DesignBrief.from_row(stored[i]) for i in (3, 1)])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["brief"].keys() == expected.keys()
    assert all(torch.equal(batch["brief"][name], tensor) for name, tensor in expected.items())
    assert stored[3]["style"] == data.brief(3).style


def whole_briefs(count: int) -> dict[str, torch.Tensor]:
    brief = brief_tensors([DesignBrief()] * count)
    return {name: torch.ones_like(t) if name.endswith("present") else t for name, t in brief.items()}


def kept(field_dropout: float, cfg_dropout: float, count: int = 4000) -> torch.Tensor:
    """Return which fields are left after dropping. B L."""
    brief = drop_fields(whole_briefs(count), Draws(0, 5, range(count)), field_dropout, cfg_dropout)
    return torch.cat([brief[f"{name}_present"] for name in PARTS], 1).float()


def test_fields_are_dropped_at_the_rate_asked_for_full_and_sparse_briefs_alike():
    left = kept(0.1, 0.0)
    # Without the palette, whose later colours are dropped with the earlier ones. The dropped shares are distributed as
    # Beta(1/9, 1), with a standard deviation of 0.2, over 4,000 briefs.
    assert left[:, :14].mean(0).sub(0.9).abs().max() < 4 * 0.3 / 4000**0.5
    shares = left[:, :14].mean(1)
    assert (shares == 1).float().mean() > 0.5, "most briefs are whole"
    assert 0.03 < (shares < 0.5).float().mean() < 0.12, "some are sparse"


def test_the_whole_brief_is_dropped_at_its_own_rate():
    gone = (kept(0.0, 0.1).sum(1) == 0).float().mean()
    assert abs(gone - 0.1) < 3 * (0.1 * 0.9 / 4000) ** 0.5
    assert kept(0.0, 0.0).all()
    assert not kept(1.0, 0.0).any()
    assert not kept(0.0, 1.0).any()


def test_a_palette_is_lost_from_its_end():
    palette = kept(0.5, 0.0)[:, 14:]
    assert (palette[:, 1:] <= palette[:, :-1]).all()
    assert {int(n) for n in palette.sum(1)} == set(range(6))


def test_what_was_absent_stays_absent_and_nothing_is_changed_in_place():
    brief = brief_tensors([DesignBrief(style="pop")] * 8)
    before = {name: tensor.clone() for name, tensor in brief.items()}
    left = drop_fields(brief, Draws(0, 0, range(8)), 0.3, 0.3)
    assert all(torch.equal(brief[name], before[name]) for name in brief)
    assert not left["numbers_present"].any()


def test_validation_drops_nothing(flags, monkeypatch):
    stage = stage_of(flags, "--cfg_dropout", "1.0")
    batch = fetch(stage.train_data(), [SampleKey(i, i) for i in range(4)])
    seen = []
    forward = stage.brief_encoder.forward
    monkeypatch.setattr(stage.brief_encoder, "forward", lambda **brief: seen.append(brief) or forward(**brief))
    with torch.no_grad():
        stage.phase(batch, Draws(0, 0, range(4)))
        stage.validation_step(batch, Draws(0, "validation", range(4)))
    assert not seen[0]["style_present"].any()
    assert seen[1]["style_present"].all()


# --- bad input


def save(rows_: dict, folder: Path) -> Path:
    """Save a dataset of these columns, with a black image in each row."""
    from PIL import Image as PILImage

    count = len(next(iter(rows_.values())))
    table = Dataset.from_dict({"image": [PILImage.new("RGB", (32, 32))] * count, **rows_}).cast_column("image", Image())
    DatasetDict({"train": table}).save_to_disk(folder)
    return folder


def test_another_kind_of_dataset_is_one_message(tmp_path):
    folder = save({"style": ["pop"] * 16, "text": ["a poster"] * 16}, tmp_path / "pictures")
    with pytest.raises(UserError, match="is not a poster dataset: .* no column energy, .*make_posters.py") as caught:
        train(tmp_path / "run", TINY, "--dataset_name", str(folder))
    assert "\n" not in str(caught.value)


def test_an_impossible_brief_names_row_column_and_what_is_allowed(tmp_path):
    columns = {"style": ["pop"] * 16, **{name: [0.5] * 16 for name in ("energy", "formality", "warmth")}}
    columns |= {"palette": [["#ffffff", "#000000"]] * 16, "text_blocks": [1] * 16, "pictures": [0] * 16}
    columns["energy"][3] = 1.5
    folder = save(columns, tmp_path / "posters")
    with pytest.raises(UserError, match=r"(?s)row 3.*column 'energy': energy must be a number in \[0, 1\], but is 1.5"):
        train(tmp_path / "run", TINY, "--dataset_name", str(folder), "--validation_fraction", "0")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model.attention_resolutions", "[24]"), "has 24, but at --resolution 32 .* are 32, 16; choose among them"),
        (("--field_dropout", "1.5"), r"--field_dropout is 1.5; it must lie in \[0, 1\]"),
        (("--resolution", "33"), "33 is not a multiple of 2"),
        (("--brief_encoder.token_width", "0"), "--brief_encoder.token_width is 0; it must be at least 1"),
    ],
)
def test_invalid_numbers(flags, more, message):
    with pytest.raises(UserError, match=message):
        parse_config(train_decoder.Config, [*flags, *more])


# --- presets


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_presets_parse_and_prepare_their_posters(path):
    config = parse_config(train_decoder.Config, ["--config", str(path)])
    assert config.dataset_name in config.prepare
    assert f"--resolution {config.resolution} " in config.prepare[config.dataset_name]
    # The large preset spells out the defaults of the classes.
    if path.stem == "decoder":
        plain = train_decoder.Config()
        assert (config.model, config.brief_encoder, config.num_train_timesteps) == (
            plain.model, plain.brief_encoder, plain.num_train_timesteps,
        )  # fmt: skip
        assert config.resolution == 256


def test_without_arguments_it_takes_the_small_preset():
    config = yaml.safe_load((ROOT / train_decoder.PRESET).read_text())
    assert config["resolution"] == 64

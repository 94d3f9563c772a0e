"""train_image_caption.py as users start it: which parameters train, terms that are switched off, and resuming."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from pipelines.tools.cli import UserError
from pipelines.tools.loading import load_pipeline
from tests.conftest import forget_accelerate
from tests.support.runs import ROOT, assert_same_state, launch, rows
from tests.support.tiny_captions import MODEL_FLAGS, RESOLUTION, caption, draw_folder, picture, tiny_caption_tokenizer
from training import evaluate, train_image_caption
from training.core.batches import fetch
from training.core.draws import Draws, SampleKey
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.data.tokenization import CaptionTokens
from training.evaluation.captions import data_of
from training.evaluation.data import run_settings
from training.metrics.captions import caption_scores
from training.run.checkpoint import load_tensors
from training.run.folder import RunFolder

SCRIPT = ROOT / "training/train_image_caption.py"
CONFIGS = sorted((ROOT / "configs/experiments/image_caption").glob("*.yaml"))
TINY = (
    *("--report_to", "none", "--cpu_threads", "1", "--logging_steps", "1", "--resolution", str(RESOLUTION)),
    *MODEL_FLAGS,
    *("--prior.hidden_size", "16", "--prior.num_layers", "1", "--prior.repeats", "2"),
    *("--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"),
    *("--lr_warmup_steps", "0", "--num_previews", "2", "--preview_inference_steps", "2"),
    *("--recipe", "none"),
)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    """A folder of 48 captioned images: 43 for training, 5 steps per epoch."""
    return draw_folder(tmp_path_factory.mktemp("captioned") / "pictures")


@pytest.fixture(scope="module")
def flags(image_folder) -> tuple[str, ...]:
    return (*TINY, "--train_data_dir", str(image_folder))


def train(folder: Path, flags, *more: str) -> int:
    forget_accelerate()
    return train_image_caption.main([*flags, "--output_dir", str(folder), "--num_train_epochs", "1", *more])


def stage_of(flags, *more: str) -> train_image_caption.ImageCaptionStage:
    config = parse_config(train_image_caption.Config, [*flags, *more])
    context = StageContext(resuming=RunFolder(config.output_dir).has_checkpoint())
    return train_image_caption.ImageCaptionStage(config, context)


def gradients(stage, rows_=range(6), batch=None) -> dict[str, torch.Tensor]:
    """Return the gradients of the model's parameters after one backward pass; 0 for a parameter without a gradient.

    Args:
        batch: used instead of the batch of `rows_`.
    """
    batch = batch or fetch(stage.train_data(), [SampleKey(row, row) for row in rows_])
    stage.phase.zero_grad()
    stage.phase(batch, Draws(0, 0, rows_))[0].backward()
    named = stage.model.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


@pytest.fixture(scope="module")
def launched(tmp_path_factory, flags) -> Path:
    """`python training/train_image_caption.py …`, two epochs, from another folder."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    done = launch(SCRIPT, *flags, "--output_dir", str(folder), "--num_train_epochs", "2", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder


def test_the_run_folder_is_complete(launched):
    files = {"config.yaml", "metrics.csv", "training_curves.png", "run.log", "record.json"}
    assert {path.name for path in launched.iterdir()} >= files | {"samples", "checkpoints", "pipeline"}
    for row in rows(launched):
        assert {"image_loss", "caption_loss", "alignment_loss", "kl", "prior_loss"} <= row.keys()
    last = rows(launched)[-1]
    validated = ("loss", "image_loss", "caption_loss", "alignment_loss", "perplexity", "psnr", "ssim", "prior_loss")
    assert all(float(last[f"val_{name}"]) >= 0 for name in validated)
    assert (launched / "checkpoints/best").exists()
    assert (launched / "checkpoints/latest").exists()
    card = (launched / "pipeline/README.md").read_text()
    assert "it captions images, draws captions" in card
    record = json.loads((launched / "record.json").read_text())
    assert record["prompts"]
    assert record["sample_captions"][: len(record["prompts"])] == record["prompts"]
    assert not any(text.startswith(("generated", "original", "predicted")) for text in record["prompts"])


def test_the_log_describes_tokenizer_and_model(launched):
    log = (launched / "run.log").read_text()
    assert "are decoded without loss" in log
    assert "-> [1," in log
    assert "model of" in log
    assert "caption_decoder" in log
    assert "are truncated" not in log


def test_the_pipeline_works_here_and_as_remote_code_alike(launched):
    ours = load_pipeline(launched)
    theirs = DiffusionPipeline.from_pretrained(launched / "pipeline", trust_remote_code=True)
    pixels = [pipeline.draw("a red circle", output_type="pt").images for pipeline in (ours, theirs)]
    assert torch.allclose(*pixels, atol=1e-6)
    assert ours.caption(picture(0)) == theirs.caption(picture(0))
    ema = load_tensors(launched / "checkpoints/latest/ema.safetensors")
    for part in ("model", "prior"):
        exported = load_tensors(launched / "pipeline" / part / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tensor, ema[f"{part}.{name}"]) for name, tensor in exported.items())


def test_every_parameter_trains(tmp_path, flags):
    more = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "99", "--preview_epochs", "0")
    train(tmp_path / "run", flags, *more, "--weight_decay", "0", "--num_train_epochs", "2", "--learning_rate", "1e-2")
    for phase in ("image_caption", "prior"):
        first, last = (
            load_tensors(tmp_path / f"run/checkpoints/step-{step:08d}/phase_{phase}.safetensors") for step in (1, 10)
        )
        still = {key for key in first if torch.equal(first[key], last[key])}
        assert still == set()


def test_both_decoders_read_both_latents(flags):
    """With all images decoded from captions and all captions from images, each decoder trains the other's encoder."""
    one_way = stage_of(
        flags, "--cross_share", "1", "--caption_weight", "0", "--alignment_weight", "0", "--kl_weight", "0"
    )
    reached = gradients(one_way)
    assert reached["caption_encoder.out.weight"].abs().sum() > 0
    assert reached["image_encoder.out.weight"].abs().sum() == 0
    other_way = stage_of(
        flags, "--cross_share", "1", "--image_weight", "0", "--alignment_weight", "0", "--kl_weight", "0"
    )
    reached = gradients(other_way)
    assert reached["image_encoder.out.weight"].abs().sum() > 0
    assert reached["caption_encoder.out.weight"].abs().sum() == 0


def test_each_weight_at_zero_switches_exactly_that_gradient_off(flags):
    """The gradient is the weighted sum of the gradients of all terms; a weight of 0 removes exactly one term."""
    weights = {"image_weight": 1.0, "caption_weight": 1.0, "alignment_weight": 0.5, "kl_weight": 0.1}

    def gradients_with(values: dict[str, float]) -> dict[str, torch.Tensor]:
        return gradients(
            stage_of(flags, *(word for name, value in values.items() for word in (f"--{name}", str(value))))
        )

    whole = gradients_with(weights)
    names = {"image_weight": "image_loss", "caption_weight": "caption_loss", "alignment_weight": "alignment_loss"}
    assert list(names) == list(weights)[:3]
    for weight in weights:
        without = gradients_with(weights | {weight: 0.0})
        alone = gradients_with(
            dict.fromkeys(weights, 0.0)
            | {weight: weights[weight]}
            | ({} if weight in names else {"alignment_weight": 1e-30})
        )
        assert max(float(g.abs().max()) for g in alone.values()) > 0
        for name, gradient in whole.items():
            assert torch.allclose(without[name] + alone[name], gradient, atol=2e-6, rtol=1e-4), (weight, name)
        owned = {
            "image_weight": "image_decoder",
            "caption_weight": "caption_decoder",
            "alignment_weight": "logit_scale",
        }
        if weight in owned:
            own = {name for name in whole if name.startswith(owned[weight])}
            assert own
            assert all(not without[name].any() for name in own)


def test_a_switched_off_decoder_stays_as_it_is(tmp_path, flags):
    """Weight decay does not change it either."""
    more = ("--image_weight", "0", "--weight_decay", "0.5", "--preview_epochs", "0")
    train(tmp_path / "run", flags, *more, "--max_train_steps", "2", "--checkpointing_steps", "1")
    first = dict(stage_of(flags, "--image_weight", "0").model.named_parameters())
    last = load_tensors(tmp_path / "run/checkpoints/latest/phase_image_caption.safetensors")
    same = {name for name in first if torch.equal(first[name], last[f"model.{name}"])}
    assert same == {name for name in first if name.startswith("image_decoder")}


def test_padding_never_enters_the_loss(flags):
    """More padding, with any token ids, changes neither loss nor gradients."""
    stage = stage_of(flags)
    some = (0, 1, 14, 15)  # captions of two lengths
    batch = fetch(stage.train_data(), [SampleKey(row, row) for row in some])
    before = gradients(stage, some)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert not mask.all(), "no caption of the batch is padded"
    extra = torch.full((len(ids), 3), 5)
    wider = torch.cat([ids.masked_fill(mask == 0, 6), extra], 1), torch.cat([mask, extra * 0], 1)
    after = gradients(stage, some, {**batch, "input_ids": wider[0], "attention_mask": wider[1]})
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@pytest.mark.slow
def test_sessions_add_up(tmp_path, launched, flags):
    """Two sessions of one epoch each give the same weights and rows as one session of two epochs, bit for bit."""
    steady = ("--lr_scheduler", "constant", "--prior.start", "0")
    for _ in range(2):
        assert train(tmp_path / "run", flags, "--extra_epochs", "1", *steady) == 0
    assert train(tmp_path / "once", flags, "--num_train_epochs", "2", *steady) == 0
    assert_same_state(tmp_path / "run", tmp_path / "once")


def test_a_prior_that_starts_late(tmp_path, flags):
    train(tmp_path / "run", flags, "--prior.start", "0.75", "--preview_epochs", "0", "--max_train_steps", "4")
    assert [bool(row.get("prior_loss")) for row in rows(tmp_path / "run")] == [False, False, False, True]
    assert load_pipeline(tmp_path / "run").prior is not None


def test_before_its_start_there_is_no_prior_to_draw_from(tmp_path, flags):
    """A pipeline saved before `--prior.start` has no prior, because an untrained one would give noise."""
    more = ("--prior.start", "0.75", "--max_train_steps", "4", "--checkpointing_steps", "2", "--validation_steps", "2")
    train(tmp_path / "run", flags, *more, "--preview_epochs", "0")
    early, late = (load_pipeline(tmp_path / "run/checkpoints" / name) for name in ("step-00000002", "step-00000004"))
    assert early.prior is None
    assert late.prior is not None
    weights = str(tmp_path / "run/checkpoints/step-00000002")
    assert stage_of(flags, "--init_from", weights).prior is not None  # a new one
    validated = train(tmp_path / "other", flags, "--validate_only", "true", "--validate_model", weights)
    assert validated == 0
    assert [bool(row.get("val_prior_loss")) for row in rows(tmp_path / "run")] == [False, False, False, True]


@pytest.mark.parametrize("start", ["1", "-0.1", "2000"])
def test_a_prior_that_would_never_start(start, flags, tmp_path, capsys):
    with pytest.raises(UserError, match=r"--prior.start is .* must lie in \[0, 1\)"):
        parse_config(train_image_caption.Config, [*flags, "--prior.start", start]).validate()


def test_without_a_prior(tmp_path, flags):
    assert train(tmp_path / "run", flags, "--prior.hidden_size", "0", "--max_train_steps", "2") == 0
    pipeline = load_pipeline(tmp_path / "run")
    assert pipeline.prior is None
    with pytest.raises(ValueError, match="no latent prior"):
        pipeline.sample(2)


def test_a_start_from_other_weights(tmp_path, launched, flags):
    more = ("--init_from", str(launched), "--learning_rate", "1e-12", "--max_train_steps", "1", "--weight_decay", "0")
    train(tmp_path / "run", flags, *more, "--preview_epochs", "0")
    trained = load_tensors(tmp_path / "run/checkpoints/latest/phase_image_caption.safetensors")
    source = load_tensors(launched / "pipeline/model/diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(trained[f"model.{name}"], tensor, atol=1e-9) for name, tensor in source.items())


@pytest.mark.slow
def test_losses_fall_and_captions_are_learned(tmp_path, flags):
    """The model memorizes twenty-four different pairs in a minute."""
    more = ("--num_train_epochs", "60", "--learning_rate", "1e-2", "--validation_epochs", "0", "--preview_epochs", "0")
    more += ("--model.latent_size", "32", "--model.text_hidden_size", "32", "--gradient_accumulation_steps", "1")
    train(tmp_path / "run", flags, *more, "--train_batch_size", "12", "--logging_steps", "10", "--ema_decay", "0.9")
    logged = rows(tmp_path / "run")
    assert float(logged[-1]["caption_loss"]) < 0.25 * float(logged[0]["caption_loss"])
    assert float(logged[-1]["image_loss"]) < 0.7 * float(logged[0]["image_loss"])
    pipeline = load_pipeline(tmp_path / "run")
    predicted = pipeline.caption([picture(i) for i in range(24)])
    assert sum(words == caption(i) for i, words in enumerate(predicted)) >= 12
    similar = pipeline.similarity([picture(i) for i in range(24)], [caption(i) for i in range(24)])
    assert (similar.argmax(0) == torch.arange(24)).float().mean() >= 0.5


def test_the_share_of_words_that_the_encoder_reads_as_unknown(flags):
    """Words are dropped by the position of the pair in the global batch, and only in the input of the encoder."""
    phase = stage_of(flags, "--word_dropout", "0.25").phase
    text = CaptionTokens(tiny_caption_tokenizer(), 12, "longest")([caption(i) for i in range(24)])
    ids, mask = text["input_ids"], text["attention_mask"]
    words = mask.sum().item() - 2 * len(ids)
    changed = torch.stack([phase.read_ids(ids, mask, Draws(0, step, range(24))) != ids for step in range(100)])
    deviation = (0.25 * 0.75 / (100 * words)) ** 0.5
    assert abs(changed.sum().item() / (100 * words) - 0.25) < 4 * deviation
    assert not changed[:, :, 0].any()
    second_half = phase.read_ids(ids[12:], mask[12:], Draws(0, 0, range(12, 24)))
    assert torch.equal(second_half, phase.read_ids(ids, mask, Draws(0, 0, range(24)))[12:])
    assert torch.equal(stage_of(flags, "--word_dropout", "0").phase.read_ids(ids, mask, Draws(0, 0, range(24))), ids)


# --- bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--image_weight", "0", "--caption_weight", "0", "--alignment_weight", "0"), "nothing to learn from"),
        (("--train_batch_size", "1"), "the other pairs of its batch"),
        (("--cross_share", "2"), "--cross_share is 2.0; it must lie in"),
        (("--word_dropout", "-0.1"), "--word_dropout is -0.1; it must lie in"),
        (("--kl_weight", "-1"), "at least 0"),
        (("--preview_prompts", '["a cat", " "]'), "an empty caption"),
        (("--model.num_attention_heads", "3"), "must be a multiple of --model.num_attention_heads 3"),
        (("--model.norm_num_groups", "5"), "multiples of"),
        (("--model.max_length", "2"), "at least 3"),
        (("--resolution", "16"), "deepest feature map"),
        (("--vocab_size", "3"), "at least 5"),
        (("--image_fit", "squeeze"), "image_fit"),
        (("--image_fit", "stretch", "--crop_scale", "0.5"), "use --crop_scale 1 or --image_fit crop"),
        (("--prior.repeats", "0"), "at least 1"),
    ],
)
def test_invalid_values(flags, more, message):
    with pytest.raises(UserError, match=message):
        parse_config(train_image_caption.Config, [*flags, *more])


def test_an_empty_caption_is_reported_before_training(tmp_path, image_folder, flags):
    folder = tmp_path / "pictures"
    shutil.copytree(image_folder, folder)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[3] = json.dumps({"file_name": "003.png", "text": "  "})
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="the caption is empty"):
        stage_of(flags, "--train_data_dir", str(folder))


def test_long_captions_are_cut_and_counted_once(caplog, flags):
    with caplog.at_level(logging.INFO, logger="halftone"):
        stage = stage_of(flags, "--model.max_length", "5")
    messages = [record.message for record in caplog.records if "are truncated" in record.message]
    assert len(messages) == 1
    assert "more than 5 tokens" in messages[0]
    batch = fetch(stage.train_data(), [SampleKey(row, row) for row in range(43)])
    long = [row for row, words in enumerate(batch["caption"]) if words.endswith(", big")]
    assert long
    ids, mask = batch["input_ids"][long], batch["attention_mask"][long]
    assert ids.shape[1] == 5
    assert mask.all()
    assert (ids[:, 0] == 1).all()
    assert (ids[:, -1] == 2).all()


@pytest.fixture
def other_words(tmp_path, image_folder) -> Path:
    """The same images with an equal number of other words: their tokenizer uses the same ids for other words."""
    folder = tmp_path / "other_words"
    shutil.copytree(image_folder, folder)
    text = (folder / "metadata.jsonl").read_text()
    for word, other in {"red": "zebra", "blue": "aardvark", "circle": "alps"}.items():
        text = text.replace(word, other)
    (folder / "metadata.jsonl").write_text(text)
    return folder


def test_a_tokenizer_that_does_not_fit(tmp_path, launched, flags, other_words):
    """A tokenizer whose words differ from those of the initial weights is refused."""
    stage = stage_of(flags, "--train_data_dir", str(other_words))
    stage.tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ("--init_from", str(launched), "--tokenizer", str(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match="its ids mean other words"):
        stage_of(flags, *words, "--output_dir", str(tmp_path / "new"))


def test_weights_keep_their_tokenizer(tmp_path, launched, flags, other_words):
    """They keep it whatever captions are trained on: for --init_from, on resume, and for --validate_model."""
    own = stage_of(flags).tokenizer.get_vocab()
    there = ("--train_data_dir", str(other_words))
    assert stage_of(flags, *there).tokenizer.get_vocab() != own
    new = ("--init_from", str(launched), "--output_dir", str(tmp_path / "new"))
    for more in (new, ("--output_dir", str(launched)), ("--validate_only", "true", "--validate_model", str(launched))):
        assert stage_of(flags, *there, *more).tokenizer.get_vocab() == own


def test_captions_may_be_in_any_column(tmp_path, image_folder, flags):
    folder = tmp_path / "pictures"
    shutil.copytree(image_folder, folder)
    text = (folder / "metadata.jsonl").read_text().replace('"text"', '"title"')
    (folder / "metadata.jsonl").write_text(text)
    stage = stage_of(flags, "--train_data_dir", str(folder), "--caption_column", "title")
    assert stage.tokenizer.get_vocab() == stage_of(flags).tokenizer.get_vocab()
    assert stage.train_data()[SampleKey(0, 0)]["caption"] == stage_of(flags).train_data()[SampleKey(0, 0)]["caption"]


def test_the_loss_does_not_depend_on_how_the_batch_is_split(flags):
    """This holds without the alignment loss, whose mismatched pairs are those of the micro-batch."""
    stage = stage_of(flags, "--alignment_weight", "0")
    some = range(7, 17)
    lengths = [len(text.split()) for text in fetch(stage.train_data(), [SampleKey(i, i) for i in some])["caption"]]
    assert sum(lengths[:5]) != sum(lengths[5:])
    halves = [gradients(stage, some[:5]), gradients(stage, some[5:])]
    for name, gradient in gradients(stage, some).items():
        assert torch.allclose(gradient, (halves[0][name] + halves[1][name]) / 2, rtol=1e-4, atol=1e-6), name


def test_the_evaluation_script(tmp_path, launched, image_folder):
    """Its metrics equal those computed with the pipeline, over all captions of an image, without training pairs."""
    data = tmp_path / "data"
    shutil.copytree(image_folder, data / "train")
    trained = [json.loads(line) for line in (data / "train/metadata.jsonl").read_text().splitlines()]
    several = [json.dumps(record | {"text": [record["text"]]}) for record in trained]
    (data / "train/metadata.jsonl").write_text("\n".join(several))
    (data / "validation").mkdir()
    lines = []
    for i in range(6):
        name = f"{i}.png"
        image = picture(i)
        if i != 3:
            image.putpixel((0, 0), (9 * i, 90, 9))  # a pixel that no training image has
        image.save(data / "validation" / name)
        lines.append(json.dumps({"file_name": name, "text": [caption(i), *["a picture", "it"][: i % 3]]}))
    (data / "validation/metadata.jsonl").write_text("\n".join(lines))

    words = ["--model", str(launched), "--dataset_name", str(data), "--pictures", str(tmp_path / "png")]
    evaluate.main(
        [*words, "--cpu_threads", "1", "--extractor_resolution", "32", "--output", str(tmp_path / "figures.json")]
    )
    results = json.loads((tmp_path / "figures.json").read_text())
    metrics = results["metrics"]
    assert results["kind"] == "image–caption model"
    assert math.isfinite(metrics["kid"])
    assert (metrics["pairs"], metrics["left_out"]) == (5, 1)
    pipeline = load_pipeline(launched)
    config = evaluate.EvaluationConfig(model=str(launched), dataset_name=str(data))
    held_out = data_of(config, run_settings(str(launched)), pipeline)[1]
    batch = fetch(held_out, [SampleKey(row, 0) for row in (0, 1, 2, 4, 5)])
    images = pipeline.encode_images((batch["pixel_values"] + 1) / 2)
    assert [len(own) for own in batch["caption"]] == [1, 2, 3, 2, 3]
    first = [own[0] for own in batch["caption"]]
    captions = pipeline.encode_captions(first)
    assert metrics["alignment"] == pytest.approx(torch.cosine_similarity(images, captions).mean().item(), abs=1e-5)
    tokens = CaptionTokens(pipeline.tokenizer, pipeline.model.config.max_length, "longest")(first)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    for name, latents in (("perplexity", images), ("repeated_perplexity", captions)):
        logits = pipeline.model.caption_logits(latents, ids)[:, :-1]
        chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][mask[:, 1:] == 1]
        assert metrics[name] == pytest.approx((-chosen.mean()).exp().item(), rel=1e-4)
    assert metrics["perplexity"] != pytest.approx(metrics["repeated_perplexity"], rel=1e-4)
    predicted = pipeline.caption((batch["pixel_values"] + 1) / 2)
    assert metrics["bleu_2"] == pytest.approx(caption_scores(predicted, batch["caption"])["bleu_2"])
    assert len(list((tmp_path / "png").glob("*.png"))) == 3
    pairs = pipeline.sample(64, generator=[torch.Generator().manual_seed(i) for i in range(64)], output_type="pt")
    drawn = [pipeline.similarity(image[None], text).item() for image, text in zip(*pairs.values()) if text]
    assert metrics["invented_alignment"] == pytest.approx(sum(drawn) / len(drawn), abs=1e-5)


def test_a_tokenizer_without_ends(tmp_path, flags):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<PAD>": 0, "a": 1}, unk_token="<PAD>")), pad_token="<PAD>"
    ).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="no token for the start of a caption"):
        stage_of(flags, "--tokenizer", str(tmp_path / "tokenizer"))


def test_a_tokenizer_that_is_named_is_used(launched, flags):
    tokenizer = launched / "pipeline/tokenizer"
    stage = stage_of(flags, "--tokenizer", str(tokenizer))
    own = stage_of(flags).tokenizer
    assert stage.tokenizer.get_vocab() == own.get_vocab()
    assert stage.tokenizer("a red circle, big").input_ids == own("a red circle, big").input_ids


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_parse(path):
    config = parse_config(train_image_caption.Config, ["--config", str(path), "--dataset_name", "data/x"])
    assert config.lr_scheduler == "cosine"
    assert config.max_grad_norm == 1.0


def test_dry_run_prints_sizes(flags, capsys, tmp_path):
    forget_accelerate()
    assert train_image_caption.main([*flags, "--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "phase 'image_caption'" in out
    assert "phase 'prior'" in out

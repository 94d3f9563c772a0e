"""Several processes share the previews of every stage, whose images are those of one process, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data_scripts import make_posters
from pipelines.common.poster_domain import COLOR_ROLES
from tests.conftest import forget_accelerate
from tests.scripts.conftest import COMMON, TINY_AUTOENCODER, TINY_DIFFUSION
from tests.scripts.test_distill_latent_diffusion import TINY as TINY_STUDENT
from tests.scripts.test_train_controlnet import MASKS
from tests.scripts.test_train_controlnet import TINY as TINY_CONTROLNET
from tests.scripts.test_train_decoder import TINY as TINY_DECODER
from tests.scripts.test_train_image_caption import TINY as TINY_CAPTIONS
from tests.scripts.test_train_layout import COMMON as LAYOUT
from tests.scripts.test_train_layout import TINY_ABSTRACTOR, TINY_ENCODER
from tests.support.ranks import forked_ranks
from tests.support.tiny_captions import draw_folder
from tests.support.tiny_models import tiny_vae
from training.core.exchange import Exchange
from training.core.parsing import parse_config
from training.core.previews import Previews
from training.core.stage import Stage, StageContext
from training.distill_latent_diffusion import Config as DistillationConfig
from training.distill_latent_diffusion import DistillationStage
from training.engine.launch import LaunchConfig, exchange_of, start_accelerator
from training.train_abstractor import AbstractorStage
from training.train_abstractor import Config as AbstractorConfig
from training.train_autoencoder import AutoencoderStage
from training.train_autoencoder import Config as AutoencoderConfig
from training.train_controlnet import Config as ControlNetConfig
from training.train_controlnet import ControlNetStage
from training.train_decoder import Config as DecoderConfig
from training.train_decoder import PosterDecoderStage
from training.train_encoder import Config as EncoderConfig
from training.train_encoder import LayoutEncoderStage
from training.train_image_caption import Config as CaptionsConfig
from training.train_image_caption import ImageCaptionStage
from training.train_latent_diffusion import Config as DiffusionConfig
from training.train_latent_diffusion import LatentDiffusionStage

# Three batches: two of four images and one of a single image.
NINE = ("--num_previews", "9")
HEADS = (
    *("--heads", "[segmentation,classification]", "--mask_column", "color_role", "--label_column", "title_position"),
    *("--mask_class_names", f"[{','.join(COLOR_ROLES)}]"),
)
PROMPTS = ("--preview_prompts", "[a red poster,a blue poster,a poster,red,blue]")
UNCONDITIONAL = ("--condition_on", "[]")
Case = tuple[type[Stage], Any, Sequence[str]]


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """Twelve posters for training, and twelve held out."""
    folder = tmp_path_factory.mktemp("data") / "posters"
    shares = ("--num_posters", "24", "--validation_fraction", "0.5", "--test_fraction", "0", "--complexity", "standard")
    make_posters.main(["--output_dir", str(folder), "--num_workers", "1", *shares])
    return folder


def diffusion_flags(folder: Path, tokenizer: Path) -> tuple[str, ...]:
    tiny_vae().save_pretrained(folder / "vae")
    return (*COMMON, *TINY_DIFFUSION, "--vae", str(folder / "vae"), "--tokenizer", str(tokenizer))


@pytest.fixture(scope="module")
def cases(tmp_path_factory, shown, tokenizer) -> dict[str, Case]:
    """Every kind of stage, with the class of its config and its flags."""
    folder = tmp_path_factory.mktemp("inputs")
    data = ("--dataset_name", str(shown))
    diffusion = (*diffusion_flags(folder, tokenizer), *data)
    classes = ("--condition_on", "[caption,label]", "--label_column", "title_position")
    base = LatentDiffusionStage(parse_config(DiffusionConfig, diffusion), StageContext())
    with torch.no_grad():  # so that its images depend on their captions
        for parameter in base.phase.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    base.pipeline().save_pretrained(folder / "base")
    started = ("--init_from", str(folder / "base"))
    student = (*COMMON, *TINY_STUDENT, *data, "--teacher", str(folder / "base"))
    controlled = (*COMMON, *TINY_CONTROLNET, *data, *MASKS, "--base_model", str(folder / "base"))
    captioned = ("--train_data_dir", str(draw_folder(folder / "pictures", 24)), "--validation_fraction", "0.5")
    return {
        "autoencoder": (AutoencoderStage, AutoencoderConfig, (*COMMON, *TINY_AUTOENCODER, *HEADS, *data)),
        "diffusion": (LatentDiffusionStage, DiffusionConfig, (*diffusion, *NINE, *started)),
        "prompts": (LatentDiffusionStage, DiffusionConfig, (*diffusion, *NINE, *classes, *PROMPTS)),
        "classes": (LatentDiffusionStage, DiffusionConfig, (*diffusion, *NINE, "--condition_on", "[label]",
                                                            "--label_column", "title_position")),
        "nothing": (LatentDiffusionStage, DiffusionConfig, (*diffusion, "--num_previews", "13", *UNCONDITIONAL)),
        "distillation": (DistillationStage, DistillationConfig, (*student, *NINE)),
        "controlnet": (ControlNetStage, ControlNetConfig, (*controlled, *NINE)),
        "decoder": (PosterDecoderStage, DecoderConfig, (*TINY_DECODER, *data, *NINE)),
        "encoder": (LayoutEncoderStage, EncoderConfig, (*LAYOUT, *TINY_ENCODER, *data)),
        "abstractor": (AbstractorStage, AbstractorConfig, (*LAYOUT, *TINY_ABSTRACTOR, *data)),
        "captions": (ImageCaptionStage, CaptionsConfig, (*TINY_CAPTIONS, *captioned, *NINE)),
    }  # fmt: skip


def previewed(stage: Any, exchange: Exchange) -> Previews:
    """Return the previews of a stage as the loop makes them, and check that they draw no random numbers of training."""
    for phase in stage.phases:
        phase.eval()
    prior = getattr(stage, "prior", None)
    with torch.no_grad():
        if prior is not None:  # a prior that has learned nothing is not shown
            prior.out_of.weight += 0.1
        state = torch.get_rng_state()
        previews = stage.previews(exchange)
        assert torch.equal(torch.get_rng_state(), state)
    return previews


def digest(images: Sequence[Any]) -> list[str]:
    return [hashlib.sha256(f"{image.size} {image.mode}".encode() + image.tobytes()).hexdigest() for image in images]


def show(folder: Path, cases: dict[str, Case]) -> int:
    """Write what this process has of the previews of every stage."""
    forget_accelerate()
    exchange = exchange_of(start_accelerator(LaunchConfig(cpu_threads=1)))
    results = {}
    for name, (stage_class, config, flags) in cases.items():
        stage = stage_class(parse_config(config, flags), StageContext())
        previews = previewed(stage, exchange)
        others = previews.captions, previews.prompts, previews.columns
        results[name] = [digest(previews.images), digest(previews.references or []), *others]
    (folder / f"{exchange.rank}.json").write_text(json.dumps(results))
    return 0


@pytest.mark.slow
def test_the_previews_of_several_processes_are_those_of_one(tmp_path, cases):
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        forked_ranks(lambda folder=folder: show(folder, cases), folder / "output.txt", count)
        results = [(folder / f"{rank}.json").read_text() for rank in range(count)]
        assert len(set(results)) == 1
        found[count] = json.loads(results[0])
    for name in cases:
        assert found[2][name] == found[1][name], name
    images, references = ({name: len(own[place]) for name, own in found[1].items()} for place in (0, 1))
    assert images == {
        "autoencoder": 8 * 4 + 1, "diffusion": 9, "prompts": 5, "classes": 9, "nothing": 13, "distillation": 9,
        "controlnet": 27, "decoder": 9, "encoder": 24, "abstractor": 1, "captions": 36,
    }  # fmt: skip
    assert {name: count for name, count in references.items() if count} == {
        "diffusion": 9, "prompts": 9, "classes": 9, "nothing": 12, "distillation": 9, "decoder": 9
    }  # fmt: skip
    for name in ("diffusion", "nothing", "distillation", "decoder"):
        assert len(set(found[1][name][0])) == images[name], name


class Recorded(LatentDiffusionStage):
    """Remembers the seed of each image that this process generates."""

    seeds: tuple[int, ...] = ()

    def sample(self, pipeline, *arguments, seeds, **options):
        self.seeds += tuple(seeds)
        return super().sample(pipeline, *arguments, seeds=seeds, **options)


def test_each_process_generates_a_share_of_the_previews(tmp_path, shown, tokenizer):
    flags = (*diffusion_flags(tmp_path, tokenizer), "--dataset_name", str(shown), *NINE, "--seed", "0")

    def record() -> int:
        forget_accelerate()
        exchange = exchange_of(start_accelerator(LaunchConfig(cpu_threads=1)))
        stage = Recorded(parse_config(DiffusionConfig, flags), StageContext())
        previews = previewed(stage, exchange)
        (tmp_path / f"{exchange.rank}.json").write_text(json.dumps([stage.seeds, digest(previews.images)]))
        return 0

    forked_ranks(record, tmp_path / "output.txt", 2)
    (first, images), (second, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == [0, 1, 2, 3, 8]
    assert second == [4, 5, 6, 7]
    assert images == others
    assert len(images) == 9

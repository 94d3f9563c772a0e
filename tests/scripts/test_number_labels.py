"""Years as classes: a model is trained, sampled by year, described in its card, and keeps its numbering."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
from PIL import Image

from pipelines import sample
from tests.conftest import forget_accelerate
from tests.scripts.conftest import COMMON, TINY_DIFFUSION
from training import train_latent_diffusion
from training.core.parsing import parse_config
from training.core.stage import StageContext
from training.stages.class_names import recorded_class_names

YEARS = ["1985", "2000", "2020"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory, autoencoder) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("years")
    for row in range(8):
        Image.new("RGB", (64, 64), (30 * row, 0, 9)).save(folder / f"{row}.png")
    labels = [float(YEARS[row % 3]) for row in range(8)]  # as pandas writes integers, some of which are missing
    pandas.DataFrame({"file_name": [f"{i}.png" for i in range(8)], "label": labels}).to_csv(
        folder / "metadata.csv", index=False
    )
    data = ("--train_data_dir", str(folder), "--vae", str(autoencoder), "--condition_on", "[label]")
    length = ("--max_train_steps", "2", "--validation_fraction", "0", "--preview_epochs", "1")
    return (*COMMON, *TINY_DIFFUSION, *data, *length)


@pytest.fixture(scope="module")
def run(tmp_path_factory, flags) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "years"
    forget_accelerate()
    assert train_latent_diffusion.main([*flags, "--output_dir", str(folder)]) == 0
    return folder


def test_a_year_is_the_name_of_a_class(run, tmp_path, capsys):
    index = json.loads((run / "pipeline/model_index.json").read_text())
    assert index["id2label"] == {"0": "1985", "1": "2000", "2": "2020"}
    card = (run / "pipeline/README.md").read_text()
    assert "pipeline(class_labels=[1985])" in card
    assert "The names of the classes, by id: 0: 1985, 1: 2000, 2: 2020." in card

    def sampled(*labels: str) -> int | None:
        output = ("--output", str(tmp_path / "grid.png"), "--num_images", "1", "--num_inference_steps", "1")
        return sample.main(["--model", str(run), "--class_label", *labels, *output, "--device", "cpu"])

    assert not sampled("2000", "1985")
    assert (tmp_path / "grid.png").is_file()
    with pytest.raises(sample.UserError, match="has 0, which is not a class of this model; its classes are 1985, 2000"):
        sampled("0")


def test_a_resumed_run_keeps_its_numbering(run, flags):
    config = parse_config(train_latent_diffusion.Config, [*flags, "--output_dir", str(run)])
    assert recorded_class_names(config, StageContext(resuming=True)) == YEARS
    assert recorded_class_names(config, StageContext()) == []
    for index in run.glob("checkpoints/*/pipeline/model_index.json"):
        content = json.loads(index.read_text())
        names = {str(id_): year for id_, year in enumerate(["1985", "1990", "2000", "2020"])}
        index.write_text(json.dumps({**content, "id2label": names}))
    stage = train_latent_diffusion.LatentDiffusionStage(config, StageContext(resuming=True))
    assert list(stage.id2label.values()) == ["1985", "1990", "2000", "2020"]
    assert stage.phase.denoiser.config.num_class_embeds == 5  # with the null class
    fresh = train_latent_diffusion.LatentDiffusionStage(config, StageContext())
    assert list(fresh.id2label.values()) == YEARS
    config.init_from = str(run / "pipeline")
    assert recorded_class_names(config, StageContext()) == YEARS

"""The notebooks run from the first cell to the last, as in Jupyter, and are stored without outputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.runs import ROOT, environment

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART, SHARED = "quickstart.ipynb", "use_a_shared_model.ipynb"
TIMEOUT = 900
# Settings in the cells, and smaller ones, with which the notebooks take seconds. Nothing else in the cells is changed.
SMALLER = {
    QUICKSTART: {
        "STEPS = 300": "STEPS = 4",
        "--num_posters 200": "--num_posters 60",
        "--report_to none": "--report_to none --num_previews 2 --preview_inference_steps 2 --train_batch_size 4 "
        "--evaluation_images 8 --evaluation_inference_steps 2 "
        "--transformer.hidden_size 32 --transformer.num_layers 1 --transformer.num_attention_heads 2 "
        "--transformer.bottleneck_size 16 --text_encoder.hidden_size 16 --text_encoder.num_attention_heads 2",
        "--num_inference_steps 20": "--num_inference_steps 2",
    },
    SHARED: {"num_inference_steps=20": "num_inference_steps=2"},
}
PRINTED = "import sys; print(sorted({'training', 'data_scripts', 'halftone_trainer'} & set(sys.modules)))"


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def smaller(name: str) -> nbformat.NotebookNode:
    """Return a notebook with smaller settings."""
    notebook = read(name)
    for setting, other in SMALLER[name].items():
        cells = [cell for cell in notebook.cells if cell.cell_type == "code" and setting in cell.source]
        assert cells, f"{name} has no {setting}"
        for cell in cells:
            cell.source = cell.source.replace(setting, other)
    return notebook


def execute(notebook: nbformat.NotebookNode, workplace: Path) -> str:
    """Run all cells in a kernel of its own, and return what they print. Raises CellExecutionError."""
    variables = environment(
        PYTHONPATH=str(ROOT),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        WANDB_MODE="disabled",
    )
    client = NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(workplace / "notebooks")}})
    client.execute(env=variables)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the root of the repository, in which what the notebooks make does not remain."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "notebooks").mkdir()
    for name in ("data_scripts", "training", "pipelines", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def printed(workplace: Path) -> str:
    """What the quickstart prints."""
    return execute(smaller(QUICKSTART), workplace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(path):
    notebook = read(path.name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 4
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert [cell.execution_count for cell in code] == [None] * len(code)


def test_both_notebooks_are_tested():
    assert [path.name for path in NOTEBOOKS] == [QUICKSTART, SHARED]


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT)
def test_the_quickstart_draws_trains_and_generates(printed, workplace):
    assert "train 54, validation 3, test 3" in printed
    assert (workplace / "runs/notebook_posters/latent_diffusion_64_caption/pipeline/model_index.json").is_file()
    assert (workplace / "runs/notebook_posters/more.png").is_file()
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT)
@pytest.mark.usefixtures("printed")
def test_a_shared_model_is_used_without_halftone(workplace):
    notebook = smaller(SHARED)
    notebook.cells.append(nbformat.v4.new_code_cell(PRINTED))
    assert execute(notebook, workplace).endswith("[]\n")
    assert (workplace / "notebooks/image.png").is_file()

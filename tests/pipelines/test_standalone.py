"""Published folders load without Halftone, in an environment with only torch, diffusers and transformers.

Loading takes seconds, so one process without Halftone does all work and writes its results, which the tests read.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipelines
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.models.multi_head_autoencoder import MultiHeadAutoencoderKL
from tests.support.environments import environment_without_halftone
from tests.support.hub_server import HubServer, hub  # noqa: F401  (a fixture)
from tests.support.tiny_models import tiny_pipeline

PROMPT = "a red poster"

OUTSIDE = """
import importlib.util, json, sys
from pathlib import Path

for name in ("pipelines", "training", "data_scripts", "accelerate", "datasets"):
    assert importlib.util.find_spec(name) is None, name

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

here = Path(sys.argv[1])


def load(name):
    pipeline = DiffusionPipeline.from_pretrained(here / name, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red poster", num_inference_steps=3, generator=generator, output_type="np").images


images = {}
if sys.argv[2:]:  # from a Hub
    ours, other = (
        DiffusionPipeline.from_pretrained(repo, trust_remote_code=True) for repo in ("ada/ours", "ada/other")
    )
    np.savez(here / "from_hub.npz", ours=draw(ours), other=draw(other))
    sys.exit()
ours, other, stock = load("ours"), load("other"), load("stock")
images["other"], images["ours"] = draw(other), draw(ours)  # "ours" is used after "other" was loaded
images["stock"] = draw(stock)
ours.save_pretrained(here / "again")
ours.set_scheduler("dpm")
images["dpm"] = draw(ours)
images["again"] = draw(load("again"))
nested = DiffusionPipeline.from_pretrained(here / "nested", trust_remote_code=True)
nested.save_pretrained(here / "nested_again")
np.savez(here / "images.npz", **images)
vae_class = type(stock.vae)
report = {
    "stock_vae": vae_class is AutoencoderKL,
    "module": type(ours).__module__,
    "refused": "",
    "without_trust": "",
    "nested": nested(),
}
try:
    ours.set_scheduler("ddim")
except ValueError as error:
    report["refused"] = str(error)
try:
    DiffusionPipeline.from_pretrained(here / "ours")
except ValueError as error:
    report["without_trust"] = str(error)
(here / "report.json").write_text(json.dumps(report))
"""


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, num_inference_steps=3, generator=generator, output_type="np").images


def other_code(folder: Path) -> type:
    """Return our pipeline's class with one changed helper (images are inverted), like another version of Halftone."""
    package = folder / "other_version"
    shutil.copytree(Path(pipelines.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    latents = (package / "common" / "latents.py").read_text()
    changed = latents.replace("images.float().clamp(-1, 1)", "-images.float().clamp(-1, 1)")
    assert changed != latents
    (package / "common" / "latents.py").write_text(changed)
    sys.path.insert(0, str(folder))
    try:
        import other_version.latent_diffusion  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(folder))
    return other_version.latent_diffusion.LatentDiffusionPipeline


GREETING = """
from diffusers import DDIMScheduler, DiffusionPipeline
from .common.standalone import StandalonePipelineMixin
{imports}

class Greeting(StandalonePipelineMixin, DiffusionPipeline):
    def __init__(self, part):
        super().__init__()
        self.register_modules(part=part)

    def __call__(self):
        return greet()


def made():
    return Greeting({part})
"""


def greeting(folder: Path, package: str, files: dict[str, str], imports: str, part: str = "DDIMScheduler()") -> Any:
    """Return a pipeline from a new package with these `files` and a greeting.py, which has the given `imports`."""
    root = folder / package
    names = ("common/standalone.py", "common/compatibility.py")
    shared = {name: (Path(pipelines.__file__).parent / name).read_text() for name in names}
    pipeline_file = GREETING.format(imports=imports, part=part)
    for name, source in {**files, **shared, "greeting.py": pipeline_file}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{package}.greeting").made()
    finally:
        sys.path.remove(str(folder))


NESTED = {
    "common/words.py": "from ..models.deep import DEEP\n\nWORDS = DEEP + ' words'\n",
    "common/punctuation.py": "MARK = '!'\n",
    "models/deep.py": "DEEP = 'deep'\n",
    "common/phrases.py": (
        "def greet():\n    from .punctuation import MARK\n    from .words import WORDS\n\n    return WORDS + MARK\n"
    ),
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Folder, images and report of a process without Halftone."""
    here = tmp_path_factory.mktemp("standalone")
    ours = tiny_pipeline("flow_prediction", patch_size=4, prior=True)
    ours.save_pretrained(here / "ours")
    other_code(here)(**ours.components).save_pretrained(here / "other")
    tiny_pipeline().save_pretrained(here / "stock")
    greeting(here, "nested_package", NESTED, "from .common.phrases import greet\n").save_pretrained(here / "nested")
    python = environment_without_halftone(here / "venv")
    script = here / "outside.py"
    script.write_text(textwrap.dedent(OUTSIDE))
    environment = {**os.environ, "HF_HOME": str(here / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run([python, script, here], cwd=here, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return here, dict(np.load(here / "images.npz")), json.loads((here / "report.json").read_text())


def test_it_loads_without_halftone_and_gives_the_same_images(outside):
    here, images, report = outside
    assert report["module"].startswith("diffusers_modules.")
    assert np.array_equal(images["ours"], draw(LatentDiffusionPipeline.from_pretrained(here / "ours")))
    stock = LatentDiffusionPipeline.from_pretrained(here / "stock")
    assert np.array_equal(images["stock"], draw(stock))
    assert report["stock_vae"]


def test_two_repositories_in_one_process_keep_their_own_code(outside):
    """With the same weights but another helper, each must use its own helper, whichever was loaded last."""
    _, images, _ = outside
    assert np.allclose(images["other"], 1 - images["ours"], atol=1e-6)
    assert not np.allclose(images["other"], images["ours"], atol=1e-2)


def test_a_loaded_pipeline_can_be_saved_and_loaded_again(outside):
    here, images, _ = outside
    assert np.array_equal(images["again"], images["ours"])
    # The source files are the same, and Halftone's own classes load the folder too.
    sources = [{p.relative_to(here / name) for p in (here / name).rglob("*.py")} for name in ("ours", "again")]
    assert sources[0] == sources[1]
    again = LatentDiffusionPipeline.from_pretrained(here / "again")
    assert type(again.vae) is MultiHeadAutoencoderKL
    assert np.array_equal(draw(again), images["ours"])
    for config in (here / "again").rglob("*.json"):
        assert str(here) not in config.read_text(), f"{config} contains a local path"


def test_from_a_hub_with_an_empty_cache(outside, hub: HubServer, tmp_path, monkeypatch):  # noqa: F811
    from huggingface_hub import HfApi, constants

    here, images, _ = outside
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("ours", "other"):
        HfApi().create_repo(f"ada/{name}")
        HfApi().upload_folder(repo_id=f"ada/{name}", folder_path=here / name)
    environment = {
        **os.environ,
        **hub.env(home=tmp_path / "elsewhere"),
        "PYTHONPATH": "",
        "HF_HUB_OFFLINE": "0",
    }
    hub.requests.clear()
    command = [here / "venv" / "bin" / "python", here / "outside.py", here, "hub"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    # Diffusers asks for the commit once for each source file, and once more for the repository, as we do.
    asked = sum(request.path.startswith("/api/models/ada/ours/revision") for request in hub.requests)
    assert asked <= len(list((here / "ours").rglob("*.py"))) + 3
    from_hub = np.load(here / "from_hub.npz")
    assert np.array_equal(from_hub["ours"], images["ours"])
    assert np.array_equal(from_hub["other"], images["other"])


def test_samplers_are_built_and_refused_without_halftone_too(outside):
    _, images, report = outside
    assert not np.array_equal(images["dpm"], images["ours"])
    assert "use one of dpm" in report["refused"]


def test_code_runs_only_with_trust_remote_code(outside):
    assert "trust_remote_code=True" in outside[2]["without_trust"]


def test_every_shipped_file_has_a_hash_of_its_content_in_its_name(outside):
    here, _, _ = outside
    names = sorted(path.name for path in (here / "ours").rglob("*.py"))
    stems = [name.rsplit("_", 1)[0] for name in names]
    assert stems == [
        "caption_prior",
        "captions",
        "checks",
        "compatibility",
        "conditions",
        "distilled",
        "generation",
        "guidance",
        "latent_diffusion",
        "latents",
        "lora",
        "multi_head_autoencoder",
        "pixels",
        "sampling",
        "schedulers",
        "standalone",
        "starting_image",
        "starting_point",
        "words",
    ]
    index = json.loads((here / "ours" / "model_index.json").read_text())
    assert index["_class_name"][1] == "LatentDiffusionPipeline"
    assert f"{index['_class_name'][0]}.py" in names
    assert f"{index['vae'][0]}.py" in names
    theirs = {path.name for path in (here / "other").rglob("*.py")}
    shared = theirs & set(names)
    changed = {"latent_diffusion", "generation", "latents", "starting_image"}  # latents.py and what imports it
    assert {name.rsplit("_", 1)[0] for name in theirs - shared} == changed


def test_saving_over_an_older_version_leaves_no_old_source(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "latents_00000000.py").write_text("raise RuntimeError\n")
    (tmp_path / "notes.py").write_text("# the user's own\n")
    pipeline.save_pretrained(tmp_path)
    assert not (tmp_path / "latents_00000000.py").exists()
    assert (tmp_path / "notes.py").exists()


def test_push_to_hub_is_refused(tmp_path):
    with pytest.raises(ValueError, match="save first, then upload"):
        tiny_pipeline().save_pretrained(tmp_path, push_to_hub=True)


def test_helpers_in_nested_folders_are_published_side_by_side(outside):
    """The pipeline's file also imports what only its helpers need, because diffusers copies only its direct imports."""
    here, _, _ = outside
    published = {path.name.rsplit("_", 1)[0]: path.read_text() for path in (here / "nested").glob("*.py")}
    assert set(published) == {"greeting", "phrases", "punctuation", "words", "deep", "standalone", "compatibility"}
    for name, source in published.items():
        imports = re.findall(r"^ *(from \..*)", source, flags=re.MULTILINE)
        assert all(re.match(r"from \. ?\w+_[0-9a-f]{8} import ", line) for line in imports), (name, imports)
    imported = re.findall(r"^from \.(\w+)_[0-9a-f]{8} import", published["greeting"], flags=re.MULTILINE)
    assert sorted(imported) == ["compatibility", "deep", "phrases", "punctuation", "standalone", "words"]


def test_the_helper_of_a_helper_loads_without_halftone(outside):
    assert outside[2]["nested"] == "deep words!"


def test_a_published_folder_saves_the_same_files_again(outside):
    """The process without Halftone saved the same files with the same hashes and the same content."""
    here, _, _ = outside
    for first, second in (("nested", "nested_again"), ("ours", "again")):
        before, after = (
            {path.relative_to(here / name): path.read_bytes() for path in (here / name).rglob("*.py")}
            for name in (first, second)
        )
        assert before == after
        indices = [json.loads((here / name / "model_index.json").read_text()) for name in (first, second)]
        assert indices[0] == indices[1]


def test_two_files_of_one_name_are_refused(tmp_path):
    files = {"a/words.py": "A = 1\n", "b/words.py": "B = 2\n"}
    pipeline = greeting(tmp_path, "twins", files, "from .a.words import A\nfrom .b.words import B\n")
    with pytest.raises(ValueError, match=r"greeting.py imports two files called words; a published folder is flat"):
        pipeline.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from .a import A", r"greeting.py imports '\.a', which is not a file"),
        ("from . import words", r"greeting.py contains 'from \. import'"),
    ],
)
def test_an_import_that_is_not_from_a_file_is_refused(tmp_path, line, message):
    """A published folder is flat: it has no packages."""
    files = {"a/__init__.py": "A = 1\n", "words.py": "A = 1\n"}
    pipeline = greeting(tmp_path, f"package_{len(line)}", files, f"{line}\n")
    with pytest.raises(ValueError, match=message):
        pipeline.save_pretrained(tmp_path / "out")


def test_a_component_that_imports_another_file_is_refused(tmp_path):
    """A component's file is loaded from its own folder, which has no other source files."""
    component = """
        from diffusers import ConfigMixin, ModelMixin
        from diffusers.configuration_utils import register_to_config
        from ..words import SIZE

        class Part(ModelMixin, ConfigMixin):
            @register_to_config
            def __init__(self, size: int = SIZE):
                super().__init__()
    """
    files = {"words.py": "SIZE = 1\n", "models/part.py": textwrap.dedent(component)}
    pipeline = greeting(tmp_path, "leaning", files, "from .models.part import Part\n", part="Part()")
    with pytest.raises(ValueError, match=r"part.py of component 'part' imports another file"):
        pipeline.save_pretrained(tmp_path / "out")

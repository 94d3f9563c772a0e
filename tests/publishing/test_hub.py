"""Uploads with the real huggingface_hub client against a Hub on 127.0.0.1."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.tools.cli import UserError
from tests.support.hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, HubServer, hub  # noqa: F401  (a fixture)
from training.publishing.hub import HubConfig, Publisher
from training.run.checkpoint import save_contents, write_checkpoint
from training.run.folder import RunFolder
from training.run.state import RunState

FAST = (0.05, 0.1, 0.2)  # seconds between attempts to upload


@pytest.fixture(autouse=True)
def quick_client(monkeypatch):
    """Shorten the client's own waits between retries of a request, which take seconds; ours are tested here."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02)))
    yield
    # An upload that outlives its test would disturb the next: the client closes all its connections on an error.
    for thread in threading.enumerate():
        if thread.name == "hub-upload":
            thread.join(20)


@pytest.fixture
def pipeline(tmp_path) -> Path:
    folder = tmp_path / "run" / "pipeline"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "model_index.json").write_text('{"_class_name": "X"}')
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(os.urandom(200_000))
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_checkpoint(tmp_path / "run", 10)


def save_checkpoint(run: Path, step: int, **files: bytes) -> Path:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)

    def write(folder: Path) -> None:
        (folder / "optimizer.safetensors").write_bytes(os.urandom(50_000))
        (folder / "model.safetensors").write_bytes(os.urandom(50_000))
        save_contents(RunState(step=step, best_step=step).contents(), folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return write_checkpoint(run / "checkpoints", step, write)


def make_publisher(tmp_path: Path, model_id: str | None = "posters", **settings) -> tuple[Publisher, list[str]]:
    lines: list[str] = []
    config = HubConfig(hub_model_id=model_id, **settings)
    return Publisher(config, folder=RunFolder(tmp_path / "run"), notify=lines.append, retry_delays=FAST), lines


def token_file(folder: Path, token: str) -> str:
    path = folder / "token.txt"
    path.write_text(token + "\n")
    return str(path)


def test_check_makes_the_repo_in_the_users_namespace(hub, tmp_path):  # noqa: F811
    publisher, _ = make_publisher(tmp_path, hub_private_repo=True)
    publisher.check()
    publisher.check()  # it exists now
    assert publisher.model_id == "ada/posters"
    assert hub.repos["ada/posters"].private
    assert publisher.url == f"{hub.endpoint}/ada/posters"


def test_without_a_name_the_run_folder_gives_it(hub, tmp_path):  # noqa: F811
    publisher, _ = make_publisher(tmp_path, model_id=None)
    publisher.check()
    assert publisher.model_id == "ada/run"


def test_an_organization_of_the_user_will_do(hub, tmp_path):  # noqa: F811
    publisher, _ = make_publisher(tmp_path, "museum/posters")
    publisher.check()
    assert "museum/posters" in hub.repos


@pytest.mark.parametrize(
    ("token", "model_id", "message"),
    [
        (READ_TOKEN, "posters", "can only read"),
        ("hf_" + "x" * 34, "posters", "does not accept the token"),
        (OTHER_TOKEN, "ada/posters", r"'bob' may not write there.*namespaces \(bob\)"),
        (WRITE_TOKEN, "bad name!", "--hub_model_id ada/bad name!"),
        (WRITE_TOKEN, "a/b/c", "--hub_model_id a/b/c"),
    ],
)
def test_what_would_fail_later_is_refused_before_the_first_step(hub, tmp_path, token, model_id, message):  # noqa: F811
    publisher, _ = make_publisher(tmp_path, model_id, hub_token_file=token_file(tmp_path, token))
    with pytest.raises(UserError, match=message):
        publisher.check()
    assert not hub.repos


def test_a_repo_of_somebody_else_that_can_be_read_is_refused(hub, tmp_path):  # noqa: F811
    make_publisher(tmp_path, "posters")[0].check()  # ada's, public
    publisher, _ = make_publisher(tmp_path, "ada/posters", hub_token_file=token_file(tmp_path, OTHER_TOKEN))
    with pytest.raises(UserError, match="may not write there"):
        publisher.check()


def test_no_token_at_all(hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"no Hugging Face token was found; run `hf auth login`"):
        make_publisher(tmp_path)[0].check()


def test_no_network(hub, tmp_path):  # noqa: F811
    hub.stop()
    with pytest.raises(UserError, match="could not be reached"):
        make_publisher(tmp_path)[0].check()


def test_an_unknown_strategy_is_named():
    with pytest.raises(UserError, match="did you mean 'checkpoint'"):
        HubConfig(hub_strategy="checkpoints").validate()


def test_a_pipeline_goes_up_and_comes_back_from_an_empty_cache(hub, tmp_path, pipeline):  # noqa: F811
    publisher, lines = make_publisher(tmp_path)
    publisher.check()
    publisher.upload(pipeline, "Step 10")
    report = publisher.finish(timeout=30)
    assert (report.uploaded, report.missing) == ([""], [])
    assert any("Uploaded to" in line for line in lines)
    assert hub.messages("ada/posters")[-1] == "Step 10"

    script = "import sys; from huggingface_hub import snapshot_download; print(snapshot_download(sys.argv[1]))"
    environment = {**os.environ, **hub.env(token=None, home=tmp_path / "elsewhere")}
    environment.pop("HF_TOKEN")
    done = subprocess.run(
        [sys.executable, "-c", script, "ada/posters"], env=environment, capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.strip().splitlines()[-1])
    for path in pipeline.rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(pipeline)).read_bytes() == path.read_bytes()
    assert not (tmp_path / "run" / ".hub_queue").exists()


def test_training_continues_while_an_upload_waits_and_a_snapshot_is_uploaded(hub, tmp_path, pipeline):  # noqa: F811
    publisher, _ = make_publisher(tmp_path)
    publisher.check()
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    hub.gate.clear()  # the Hub hangs
    start = time.monotonic()
    publisher.upload(pipeline, "first")
    assert time.monotonic() - start < 1
    weights.write_bytes(b"changed in place")
    shutil.rmtree(pipeline)
    hub.gate.set()
    assert publisher.finish(timeout=30).missing == []
    assert hub.files("ada/posters")["unet/diffusion_pytorch_model.safetensors"] == before


def test_a_checkpoint_that_is_pruned_while_it_waits_is_uploaded_whole(hub, tmp_path, checkpoint):  # noqa: F811
    publisher, _ = make_publisher(tmp_path, hub_strategy="checkpoint")
    publisher.check()
    before = (checkpoint / "optimizer.safetensors").read_bytes()
    hub.gate.clear()
    publisher.checkpoint_saved(checkpoint)
    linked = list((tmp_path / "run" / ".hub_queue").rglob("optimizer.safetensors"))
    assert [path.stat().st_nlink for path in linked] == [2]  # no second copy of gigabytes
    shutil.rmtree(checkpoint)
    hub.gate.set()
    publisher.finish(timeout=30)
    assert hub.files("ada/posters")["last-checkpoint/optimizer.safetensors"] == before


def test_a_newer_upload_takes_the_place_of_one_that_waits(hub, tmp_path, pipeline):  # noqa: F811
    publisher, _ = make_publisher(tmp_path)
    publisher.check()
    hub.gate.clear()
    for number in range(5):
        (pipeline / "model_index.json").write_text(f'{{"number": {number}}}')
        publisher.upload(pipeline, f"Step {number}")
        time.sleep(0.05)
    hub.gate.set()
    publisher.finish(timeout=30)
    assert hub.messages("ada/posters")[1:] == ["Step 0", "Step 4"]
    assert hub.files("ada/posters")["model_index.json"] == b'{"number": 4}'


def test_server_errors_are_tried_again(hub, tmp_path, pipeline):  # noqa: F811
    publisher, lines = make_publisher(tmp_path)
    publisher.check()
    # More than the client's own five retries of one request, so that ours are needed.
    hub.fail_next(8, 500, match="/preupload/")
    hub.fail_next(1, 503, match="/lfs/")
    publisher.upload(pipeline, "Step 10")
    report = publisher.finish(timeout=30)
    assert report.missing == []
    assert not any("warning" in line for line in lines)
    statuses = [request.status for request in hub.requests if "/preupload/" in request.path]
    assert statuses == [500] * 8 + [200] * 2  # for the weights, and for all files


def test_a_hub_that_dies_costs_one_warning_and_a_command_to_type(hub, tmp_path, pipeline):  # noqa: F811
    publisher, lines = make_publisher(tmp_path, hub_strategy="every_save")
    publisher.check()
    hub.stop()
    for number in range(3):
        publisher.upload(pipeline, f"Step {number}")
        time.sleep(0.05)
    report = publisher.finish(timeout=30)
    assert report.missing == [""]
    assert sum("failed: " in line for line in lines) == 1
    assert f"training/push_to_hub.py {tmp_path / 'run'} --hub_model_id ada/posters" in lines[-1]


def test_a_right_that_is_withdrawn_is_not_tried_again(hub, tmp_path, pipeline):  # noqa: F811
    publisher, lines = make_publisher(tmp_path)
    publisher.check()
    hub.users[WRITE_TOKEN] = ("ada", "read")
    publisher.upload(pipeline, "Step 10")
    assert publisher.finish(timeout=30).missing == [""]
    assert sum("/preupload/" in request.path for request in hub.requests) == 1
    assert sum("failed: " in line for line in lines) == 1


def test_finish_does_not_wait_for_ever(hub, tmp_path, pipeline):  # noqa: F811
    publisher, lines = make_publisher(tmp_path)
    publisher.check()
    hub.gate.clear()
    publisher.upload(pipeline, "Step 10")
    start = time.monotonic()
    report = publisher.finish(timeout=0.3)
    assert time.monotonic() - start < 3
    assert report.missing == [""]
    assert "run the same command again" in lines[-1]


def test_a_folder_that_is_not_there_costs_a_warning(hub, tmp_path):  # noqa: F811
    publisher, lines = make_publisher(tmp_path)
    publisher.check()
    publisher.upload(tmp_path / "nothing", "Step 10")
    assert publisher.finish(timeout=5).missing == [""]
    assert "failed: " in lines[0]


@pytest.mark.parametrize(
    ("strategy", "paths"),
    [
        ("end", []),
        ("every_save", []),
        ("checkpoint", ["last-checkpoint"]),
        ("all_checkpoints", ["last-checkpoint", "checkpoints/step-00000010"]),
    ],
)
def test_checkpoints_go_up_only_where_the_strategy_says_so(hub, tmp_path, checkpoint, strategy, paths):  # noqa: F811
    publisher, _ = make_publisher(tmp_path, hub_strategy=strategy)
    publisher.check()
    publisher.checkpoint_saved(checkpoint)
    assert publisher.finish(timeout=30).uploaded == paths
    names = {name for name in hub.files("ada/posters") if name != ".gitattributes"}
    expected = ["manifest.json", "model.safetensors", "optimizer.safetensors", "trainer_state.json"]
    run_files = {"last-checkpoint/run/config.yaml"} if paths else set()
    assert names == {f"{path}/{name}" for path in paths for name in expected} | run_files


def test_a_checkpoints_pipeline_goes_to_the_root_at_every_save(hub, tmp_path, checkpoint):  # noqa: F811
    (checkpoint / "pipeline").mkdir()
    (checkpoint / "pipeline" / "model_index.json").write_text("{}")
    publisher, _ = make_publisher(tmp_path, hub_strategy="every_save")
    publisher.check()
    publisher.checkpoint_saved(checkpoint)
    publisher.finish(timeout=30)
    assert set(hub.files("ada/posters")) == {".gitattributes", "model_index.json"}


def test_finish_may_be_called_again_and_uploads_may_follow_it(hub, tmp_path, pipeline):  # noqa: F811
    publisher, lines = make_publisher(tmp_path)
    publisher.check()
    assert publisher.finish().uploaded == []
    publisher.upload(pipeline, "one")
    publisher.finish(timeout=30)
    reported = len(lines)
    assert publisher.finish(timeout=30).uploaded == [""]
    assert len(lines) == reported  # each result is reported once
    (pipeline / "model_index.json").write_text('{"new": 1}')
    publisher.upload(pipeline, "two")
    publisher.finish(timeout=30)
    assert hub.messages("ada/posters")[1:] == ["one", "two"]


def test_the_last_checkpoint_replaces_the_one_before_it(hub, tmp_path):  # noqa: F811
    publisher, _ = make_publisher(tmp_path, hub_strategy="checkpoint")
    publisher.check()
    publisher.checkpoint_saved(save_checkpoint(tmp_path / "run", 10, only_in_the_first=b"{}"))
    publisher.finish(timeout=30)
    assert "last-checkpoint/only_in_the_first" in hub.files("ada/posters")
    publisher.checkpoint_saved(save_checkpoint(tmp_path / "run", 20))
    publisher.finish(timeout=30)
    assert hub.messages("ada/posters")[1:] == ["step-00000010: checkpoint", "step-00000020: checkpoint"]
    assert "last-checkpoint/only_in_the_first" not in hub.files("ada/posters")
    assert "last-checkpoint/model.safetensors" in hub.files("ada/posters")


def test_training_state_and_secrets_stay_at_home(hub, tmp_path, pipeline):  # noqa: F811
    (pipeline / "optimizer.safetensors").write_bytes(b"state")
    (pipeline / ".env").write_text("HF_TOKEN=...")
    (pipeline / "config.yaml").write_text(f"hub_token: {WRITE_TOKEN}\n")
    (pipeline / "tokenizer").mkdir()
    (pipeline / "tokenizer" / "tokenizer.json").write_text("{}")  # `token` in a name does not make it a secret
    publisher, lines = make_publisher(tmp_path)
    publisher.check()
    publisher.upload(pipeline, "Step 10")
    publisher.finish(timeout=30)
    assert set(hub.files("ada/posters")) == {
        ".gitattributes",
        "README.md",
        "model_index.json",
        "tokenizer/tokenizer.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert sum("access token" in line for line in lines) == 1


@pytest.mark.slow  # test_standalone.py does so with our own pipelines
def test_diffusers_loads_a_pipeline_from_the_hub(hub: HubServer, tmp_path):  # noqa: F811
    """Diffusers' from_pretrained loads a repository that the real client uploaded to the test server."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
    from safetensors.torch import load_file

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    folder = tmp_path / "run" / "pipeline"
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    publisher, _ = make_publisher(tmp_path)
    publisher.check()
    publisher.upload(folder, "A pipeline")
    assert publisher.finish(timeout=30).missing == []
    # In a process of its own: Diffusers keeps the endpoint that it saw when it was imported.
    script = (
        "import sys; from diffusers import DiffusionPipeline; from safetensors.torch import save_file; "
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1]); "
        "save_file({'weight': pipeline.unet.conv_in.weight.data.contiguous()}, sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", script, "ada/posters", str(tmp_path / "weight.safetensors")],
        env={**os.environ, **hub.env(home=tmp_path / "elsewhere")},
        check=True,
        capture_output=True,
    )
    assert torch.equal(load_file(tmp_path / "weight.safetensors")["weight"], unet.conv_in.weight)


def test_the_server_answers_ranges_and_private_repos_as_the_hub_does(hub: HubServer, tmp_path, pipeline):  # noqa: F811
    import urllib.error
    import urllib.request

    publisher, _ = make_publisher(tmp_path, hub_private_repo=True)
    publisher.check()
    publisher.upload(pipeline, "Step 10")
    publisher.finish(timeout=30)
    url = f"{hub.endpoint}/ada/posters/resolve/main/model_index.json"
    headers = {"Authorization": f"Bearer {WRITE_TOKEN}", "Range": "bytes=2-5"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        assert answer.status == 206
        assert answer.read() == (pipeline / "model_index.json").read_bytes()[2:6]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url)

"""Trials of what leaves the machine: access tokens, uploads, model cards, trackers, and folders named by others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.lab import DIFFUSION, REPO, TOY, Command, Lab, Worker
from tests.faults.shim import SLOW
from tests.faults.table import Row, Rows, expect, trial
from tests.faults.trials_runs import fresh
from tests.support.hub_server import WRITE_TOKEN

SECRET = "hf_" + "SecretSecret" * 3
END = TOY.plus("--push_to_hub", "true", "--hub_model_id", REPO, folder="pushed")


def files_with(text: str, folder: Path) -> list[str]:
    """Return the files below `folder` that contain `text`."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [str(path.relative_to(folder)) for path in files if text.encode() in path.read_bytes()]


@trial("A secret on the command line")
def secret_on_the_command_line(lab: Lab) -> Rows:
    row = Row("`--hub_token VALUE`, in four spellings")
    for words in (
        ["--hub_token", SECRET],
        [f"--hub_token={SECRET}"],
        ["--hub-token", SECRET],
        ["--hub_token+", SECRET],
    ):
        with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
            done = worker.type(TOY.plus(*words), folder)
            says = ["hf auth login", "HF_TOKEN", "--hub_token_file"]
            problems = expect(done, [2], says, never=["Traceback", SECRET])
            row.record(done, problems + [f"the token is in {name}" for name in files_with(SECRET, folder)])
    yield row
    row = Row(
        "a token from HF_TOKEN or `--hub_token_file`: searched in the run folder, W&B files, stdout and the repository"
    )
    for from_file in (False, True):
        with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
            (folder / "token").write_text(WRITE_TOKEN)
            words = ("--hub_token_file", "token") if from_file else ()
            command = END.plus("--report_to", "wandb", *words)
            environment = {
                "HF_TOKEN": "" if from_file else WRITE_TOKEN,
                "WANDB_DIR": str(folder),
                "WANDB_MODE": "offline",
            }
            done = worker.type(command, folder, **environment)
            problems = expect(done, [0], never=["Traceback", WRITE_TOKEN])
            problems += [f"the token is in {name}" for name in files_with(WRITE_TOKEN, folder) if name != "token"]
            published = worker.hub.files(REPO) if REPO in worker.hub.repos else {}
            problems += [
                f"{name} in the repository has it" for name, data in published.items() if WRITE_TOKEN.encode() in data
            ]
            row.record(done, problems if published else [*problems, "nothing was uploaded"])
    yield row


def _is_uploaded(worker: Worker, folder: Path, command: Command) -> list[str]:
    """Return what of the exported pipeline is not in the repository."""
    pipeline = folder / command.folder / "pipeline"
    published = worker.hub.files(REPO) if REPO in worker.hub.repos else {}
    files = {p.relative_to(pipeline).as_posix(): p.read_bytes() for p in pipeline.rglob("*") if p.is_file()}
    # The published card names the repository, which the card of a run that was not to be uploaded does not.
    same = {name: name == "README.md" or published.get(name) == data for name, data in files.items()}
    return [f"{name} is not in the repository" for name in files if name not in published or not same[name]]


@trial("Uploads that are made up for")
def uploads_made_up_for(lab: Lab) -> Rows:
    row = Row("an upload that is asked for after the run is complete")
    with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
        assert worker.type(TOY.plus(folder="pushed"), folder).status == 0
        done = worker.type(END, folder)
        yield row.record(done, expect(done, [0]) + _is_uploaded(worker, folder, END))
    row = Row("an upload that was killed, typed again")
    for seconds in (0.0, 0.3, 0.6):
        with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
            worker.hub.gate.clear()
            process = worker.start(END, folder)
            while not (folder / "pushed/record.json").exists():
                time.sleep(0.02)
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
            killed = worker.end()
            worker.hub.gate.set()
            done = worker.type(END, folder)
            row.record(killed, expect(done, [0]) + _is_uploaded(worker, folder, END), lost=0)
    yield row
    row = Row("an upload that the Hub refused (403), typed again")
    with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
        worker.hub.fail_next(1000, 403, "/commit/|/preupload/")
        refused = worker.type(END, folder)
        worker.hub._failures.clear()
        done = worker.type(END, folder)
        yield row.record(refused, expect(done, [0]) + _is_uploaded(worker, folder, END), lost=0)
    row = Row("Hub that does not answer during the final upload; SIGTERM")
    with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
        worker.hub.gate.clear()
        process = worker.start(END, folder)
        while not (folder / "pushed/record.json").exists():
            time.sleep(0.02)
        os.kill(process, signal.SIGTERM)
        began = time.monotonic()
        stopped = worker.end()
        took = time.monotonic() - began
        worker.hub.gate.set()
        problems = expect(stopped, [0, 75]) + ([f"it took {took:.1f} s to stop"] if took > 3 else [])
        done = worker.type(END, folder)
        yield row.record(stopped, problems + expect(done, [0]) + _is_uploaded(worker, folder, END), lost=0)


_HOSTILE = (
    "a poster <script>alert(1)</script>",
    "[click](javascript:alert(1)) a poster",
    "![x](http://evil.example/track.png) a poster",
    "<img src=http://evil.example/x.png>",
    "Authorization: Bearer abcdef0123456789abcdef",
    "/home/ada/secret/poster.png and C:\\Users\\ada\\x.png",
)
_FORBIDDEN = (r"<script", r"\]\(javascript:", r"!\[[^\]]*\]\(http", r"<img\b", r"Bearer abcdef0123456789")


@trial("Model cards")
def hostile_cards(lab: Lab) -> Rows:
    """Captions in a published README neither act nor tell where the data lies."""
    row = Row("captions with HTML, scripts, remote images and credentials, and local paths, in a model card")
    lab.changes(DIFFUSION)
    for caption in _HOSTILE:
        with lab.worker() as worker, fresh(worker, DIFFUSION, lab) as folder:
            here = DIFFUSION.plus("--preview_prompts", f"[{caption!r}]", "--dataset_name", str(folder / "posters"))
            done = worker.type(here, folder)
            card = folder / DIFFUSION.folder / "pipeline/README.md"
            text = card.read_text(encoding="utf-8") if card.exists() else ""
            prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)  # code is shown as it is
            problems = expect(done, [0, 2])
            problems += [f"the card contains {pattern}" for pattern in _FORBIDDEN if re.search(pattern, prose)]
            if any(path in text for path in (str(folder), str(Path.home()) + "/")):
                problems.append("the card contains a path of this machine")
            row.record(done, problems)
    yield row


@trial("--overwrite")
def overwriting_any_folder(lab: Lab) -> Rows:
    row = Row("`--overwrite true` with an output folder that contains something other than a run")
    for name in ("documents", "."):
        with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
            (folder / "documents").mkdir()
            (folder / "documents/letter.txt").write_text("dear")
            done = worker.type(TOY.plus("--output_dir", name, "--overwrite", "true"), folder)
            kept = (folder / "documents/letter.txt").is_file() and {p.name for p in folder.iterdir()} == {"documents"}
            row.record(done, expect(done, [2], ["--overwrite"]) + ([] if kept else [f"{name} was moved"]))
    yield row


@trial("Trackers")
def trackers_that_block(lab: Lab) -> Rows:
    row = Row("TensorBoard on a disk that takes 2 s for each write")
    lab.changes(TOY)
    with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
        command = TOY.plus("--report_to", "tensorboard", folder="tracked")
        worker.plan.arm(folder / "tracked/tensorboard", 1, SLOW)
        done = worker.type(command, folder)
        slowed = worker.plan.faults()
        worker.plan.clear()
        last = (folder / "tracked/metrics.csv").read_text().splitlines()[-1]
        seconds = float(last.split(",")[-2])
        problems = expect(done, [0]) + ([] if slowed else ["nothing was slow"])
        yield row.record(done, problems + ([f"six steps took {seconds} s"] if seconds > 2 else []), lost=0)
    row = Row("W&B online, and its server does not answer")
    with lab.worker() as worker, fresh(worker, TOY, lab) as folder:
        silent = subprocess.Popen(
            [sys.executable, "-c", "import socket, time; s = socket.create_server(('127.0.0.1', 0)); "
             "print(s.getsockname()[1], flush=True); time.sleep(600)"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert silent.stdout is not None
        port = silent.stdout.readline().strip()
        settings = {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40}
        done = worker.type(TOY.plus("--report_to", "wandb", folder="tracked"), folder, **settings)
        silent.kill()
        yield row.record(done, expect(done, [0]), lost=0)

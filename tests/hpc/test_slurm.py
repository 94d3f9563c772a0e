"""Jobs on a real Slurm: a preempted run, an array with shared inputs, chains, and what is submitted by hand."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.runs import ROOT, assert_same_state, launch, relative_difference
from training.core.parsing import parse_config
from training.experiments.registry import config_class
from training.hpc.requeue import newest_checkpoint
from training.run.folder import RunFolder
from training.run.metrics_log import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAIN = "training/train_autoencoder.py"
STEPS = ("--max_train_steps", "150")


def wait_for_steps(run: Path, steps: int, seconds: float = 120) -> None:
    """Wait until a run has rows of this many steps."""
    deadline = time.monotonic() + seconds
    while not (run / "metrics.csv").is_file() or len(read_metrics(run / "metrics.csv")) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, training_flags) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(ROOT / TRAIN, *training_flags, *STEPS, "--output_dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


PREEMPTED = {
    # What Slurm sends before the time limit (--signal=USR1@…): to the processes of the trainer, not to the script.
    "before the time limit": ("scancel", "--signal=USR1"),
    # What an administrator or a preemption does: a SIGTERM, and Slurm requeues the job itself.
    "by preemption": ("scontrol", "requeue"),
}


@pytest.mark.parametrize("how", PREEMPTED)
def test_a_stopped_job_is_requeued_and_ends_with_the_bits_of_an_undisturbed_one(
    cluster, training_flags, undisturbed, how
):
    flags = (*training_flags, *STEPS, "--output_dir", "runs/mine")
    job = cluster.submit("--name", "mine", "--", TRAIN, *flags)["mine"]
    wait_for_steps(cluster.folder / "runs/mine", 5)
    cluster.slurm.ask(*PREEMPTED[how], job)
    ended = cluster.slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), cluster.output()
    assert "resum" in (cluster.folder / "runs/mine/run.log").read_text()
    assert_same_state(cluster.folder / "runs/mine", undisturbed)


def test_a_run_of_two_processes_is_preempted_and_ends_like_an_undisturbed_one(cluster, training_flags, tmp_path):
    flags = (*training_flags, "--max_train_steps", "100")
    job = cluster.submit("--processes_per_node", "2", "--", TRAIN, *flags, "--output_dir", "runs/mine")
    wait_for_steps(cluster.folder / "runs/mine", 5)
    cluster.slurm.ask("scancel", "--signal=USR1", job["autoencoder"])
    ended = cluster.slurm.wait(job["autoencoder"])
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), cluster.output()
    other = tmp_path / "undisturbed"
    done = launch(ROOT / TRAIN, *flags, "--output_dir", str(other), processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_state(cluster.folder / "runs/mine", other)


def test_two_processes_train_with_fsdp2(cluster, training_flags, tmp_path):
    """The weights are those of DDP, up to the last digits."""
    flags = (*training_flags, "--max_train_steps", "4", "--mixed_precision", "no")
    words = ("--processes_per_node", "2", "--parallelism", "fsdp2", "--name", "sharded")
    job = cluster.submit(*words, "--", TRAIN, *flags, "--output_dir", "runs/mine")["sharded"]
    assert cluster.slurm.wait(job)["JobState"] == "COMPLETED", cluster.output()
    assert "with FSDP2" in (cluster.folder / "runs/mine/run.log").read_text()
    done = launch(ROOT / TRAIN, *flags, "--output_dir", str(tmp_path / "ddp"), processes=2)
    assert done.returncode == 0, done.stderr
    assert relative_difference(cluster.folder / "runs/mine", tmp_path / "ddp") < 1e-3


def test_a_cancelled_job_and_one_with_a_wrong_setting_are_not_requeued(cluster, training_flags):
    flags = (*training_flags, "--max_train_steps", "100000")
    cancelled = cluster.submit("--name", "long", "--", TRAIN, *flags, "--output_dir", "runs/long")["long"]
    wrong = (*training_flags, "--image_column", "photograph", "--output_dir", "runs/wrong")
    failing = cluster.submit("--name", "wrong", "--", TRAIN, *wrong)["wrong"]
    waiting = cluster.submit("--name", "next", "--after", "wrong", "--", TRAIN, *wrong)["next"]
    wait_for_steps(cluster.folder / "runs/long", 3)
    cluster.slurm.ask("scancel", cancelled)
    assert cluster.slurm.wait(cancelled)["JobState"] == "CANCELLED"
    failed = cluster.slurm.wait(failing)
    assert (failed["JobState"], failed["ExitCode"], failed["Restarts"]) == ("FAILED", "2:0", "0"), cluster.output()
    assert cluster.slurm.wait(waiting)["JobState"] == "CANCELLED"  # it would wait for ever
    assert (cluster.slurm.job(cancelled)["JobState"], cluster.slurm.job(cancelled)["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.long
def test_the_signal_of_slurm_itself_comes_before_the_time_limit(cluster, training_flags):
    """A run without end, and a limit of three minutes: it saves, is requeued and resumes, and never reaches the limit.

    Slurm may send the signal a minute early.
    """
    flags = (*training_flags, "--max_train_steps", "1000000", "--output_dir", "runs/endless")
    job = cluster.submit("--name", "endless", "--time", "00:03:00", "--", TRAIN, *flags)["endless"]
    deadline = time.monotonic() + 300
    while cluster.slurm.job(job)["Restarts"] == "0":
        assert time.monotonic() < deadline, cluster.output()
        time.sleep(0.5)
    saved = newest_checkpoint(RunFolder(cluster.folder / "runs/endless"))
    assert saved
    cluster.slurm.wait(job, "RUNNING")
    step = int(saved.removeprefix("step-"))
    wait_for_steps(cluster.folder / "runs/endless", step + 2)
    cluster.slurm.ask("scancel", job)
    cluster.slurm.wait(job)
    output = cluster.output()
    assert "exit status 75: the job was asked to stop and is requeued" in output
    assert "DUE TO TIME LIMIT" not in output


def write_experiments(folder: Path, flags: tuple[str, ...]) -> None:
    """Write three experiments: two with inputs that they share, and one that begins with the weights of the first."""
    values = parse_config(config_class("autoencoder"), [*flags, "--max_train_steps", "4"]).to_dict()
    recipe = "data_scripts/make_posters.py --output_dir data/shared --num_posters 40 --num_workers 1 " \
        "--validation_fraction 0.1 --test_fraction 0.1"  # fmt: skip
    shared = {**values, "dataset_name": "data/shared", "prepare": {"data/shared": recipe}}
    (folder / "autoencoder").mkdir()
    made = {"runs/sweep/one/pipeline": f"{TRAIN} --config autoencoder/one.yaml"}
    own = {
        "one": shared,
        "two": {**shared, "learning_rate": 1e-4},
        "three": {**shared, "init_from": "runs/sweep/one", "prepare": {**shared["prepare"], **made}},
    }
    for name, settings in own.items():
        text = yaml.safe_dump({**settings, "output_dir": f"runs/sweep/{name}"}, sort_keys=False)
        (folder / f"autoencoder/{name}.yaml").write_text(text)


def test_shared_inputs_are_made_once_and_an_experiment_waits_for_its_input(cluster, training_flags):
    write_experiments(cluster.folder, training_flags)
    jobs = cluster.submit("--array", "autoencoder/*.yaml", "--max_running", "2")
    assert list(jobs) == ["sweep-inputs", "sweep-1", "sweep"]
    before = cluster.slurm.job(f"{jobs['sweep-1']}_1")["Dependency"]
    assert f"afterok:{jobs['sweep-inputs']}" in before
    assert f"afterok:{jobs['sweep-1']}_1" in cluster.slurm.job(jobs["sweep"])["Dependency"]
    pending = cluster.run(sys.executable, "training/hpc/submit.py", "--status").stdout
    assert "three" in pending
    assert "pending" in pending
    assert cluster.slurm.wait(jobs["sweep"])["JobState"] == "COMPLETED", cluster.output()
    for task in ("1", "2"):
        assert cluster.slurm.wait(f"{jobs['sweep-1']}_{task}")["JobState"] == "COMPLETED", cluster.output()
    output = cluster.output()
    assert output.count("data/shared is missing; making it") == 1
    assert (
        "data/shared is missing" in (cluster.folder / f"runs/hpc/sweep-inputs-{jobs['sweep-inputs']}.out").read_text()
    )
    rows = {line.split()[0]: line.split() for line in status(cluster)}
    assert rows["one"][1:5] == [f"{jobs['sweep-1']}_1", "complete", "4", "4"]
    assert float(rows["two"][5]) > 0
    assert rows["three"][2:5] == ["complete", "4", "4"]
    # Everything is there, so nothing is made before, and no task waits for it.
    again = cluster.run(sys.executable, "training/hpc/submit.py", "--array", "autoencoder/*.yaml", "--dry_run").stdout
    assert "make_inputs" not in again


def status(cluster) -> list[str]:
    done = cluster.run(sys.executable, "training/hpc/submit.py", "--status", "sweep")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_sbatch_takes_what_a_dry_run_prints(cluster, training_flags):
    """One job, and a script that submits several: run by bash, and submitted itself."""
    submit = (sys.executable, "training/hpc/submit.py", "--dry_run")
    one = cluster.run(*submit, "--", TRAIN, *training_flags, "--max_train_steps", "2", "--output_dir", "runs/one")
    done = cluster.run("sbatch", "--parsable", stdin=one.stdout)
    assert done.returncode == 0, done.stderr
    write_experiments(cluster.folder, training_flags)
    several = cluster.run(*submit, "--array", "autoencoder/one.yaml", "autoencoder/two.yaml").stdout
    outer = cluster.run("sbatch", "--parsable", stdin=several).stdout.strip()
    assert cluster.slurm.wait(done.stdout.strip())["JobState"] == "COMPLETED", cluster.output()
    assert (cluster.folder / "runs/one/record.json").is_file()
    assert cluster.slurm.wait(outer)["JobState"] == "COMPLETED", cluster.output()
    lines = (cluster.folder / "runs/hpc/sweep-submission.out").read_text().split()
    jobs = dict(zip(lines[::2], lines[1::2], strict=True))
    assert list(jobs) == ["sweep-inputs", "sweep"]
    for task in ("1", "2"):
        assert cluster.slurm.wait(f"{jobs['sweep']}_{task}")["JobState"] == "COMPLETED", cluster.output()
    assert (cluster.folder / "runs/sweep/two/record.json").is_file()


def test_a_refusal_of_slurm_is_one_message(cluster, training_flags):
    words = ("--partition", "nowhere", "--", TRAIN, *training_flags, "--output_dir", "runs/x")
    done = cluster.run(sys.executable, "training/hpc/submit.py", *words)
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert "Traceback" not in done.stderr

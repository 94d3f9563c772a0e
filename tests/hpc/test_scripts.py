"""What submit.py prints: scripts for both schedulers, the settings of a site, and errors."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipelines.tools.cli import UserError
from tests.hpc.bsub_grammar import NotBsub, options_of
from tests.support.runs import ROOT, assert_same_state, command, environment, launch
from training.hpc import submit
from training.hpc.jobs import Job, Task, Waiting, job_script, submission_script
from training.hpc.sites import Site, read_site

TRAIN = ("training/train_autoencoder.py", "--config", "autoencoder/emoji_64")
FULL = {
    "nodes": 2, "gpus_per_node": 4, "gpu_type": "a100", "cpus_per_process": 8, "memory_per_node": "64G",
    "time": "1-02:30:00", "warning_seconds": 90, "partition": "gpu", "account": "images", "modules": ["cuda/12.8"],
    "environment": {"NAME": "two words"}, "setup": ["ulimit -n 4096"], "python": "python",
    "container": "apptainer exec --nv my.sif",
}  # fmt: skip


def printed(capsys, *words: str) -> str:
    assert submit.main(["--dry_run", *words]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(submit.SITE_VARIABLE, raising=False)
    return tmp_path


def site_file(folder: Path, **changed: object) -> str:
    (folder / "site.yaml").write_text(yaml.safe_dump({**FULL, **changed}))
    return str(folder / "site.yaml")


def bash(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def sbatch_options(script: str) -> dict[str, str]:
    lines = script.split("\n\n")[0].splitlines()
    words = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    return {word.partition("=")[0]: word.partition("=")[2] for word in words}


def test_every_setting_of_a_site_is_in_the_script_for_slurm(capsys, elsewhere):
    script = printed(capsys, "--site", site_file(elsewhere, qos="long", options=["--exclusive"]), "--", *TRAIN)
    bash(script)
    assert sbatch_options(script) == {
        "--job-name": "autoencoder", "--nodes": "2", "--ntasks-per-node": "4", "--cpus-per-task": "8",
        "--gpus-per-node": "a100:4", "--mem": "64G", "--time": "1-02:30:00", "--partition": "gpu",
        "--account": "images", "--qos": "long", "--signal": "USR1@90", "--requeue": "", "--open-mode": "append",
        "--output": "runs/hpc/autoencoder-%j.out", "--exclusive": "",
    }  # fmt: skip
    for line in (
        f"cd {elsewhere} || exit 2", "module load cuda/12.8", "export NAME='two words'", "ulimit -n 4096",
        "export OMP_NUM_THREADS=8",
    ):  # fmt: skip
        assert line in script.splitlines()
    assert "command=(apptainer exec --nv my.sif python " in script
    assert f"{ROOT}/training/train_autoencoder.py --config autoencoder/emoji_64)" in script
    assert "run=runs/emoji_64/autoencoder;" in script


def test_every_setting_of_a_site_is_in_the_script_for_lsf(capsys, elsewhere):
    script = printed(capsys, "--site", site_file(elsewhere, scheduler="lsf"), "--after", "7", "--", *TRAIN)
    bash(script)
    assert options_of(script) == {
        "-J": "autoencoder", "-n": "64", "-R": "span[ptile=32]", "-gpu": "num=4:gmodel=a100", "-M": "64G",
        "-W": "26:30", "-q": "gpu", "-P": "images", "-wa": "USR1", "-wt": "2", "-Q": "75", "-r": None,
        "-o": "runs/hpc/autoencoder-%J.out", "-w": "done(7)",
    }  # fmt: skip
    assert 'blaunch "$host"' in script


@pytest.mark.parametrize(("time", "limit"), [("00:02:30", "0:03"), ("00:02:01", "0:03"), ("01:00:00", "1:00")])
def test_lsf_gets_whole_minutes_and_warns_after_the_start(capsys, elsewhere, time, limit):
    site = site_file(elsewhere, scheduler="lsf", warning_seconds=120, time=time)
    options = options_of(printed(capsys, "--site", site, "--", *TRAIN))
    assert (options["-W"], options["-wt"]) == (limit, "2")


def test_further_options_of_a_site_are_options_of_bsub(capsys, elsewhere):
    further = ['-R "rusage[mem=4096]"', "-x", '-R "select[ngpus>0 && type==X86_64] order[mem]"']
    site = site_file(elsewhere, scheduler="lsf", options=further)
    options = options_of(printed(capsys, "--site", site, "--", *TRAIN))
    assert options["-R"] == "span[ptile=32] rusage[mem=4096] select[ngpus>0 && type==X86_64] order[mem]"
    assert "-x" in options


@pytest.mark.parametrize(
    "line",
    [
        "#BSUB -W soon",
        "#BSUB -n 0",
        "#BSUB -Q",
        "#BSUB --time 1",
        "#BSUB -r\n#BSUB -r",
        "#BSUB -wa USR1",
        "#BSUB -W 0:02\n#BSUB -wa USR1\n#BSUB -wt 2",
        "#BSUB -R mem=4096",
        "#BSUB -R 'rusage[]'",
        "cd x\n#BSUB -r",
    ],
)
def test_the_grammar_refuses_what_bsub_would(line):
    with pytest.raises(NotBsub):
        options_of(f"#!/bin/bash\n{line}\ntrue\n")


def test_flags_replace_the_settings_of_a_site(capsys, elsewhere):
    words = ("--site", site_file(elsewhere), "--nodes", "1", "--gpus_per_node", "0", "--time", "00:30:00")
    options = sbatch_options(printed(capsys, *words, "--", *TRAIN))
    assert (options["--nodes"], options["--ntasks-per-node"], options["--time"]) == ("1", "1", "00:30:00")
    assert "--gpus-per-node" not in options


@pytest.mark.parametrize("scheduler", ["slurm", "lsf"])
def test_fsdp2_is_asked_for_in_the_job_of_a_training_only(capsys, elsewhere, scheduler):
    words = ("--site", site_file(elsewhere, scheduler=scheduler, parallelism="fsdp2"))
    script = printed(capsys, *words, "--", *TRAIN)
    bash(script)
    assert "export ACCELERATE_USE_FSDP=true FSDP_VERSION=2" in script
    assert "FSDP" not in printed(capsys, *words, "--parallelism", "ddp", "--", *TRAIN)
    other = ("data_scripts/precompute_latents.py", "--vae", "x")
    assert "FSDP" not in printed(capsys, *words, "--", *other)


def test_the_shipped_site_contains_every_default():
    shipped = read_site("site.yaml", {})
    assert shipped == Site()
    text = (ROOT / "configs/cluster/site.yaml").read_text()
    assert {
        name for name in Site.__dataclass_fields__ if not re.search(rf"^(# )?{name}: ", text, re.MULTILINE)
    } == set()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"partitoin": "gpu"}, "unknown setting 'partitoin' in .*did you mean 'partition'"),
        ({"nodes": 0}, "nodes is 0; it must be at least 1"),
        ({"nodes": "two"}, "nodes in .* is two; give a whole number"),
        ({"modules": "cuda"}, "modules in .* is cuda; give a list of texts"),
        ({"time": "soon"}, "time is 'soon'; write it as HH:MM:SS"),
        ({"time": "00:01:00"}, "warning_seconds is 90, and the time limit 00:01:00 is not longer"),
        ({"scheduler": "lsf", "time": "00:01:40"}, "LSF counts in minutes: the warning 2 minutes before a limit of 2 "),
        ({"parallelism": "fsdp"}, "parallelism is 'fsdp'; did you mean 'fsdp2'"),
        ({"parallelism": "fsdp2", "nodes": 1, "gpus_per_node": 1}, "among several processes, and the job has one"),
        ({"scheduler": "slrum"}, "scheduler is 'slrum'; did you mean 'slurm'"),
        ({"environment": {"A B": "1"}}, "environment has the name 'A B'"),
        ({"template": "no.jinja"}, "the template 'no.jinja' .* does not exist"),
    ],
)
def test_a_wrong_setting_of_a_site_is_one_message(elsewhere, setting, message):
    with pytest.raises(UserError, match=message):
        submit.main(["--dry_run", "--site", site_file(elsewhere, **setting), "--", *TRAIN])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is nothing to submit"),
        (("--", "rm", "-rf"), "which is not a script of this project"),
        (("--", "training/train_autoencoder.py", "--train_batch_size", "4"), "neither --config nor --output_dir"),
        (("--", *TRAIN, "--train_batch_sise", "4"), "did you mean 'train_batch_size'"),
        (("--gpus_per_node", "4", "--", "data_scripts/make_posters.py"), "is a single process, and the job asks for 4"),
        (("--after", "latents", "--", *TRAIN), "submit it first, as the script that --dry_run prints contains"),
        (("--seeds", "2", "--", *TRAIN), "--sweep and --seeds need experiments"),
        (("--name", "-x y", "--", *TRAIN), "--name"),
        (("--status",), "no jobs in runs/hpc/jobs.jsonl"),
    ],
)
def test_a_wrong_command_is_one_message(words, message):
    with pytest.raises(UserError, match=message):
        submit.main(["--dry_run", *words])


def test_a_site_can_have_a_template_of_its_own(capsys, elsewhere):
    text = (ROOT / "configs/cluster/slurm.sh.jinja").read_text()
    (elsewhere / "my.sh.jinja").write_text(text.replace("#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --exclusive"))
    site = site_file(elsewhere, template=str(elsewhere / "my.sh.jinja"))
    assert "--exclusive" in sbatch_options(printed(capsys, "--site", site, "--", *TRAIN))
    (elsewhere / "my.sh.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match=r"the template .*my.sh.jinja, line 1 cannot be used"):
        submit.main(["--dry_run", "--site", site, "--", *TRAIN])


@pytest.mark.parametrize("scheduler", ["slurm", "lsf"])
def test_a_script_that_submits_several_jobs_names_what_they_wait_for(scheduler, elsewhere):
    """`bsub` and `sbatch` are small programs here, which keep the scripts that they read."""
    site = Site(scheduler=scheduler, python="python")
    first = Job("first", [Task("a", ["x.py", "it's"]), Task("b", ["y.py"])], site, [Waiting("7")], most_running=1)
    second = Job("second", [Task("c", ["z.py"])], site, [Waiting("first", 2), Waiting("8")])
    text = submission_script([first, second], elsewhere)
    submitter = {"slurm": ("sbatch", "echo 11;echo"), "lsf": ("bsub", 'echo "Job <11> is submitted to queue <x>."')}
    program, answer = submitter[scheduler]
    (elsewhere / program).write_text(f'#!/bin/bash\necho "$*" >> flags\ncat > script.$(wc -l < flags)\n{answer}\n')
    (elsewhere / program).chmod(0o755)
    path = {"PATH": f"{elsewhere}:{os.environ['PATH']}"}
    done = subprocess.run(["bash"], input=text, env={**os.environ, **path}, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["first 11", "second 11"], done.stderr
    flags = (elsewhere / "flags").read_text().splitlines()
    condition = {"slurm": "--dependency=afterok:11_2:8", "lsf": "-w done(11[2]) && done(8)"}[scheduler]
    assert condition in flags[1]
    assert "afterok" not in flags[0]
    assert "done" not in flags[0]
    one = (elsewhere / "script.1").read_text()
    assert one == job_script(first, elsewhere)
    bash(one)
    if scheduler == "lsf":
        assert (options_of(one)["-J"], options_of(one)["-w"]) == ("first[1-2]%1", "done(7)")
        assert "-w" not in options_of((elsewhere / "script.2").read_text())
        assert set(options_of(text)) == {"-J", "-n", "-W", "-o"}, "the scripts inside are not read"
    else:
        assert (sbatch_options(one)["--array"], sbatch_options(one)["--dependency"]) == ("1-2%1", "afterok:7")


@pytest.mark.parametrize(
    ("scheduler", "identities"),
    [
        ("slurm", [{"SLURM_JOB_ID": str(number)} for number in (71, 72, 73, 199_999)]),
        ("lsf", [{"LSB_JOBID": job, "LSB_JOBINDEX": task} for job in ("71", "72") for task in ("1", "2", "100")]),
    ],
)
def test_jobs_and_tasks_on_one_host_have_ports_of_their_own(scheduler, identities, elsewhere):
    """The tasks of an array of Slurm have ids of their own, those of LSF do not. Ports from 32768 on are given away."""
    job = Job("a", [Task("a", ["x.py"]), Task("b", ["y.py"])], Site(scheduler=scheduler, gpus_per_node=2))
    lines = job_script(job, elsewhere).splitlines()
    text = "\n".join(line for line in lines if line.startswith("task=") or "MASTER_PORT=$((" in line)
    variables = {"LSB_MCPU_HOSTS": "a 8", "SLURM_JOB_NODELIST": "a"}
    ports = []
    for identity in identities:
        done = subprocess.run(
            ["bash", "-c", f"{text}\necho $MASTER_PORT"], env={**os.environ, **variables, **identity},
            capture_output=True, text=True,
        )  # fmt: skip
        ports.append(int(done.stdout))
    assert len(set(ports)) == len(identities)
    assert all(20_000 <= port < 32_000 for port in ports)


SERIES = [
    ("autoencoder_phase1.sh", "all", 24), ("autoencoder_phase1.sh", "S3", 6), ("autoencoder_phase1.sh", "9", 1),
    ("diffusion_ablations.sh", "all", 20), ("diffusion_ablations.sh", "selected", 4),
    ("diffusion_ablations.sh", "attention", 4), ("diffusion_ablations.sh", "capacity", 7),
    ("diffusion_ablations.sh", "prediction_v,capacity_unet64_d3", 2), ("stage2_finetuning.sh", "", 3),
    ("stage3_controlnet.sh", "", 1), ("latents.sh", "inputs", 1), ("latents.sh", "latents", 1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("script", "part", "tasks"), SERIES)
def test_the_scripts_of_the_series_submit_all_of_their_experiments(elsewhere, script, part, tasks):
    (elsewhere / "configs").symlink_to(ROOT / "configs")
    words = ["bash", str(ROOT / "training/hpc" / script), *([part] if part else []), "--dry_run", "--scheduler", "lsf"]
    variables = environment(PYTHON=sys.executable, PYTHONPATH=str(ROOT))
    done = subprocess.run(words, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    bash(done.stdout)
    options_of(done.stdout)
    last = done.stdout.split("#!/bin/bash")[-1]
    assert len(re.findall(r"^\|?\d+\) run=", last, re.MULTILINE)) == tasks


def test_an_unknown_part_of_the_latents_is_an_error():
    script = str(ROOT / "training/hpc/latents.sh")
    done = subprocess.run(["bash", script, "latent", "--dry_run"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the part is 'latent'; use inputs or latents\n"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGUSR1, id="limit"), pytest.param(signal.SIGTERM, id="preempted", marks=pytest.mark.long)],
)
def test_a_job_of_lsf_saves_before_its_limit_and_resumes(elsewhere, training_flags, number):
    """The script runs without LSF, which would set these variables and send the signal to the whole job."""
    flags = (*training_flags, "--max_train_steps", "100")
    words = ("--scheduler", "lsf", "--gpus_per_node", "0", "--processes_per_node", "2")
    done = launch(ROOT / "training/hpc/submit.py", "--dry_run", *words, "--", TRAIN[0], *flags,
                  "--output_dir", "runs/mine", cwd=elsewhere)  # fmt: skip
    (elsewhere / "job.sh").write_text(done.stdout.replace("OMP_NUM_THREADS=4", "OMP_NUM_THREADS=1"))
    variables = environment(PYTHONPATH=str(ROOT), LSB_JOBID="12", LSB_JOBINDEX="0", LSB_MCPU_HOSTS="127.0.0.1 8")
    job = subprocess.Popen(["bash", "job.sh"], env=variables, start_new_session=True)
    rows = elsewhere / "runs/mine/metrics.csv"
    deadline = time.monotonic() + 240
    while not rows.is_file() or len(rows.read_text().splitlines()) < 6:
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.02)
    os.killpg(job.pid, number)
    assert job.wait(120) == 75  # LSF requeues it, by -Q 75
    assert not (elsewhere / "runs/mine/record.json").exists()
    assert subprocess.run(["bash", "job.sh"], env=variables).returncode == 0
    other = command(ROOT / TRAIN[0], *flags, "--output_dir", "other", processes=2)
    assert subprocess.run(other, env=environment(PYTHONPATH=str(ROOT)), cwd=elsewhere).returncode == 0
    assert_same_state(elsewhere / "runs/mine", elsewhere / "other")


def test_without_a_scheduler_the_error_names_it(elsewhere, monkeypatch):
    (elsewhere / "bin").mkdir()
    for program in ("bash", "sed", "cut", "cat"):
        (elsewhere / "bin" / program).symlink_to(str(shutil.which(program)))
    monkeypatch.setenv("PATH", str(elsewhere / "bin"))
    with pytest.raises(UserError, match="sbatch did not accept the job .*sbatch: command not found"):
        submit.main(["--", *TRAIN])

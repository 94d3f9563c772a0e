"""Submit trainings to a cluster with Slurm or LSF: one command, or an array of experiments; and list them.

    python training/hpc/submit.py --nodes 2 --gpus_per_node 4 --time 04:00:00 -- training/train_latent_diffusion.py \\
        --config latent_diffusion/emoji_64
    python training/hpc/submit.py --array 'configs/experiments/latent_diffusion/ablation/capacity_*.yaml'
    python training/hpc/submit.py --scheduler lsf --dry_run -- training/train_autoencoder.py --config shapes_96.yaml
    python training/hpc/submit.py --status

A run saves a checkpoint before the time limit or when it is preempted; its job is then requeued and resumes. With
--array, inputs that several experiments share are made once, by a job that the others wait for. --after waits for
earlier jobs to succeed. The settings of a cluster are in a YAML file (--site, or the variable HALFTONE_SITE), see
configs/cluster/site.yaml; docs/clusters.md describes all of this.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.tools.cli import Options, UserError, entry_point
from training.experiments.sweeps import parse_sweeps
from training.hpc.jobs import Job, job_script, submission_script
from training.hpc.planning import job_of_command, jobs_of_experiments
from training.hpc.sites import PARALLELISM, SCHEDULERS, Site, read_site
from training.hpc.status import is_listed, status_table
from training.hpc.submissions import read_submitted, submit, waiting_for
from training.run_experiments import common_folder, plan

SITE_VARIABLE = "HALFTONE_SITE"
_OF_SITE = (
    "scheduler", "nodes", "gpus_per_node", "processes_per_node", "parallelism", "time", "partition", "account",
    "log_dir",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    site = read_site(options.site or os.environ.get(SITE_VARIABLE), {name: getattr(options, name) for name in _OF_SITE})
    if options.status is not None:
        return print_status(site, options.status)
    jobs = planned_jobs(options, site)
    if options.dry_run:
        Path(site.log_dir).mkdir(parents=True, exist_ok=True)  # a job whose output has no folder ends at once
        text = job_script(jobs[0], Path.cwd()) if len(jobs) == 1 else submission_script(jobs, Path.cwd())
        print(text, end="")
        return 0
    submitted = submit(jobs, Path.cwd())
    for job in jobs:
        number = next(one.job for one in submitted if one.name == job.name)
        tasks = f", {len(job.tasks)} tasks" if len(job.tasks) > 1 else ""
        print(f"{job.name}: job {number}{tasks}; output in {job.log}")
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options; the arguments after `--` become `command`. Raises UserError."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = Options(__doc__)
    _add_options_of_site(parser)
    _add_options_of_jobs(parser)
    options = parser.parse(words[:cut])
    options.command = words[cut + 1 :]
    if options.status is None and not (options.array or options.command):
        raise UserError("there is nothing to submit; add -- and a command, or --array and experiments, or --status")
    if (options.seeds or options.sweep) and not options.array:
        raise UserError("--sweep and --seeds need experiments; add --array")
    if options.max_running < 0 or (options.seeds is not None and options.seeds < 1):
        raise UserError(f"--max_running is {options.max_running} and --seeds is {options.seeds}; give positive numbers")
    return options


def _add_options_of_site(parser: Options) -> None:
    add = parser.add_argument
    site_help = f"YAML file with the settings of the cluster (default: ${SITE_VARIABLE}, if set)"
    processes_help = "Number of processes on each node (default: one for each GPU)"
    parallelism_help = "Kind of training: ddp, or fsdp2 for a model that does not fit on one GPU (default: ddp)"
    add("--site", metavar="FILE", help=site_help)
    add("--scheduler", choices=SCHEDULERS, help="Scheduler of the cluster (default: that of the site, or slurm)")
    add("--nodes", type=int, metavar="N", help="Number of nodes of each training (default: that of the site, or 1)")
    add("--gpus_per_node", type=int, metavar="N", help="Number of GPUs on each node; 0 for none (default: 1)")
    add("--processes_per_node", type=int, metavar="N", help=processes_help)
    add("--parallelism", choices=PARALLELISM, help=parallelism_help)
    add("--time", metavar="HH:MM:SS", help="Time limit; a longer run is requeued and resumed (default: 04:00:00)")
    add("--partition", help="Partition of Slurm, or queue of LSF")
    add("--account", help="Account of Slurm, or project of LSF")
    add("--log_dir", help="Folder for the output of jobs and the list of jobs (default: runs/hpc)")


def _add_options_of_jobs(parser: Options) -> None:
    add = parser.add_argument
    name_help = "Name of the jobs, for --after and --status (default: that of the script, or of the folder of runs)"
    array_help = "Experiments: YAML files or patterns; arguments after -- are their flags"
    status_help = "List the submitted jobs, or those of these names, with step and loss"
    running_help = "With --array: number of tasks that run at the same time"
    add("--name", help=name_help)
    add("--array", nargs="+", metavar="CONFIG", help=array_help)
    add(
        "--sweep", action="append", default=[], metavar="OPTION=VALUE,VALUE",
        help="With --array: values of an option, of which each becomes a task; several --sweep run all combinations",
    )  # fmt: skip
    add("--seeds", type=int, metavar="N", help="With --array: train each with N random seeds")
    add("--max_running", type=int, default=0, metavar="N", help=running_help)
    add("--after", nargs="+", default=[], metavar="JOB", help="Wait until these jobs have succeeded: names or ids")
    add("--dry_run", action="store_true", help="Print the script, which sbatch and `bsub <` take, and submit nothing")
    add("--status", nargs="*", metavar="NAME", help=status_help)


def planned_jobs(options: argparse.Namespace, site: Site) -> list[Job]:
    """Return the jobs of a command line; everything is checked before the first one is submitted. Raises UserError."""
    waits_for = waiting_for(options.after, site.log_dir, dry_run=options.dry_run)
    if not options.array:
        numbers = (options.nodes, options.gpus_per_node, options.processes_per_node)
        several = any(number is not None and number > 1 for number in numbers)
        return [job_of_command(options.command, options.name or "", site, waits_for, asks_for_several=several)]
    experiments = plan(options.array, options.command, parse_sweeps(options.sweep), options.seeds)
    name = options.name or common_folder(experiments).resolve().name
    return jobs_of_experiments(experiments, name, site, waits_for, options.command, options.max_running)


def print_status(site: Site, names: Sequence[str]) -> int:
    submitted = read_submitted(site.log_dir)
    listed = [one for one in submitted if is_listed(one, names)]
    if not listed:
        what = f"no job of the name {' or '.join(names)}" if names else "no jobs"
        raise UserError(f"{what} in {Path(site.log_dir, 'jobs.jsonl')}; submit some, or name their --log_dir")
    print(status_table(listed))
    return 0


if __name__ == "__main__":
    entry_point(main)

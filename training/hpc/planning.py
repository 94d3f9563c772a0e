"""From a command, or from experiments, to jobs.

Experiments become the tasks of an array. Inputs that several of them share are made by a job of its own, which they
wait for. An experiment that begins with the result of another one waits for the task of that experiment.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.tools.cli import UserError, located
from pipelines.tools.commands import SCRIPT_FOLDERS, is_launched
from pipelines.tools.resources import CODE
from training.core.parsing import parse_config
from training.engine.prepare import is_named, missing_inputs
from training.experiments.registry import config_class
from training.hpc.jobs import Job, Task, Waiting
from training.hpc.sites import Site
from training.run_experiments import Experiment

MAKE_INPUTS = "training/hpc/make_inputs.py"


def job_of_command(
    words: Sequence[str], name: str, site: Site, waits_for: Sequence[Waiting], *, asks_for_several: bool = False
) -> Job:
    """Return the job of one command: a script of this project and its flags.

    Args:
        asks_for_several: whether the flags of the submission, rather than the site, ask for several processes.

    Raises:
        UserError: the command does not start with a script of this project, its flags are wrong (those of a training),
            it is a single process and several are asked for, its run folder is not known, or it is to be trained with
            FSDP2 on a single process.
    """
    script = _own_script(words[0])
    place = script.relative_to(CODE).as_posix()
    if not is_launched(place):
        if asks_for_several:
            raise UserError(
                f"{place} is a single process, and the job asks for {site.nodes * site.processes}; "
                "leave out --nodes, --gpus_per_node and --processes_per_node"
            )
        site = site.of_one_process()
    elif _is_training(script):
        site.check_training()
    else:
        site = site.without_training()
    run = _run_folder(script.stem.removeprefix("train_"), words[1:]) if script.stem.startswith("train_") else ""
    name = name or script.stem.removeprefix("train_")
    return Job(name, [Task(name, [_shown(script), *words[1:]], run)], site, list(waits_for))


def jobs_of_experiments(
    experiments: Sequence[Experiment],
    name: str,
    site: Site,
    waits_for: Sequence[Waiting],
    flags: Sequence[str] = (),
    most_running: int = 0,
) -> list[Job]:
    """Return a job for the inputs that the experiments share and that are missing, and an array for each level.

    A level consists of experiments that only begin with results of experiments of earlier levels.

    Args:
        flags: flags of all experiments, which may change their inputs.
        most_running: number of tasks of each array that run at the same time; 0 leaves it to the scheduler.
    """
    site.check_training()
    sources = {one.name: _sources(one, experiments) for one in experiments}
    levels = _levels(sources)
    jobs: list[Job] = []
    before = list(waits_for)
    if shared := missing_inputs(_shared(experiments)):
        own = [str(CODE / MAKE_INPUTS), *shared, "--configs", *dict.fromkeys(one.file for one in experiments)]
        task = Task(f"{name}-inputs", [*own, *(["--", *flags] if flags else [])])
        jobs.append(Job(task.name, [task], site.of_one_process(), list(waits_for)))
        before = [Waiting(task.name)]
    places: dict[str, Waiting] = {}
    for level in range(max(levels.values()) + 1):
        members = [one for one in experiments if levels[one.name] == level]
        job_name = name if level == max(levels.values()) else f"{name}-{level + 1}"
        needed = [places[source] for source in dict.fromkeys(s for one in members for s in sources[one.name])]
        tasks = [Task(one.name, one.words, one.config.output_dir) for one in members]
        jobs.append(Job(job_name, tasks, site, [*before, *needed] if not level else needed, most_running))
        places |= {
            one.name: Waiting(job_name, number if len(members) > 1 else None) for number, one in enumerate(members, 1)
        }
    return jobs


def _sources(experiment: Experiment, experiments: Sequence[Experiment]) -> list[str]:
    """Return the names of the other experiments whose runs are inputs of this one."""
    paths = experiment.config.recipes()
    others = (one for one in experiments if one is not experiment)
    return [one.name for one in others if any(is_named(path, one.config.output_dir) for path in paths)]


def _levels(sources: Mapping[str, Sequence[str]]) -> dict[str, int]:
    levels: dict[str, int] = {}
    while len(levels) < len(sources):
        ready = {name for name in sources.keys() - levels.keys() if all(one in levels for one in sources[name])}
        if not ready:
            circle = ", ".join(sorted(sources.keys() - levels.keys()))
            raise UserError(f"the experiments {circle} are inputs of each other; remove one of these `prepare` entries")
        levels |= {name: max((levels[one] + 1 for one in sources[name]), default=0) for name in ready}
    return levels


def _shared(experiments: Sequence[Experiment]) -> dict[str, str]:
    """Return the recipes of several experiments that need none of their results."""
    recipes = [one.config.recipes() for one in experiments]
    counts = Counter(path for one in recipes for path in one)
    made = [one.config.output_dir for one in experiments]
    later: set[str] = set()
    shared: dict[str, str] = {}
    for path, command in {path: command for one in recipes for path, command in one.items()}.items():
        words = shlex.split(command)
        own = any(is_named(path, folder) for folder in made)
        if own or any(is_named(one, word) for one in later for word in words):
            later.add(path)
        elif counts[path] > 1:
            shared[path] = command
    return shared


def _run_folder(stage: str, flags: Sequence[str]) -> str:
    """Return the run folder of a training, which decides whether its job is requeued. Raises UserError."""
    given = [flag.split("=", 1)[1] for flag in flags if flag.startswith("--output_dir=")]
    given += [value for flag, value in zip(flags, flags[1:], strict=False) if flag == "--output_dir"]
    if "--config" in flags or any(flag.startswith("--config=") for flag in flags):
        return parse_config(config_class(stage), flags).output_dir
    if not given:
        raise UserError(
            "the command has neither --config nor --output_dir, so that its run folder is not known, which decides "
            "whether the job is requeued; add --output_dir runs/NAME"
        )
    return given[-1]


def _own_script(name: str) -> Path:
    own = Path(name).expanduser()
    script = (own if own.is_file() else CODE / name).resolve()
    if script.suffix != ".py" or not script.is_file() or not _is_in(script):
        raise UserError(
            f"the command starts with {located(name)}, which is not a script of this project; name one in "
            f"{', '.join(f'{folder}/' for folder in SCRIPT_FOLDERS)}, for example training/train_latent_diffusion.py"
        )
    return script


def _is_training(script: Path) -> bool:
    return script.stem.startswith(("train_", "distill_"))


def _is_in(script: Path) -> bool:
    return script.is_relative_to(CODE) and script.relative_to(CODE).parts[0] in SCRIPT_FOLDERS


def _shown(script: Path) -> str:
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)

"""Checks of the software: versions against the requirements of the project, broken packages, extras."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import TYPE_CHECKING

from pipelines.tools.cli import one_line
from pipelines.tools.commands import install_command
from pipelines.tools.resources import CODE, DISTRIBUTION, IS_CHECKOUT, own_version
from training.diagnostics.finding import Finding, shown

if TYPE_CHECKING:
    from packaging.requirements import Requirement

IMPORT_SECONDS = 300.0
# The module to import where it is not called as the package is. Those of lazy packages are imported more deeply.
MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "fonttools": "fontTools",
    "diffusers": "diffusers.pipelines.pipeline_utils",
    "transformers": "transformers.modeling_utils",
}
MOST_NAMED = 3
EXTRAS = {
    "cuda": "the optimizer adamw_8bit",
    "controls": "edges as control images",
    "innovate": "the search for new designs",
    "dev": "the tests and linters",
}
_MARK = "imported "
_IMPORT = f"""
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        reason = ""
    except BaseException as error:
        reason = f"{{type(error).__name__}}: {{error}}"
    print("\\n{_MARK}" + json.dumps([name, reason]), flush=True)
"""


@dataclass
class Requirements:
    """What this project requires: the range of Python, the packages, and the packages of each extra."""

    python: str
    packages: list[Requirement]
    extras: dict[str, list[Requirement]]


def read_requirements() -> Requirements:
    """Read pyproject.toml in a checkout (an installation can be older than it), otherwise what was installed."""
    from packaging.requirements import Requirement

    if IS_CHECKOUT:
        project = tomllib.loads((CODE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        return Requirements(
            project["requires-python"],
            [Requirement(line) for line in project["dependencies"]],
            {extra: [Requirement(line) for line in lines] for extra, lines in extras.items()},
        )
    own = metadata(DISTRIBUTION)
    required = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    extras = {name: [r for r in required if _belongs_to(r, name)] for name in own.get_all("Provides-Extra") or []}
    return Requirements(own["Requires-Python"], [r for r in required if _belongs_to(r, "")], extras)


def _belongs_to(requirement: Requirement, extra: str) -> bool:
    """Return whether a requirement applies with this extra, and not without it; "" is the project without extras."""
    marker = requirement.marker
    if marker is None or not extra:
        return not extra if marker is None else marker.evaluate({"extra": ""})
    return marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    required, found = SpecifierSet(read_requirements().python), platform.python_version()
    value = f"{found} ({shown(sys.executable)})"
    if required.contains(found, prereleases=True):
        yield Finding("Python", "ok", value)
    else:
        yield Finding("Python", "missing", value, f"install Python {required}")


def halftone() -> Iterator[Finding]:
    installed, place = own_version(), f"in {shown(CODE)}"
    if installed:
        yield Finding("Halftone", "ok", f"{installed} {place}")
    else:
        advice = "for the command `halftone`: make setup, or pip install -e ."
        yield Finding("Halftone", "optional", f"not installed; used {place}", advice)


def packages() -> Iterator[Finding]:
    """Check that each required package is installed in a version that was tested, and that it can be imported."""
    needed = (r for r in read_requirements().packages if r.marker is None or r.marker.evaluate({"extra": ""}))
    findings = {requirement.name: package(requirement) for requirement in needed}
    modules = {
        MODULES.get(name, name.replace("-", "_")): name
        for name, finding in findings.items()
        if finding.state != "missing"
    }
    for module, reason in broken_imports(list(modules)).items():
        name = modules[module]
        advice = f"reinstall it: pip install --force-reinstall {name}"
        findings[name] = Finding(name, "missing", f"{version(name)} cannot be imported ({reason})", advice)
    yield from findings.values()


def package(requirement: Requirement) -> Finding:
    """Compare the installed version of a package with the versions that the project requires."""
    name, required = requirement.name, versions(requirement)
    install = f"pip install '{as_argument(requirement)}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "missing", f"not installed ({required} is required)", install)
    if requirement.specifier.contains(found, prereleases=True):
        return Finding(name, "ok", found)
    minimums = [part for part in requirement.specifier if part.operator in (">=", ">", "~=", "==")]
    if all(part.contains(found, prereleases=True) for part in minimums):
        return Finding(name, "warning", f"{found} is newer than what was tested ({required})", install)
    return Finding(name, "missing", f"{found} is too old ({required} is required)", install)


def versions(requirement: Requirement) -> str:
    """Return the range of a requirement with its minimum first, such as `>=2.8,<2.14`."""
    return ",".join(sorted(map(str, requirement.specifier), key=lambda part: part.startswith("<")))


def as_argument(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{versions(requirement)}"


def broken_imports(modules: Sequence[str]) -> dict[str, str]:
    """Import modules in another process, because a broken one can end it, and return the reason for each that fails."""
    broken: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        try:
            words = [sys.executable, "-P", "-c", _IMPORT, *waiting]
            done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=IMPORT_SECONDS)
            output, end = done.stdout, f"it ends Python with status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output, end = error.stdout or b"", f"it takes longer than {IMPORT_SECONDS:.0f} seconds"
        lines = [line for line in output.decode(errors="replace").splitlines() if line.startswith(_MARK)]
        results = dict(json.loads(line.removeprefix(_MARK)) for line in lines)
        broken |= {name: one_line(reason, 200) for name, reason in results.items() if reason}
        waiting = waiting[len(results) :]
        if waiting:
            broken[waiting.pop(0)] = end
    return broken


def extras() -> Iterator[Finding]:
    """Check the packages of the extras in pyproject.toml, which only some features need."""
    for extra, requirements in read_requirements().extras.items():
        needed = {r.name: r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})}
        found = [package(requirement) for requirement in needed.values()]
        named = [finding for finding in found if finding.state != "ok"] or found
        value = ", ".join(f"{finding.name} {finding.value}" for finding in named[:MOST_NAMED])
        value += f", and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        states = {finding.state for finding in found}
        name, purpose = f"extra {extra}", f"for {EXTRAS[extra]}: " if extra in EXTRAS else ""
        if states <= {"ok"}:
            yield Finding(name, "ok", value)
            continue
        install = install_command(extra, " ".join(f"'{as_argument(needed[finding.name])}'" for finding in named))
        yield Finding(name, "optional" if "missing" in states else "warning", value, f"{purpose}{install}")


CHECKS = {"Python": python, "Halftone": halftone, "packages": packages, "extras": extras}

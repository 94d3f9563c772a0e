"""Trials: crash points, random kills and power cuts."""

from __future__ import annotations

from tests.faults import crash_points, kills, power_cut
from tests.faults.lab import (
    AUTOENCODER,
    COMMANDS,
    DIFFUSION,
    LATENTS,
    POSTERS,
    TOKENIZER,
    TOY,
    UPLOAD,
    Lab,
)
from tests.faults.shim import BROKEN_ONCE, FULL, FULL_ONCE, KILL, TERM, TWO_CTRL_C
from tests.faults.table import Rows, trial


@trial("Killed before a change of the file system")
def killed_before_a_change(lab: Lab) -> Rows:
    for command in COMMANDS:
        yield crash_points.disturbed(lab, command, KILL, lab.stride(60))


@trial("Asked to stop before a change of the file system")
def stopped_before_a_change(lab: Lab) -> Rows:
    for command in COMMANDS:
        for fault in (TERM, TWO_CTRL_C):
            yield crash_points.disturbed(lab, command, fault, lab.stride(150))


@trial("A full or broken disk")
def full_or_broken_disk(lab: Lab) -> Rows:
    for command in COMMANDS:
        for fault in (FULL_ONCE, BROKEN_ONCE, FULL):
            yield crash_points.disturbed(lab, command, fault, lab.stride(240))


@trial("Killed at random moments")
def killed_at_random(lab: Lab) -> Rows:
    forked = list(kills.kill_often(lab, COMMANDS, 900 if lab.thorough else 16, seed=0))
    yield kills.row("SIGKILL at a random moment, forks of a warm interpreter", forked)
    commands = (TOY, DIFFUSION, UPLOAD, LATENTS)
    typed = list(kills.kill_often(lab, commands, 100 if lab.thorough else 2, seed=1000, cold=True))
    yield kills.row("SIGKILL at a random moment, typed commands", typed)


@trial("Power cut")
def power_cut_of_an_ext4_disk(lab: Lab) -> Rows:
    tenths = [number / 10 for number in range(1, 20)]
    yield power_cut.power_cuts(lab, [TOY], tenths if lab.thorough else tenths[2::4])
    if lab.thorough:
        commands = [POSTERS, TOKENIZER, AUTOENCODER, LATENTS, DIFFUSION]
        yield power_cut.power_cuts(lab, commands, tenths[::3])

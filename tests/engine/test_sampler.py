"""Samples are functions of (seed, step, position) for any number of processes."""

from __future__ import annotations

import pytest

from training.core.draws import mix
from training.core.layout import BatchLayout
from training.engine.sampler import StepSampler


def global_batches(num_samples, steps, batch, processes, accumulation, seed=3):
    """Return the keys of each step by position in the global batch, gathered over processes."""
    gathered = []
    for step in range(steps):
        keys = {}
        for rank in range(processes):
            layout = BatchLayout(batch, processes, accumulation, rank)
            sampler = StepSampler(num_samples, layout, seed)
            for micro_batch in range(accumulation):
                keys |= dict(zip(layout.positions(micro_batch), sampler.keys(step, micro_batch), strict=True))
        gathered.append([keys[position] for position in sorted(keys)])
    return gathered


@pytest.mark.parametrize(
    ("batch", "processes", "accumulation"), [(4, 2, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8), (4, 1, 2)]
)
def test_any_split_of_a_global_batch_sees_the_same_samples(batch, processes, accumulation):
    assert global_batches(50, 14, batch, processes, accumulation) == global_batches(50, 14, 8, 1, 1)


def test_an_epoch_is_a_permutation_without_its_remainder():
    sampler = StepSampler(50, BatchLayout(8), seed=0)
    assert sampler.steps_per_epoch == 6
    epochs = [[k.index for step in range(6 * e, 6 * e + 6) for k in sampler.keys(step, 0)] for e in range(3)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sampler_that_starts_later_yields_the_same_tail():
    layout = BatchLayout(4, gradient_accumulation_steps=2)
    whole = list(StepSampler(40, layout, 1, 0, 12))
    assert list(StepSampler(40, layout, 1, 7, 12)) == whole[14:]
    assert len(StepSampler(40, layout, 1, 7, 12)) == 10


def test_a_sample_has_another_seed_each_time_it_is_drawn():
    sampler = StepSampler(8, BatchLayout(8), seed=0)
    seen = [key.key for step in range(20) for key in sampler.keys(step, 0)]
    assert len(set(seen)) == len(seen)


def test_seeds_are_the_same_on_every_machine():
    assert mix(0, "order", 1) == mix(0, "order", 1)
    assert mix(0, "a") != mix(0, "b")
    assert 0 <= mix(123, "x") < 2**63
    assert mix(7, "sample", 3, 2) == 1702382469133503317

"""Samples are functions of (seed, step, position) for any number of processes."""

from __future__ import annotations

import pytest
import torch

from training.core.blocks import RowBlocks
from training.core.draws import mix
from training.core.layout import BatchLayout, steps_per_epoch
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


GROUPS = torch.tensor([0] * 21 + [1] * 8 + [2] * 3)


def batches_of(sampler: StepSampler, epoch: int) -> list[list[int]]:
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    return [[key.index for key in sampler.keys(step, 0)] for step in steps]


def test_every_row_is_in_every_epoch_and_a_batch_is_of_one_group():
    sampler = StepSampler(len(GROUPS), BatchLayout(8), 1, groups=GROUPS)
    assert sampler.steps_per_epoch == steps_per_epoch(len(GROUPS), BatchLayout(8), GROUPS) == 3 + 1 + 1
    drawn = torch.zeros(len(GROUPS), dtype=torch.int64)
    orders = set()
    for epoch in range(40):
        batches = batches_of(sampler, epoch)
        assert all(len(GROUPS[batch].unique()) == 1 for batch in batches)
        assert {row for batch in batches for row in batch} == set(range(len(GROUPS)))
        drawn += torch.bincount(torch.tensor(batches).flatten(), minlength=len(GROUPS))
        orders.add(tuple(int(GROUPS[batch[0]]) for batch in batches))
    for group in range(3):  # those that fill the last batch take turns
        assert drawn[group == GROUPS].max() - drawn[group == GROUPS].min() <= 1
    assert len(orders) > 10  # the groups are mixed, in another order in each epoch


@pytest.mark.parametrize("layout", [(4, 2, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1), (2, 1, 4)])
def test_grouped_batches_are_the_same_for_any_split_and_start(layout):
    batch, processes, accumulation = layout
    whole = StepSampler(len(GROUPS), BatchLayout(8), 1, groups=GROUPS)
    for step in (11, 3, 12, 4):  # any order: nothing is remembered
        keys = []
        for micro_batch in range(accumulation):
            for rank in range(processes):
                part = BatchLayout(batch, processes, accumulation, rank)
                keys += StepSampler(len(GROUPS), part, 1, groups=GROUPS).keys(step, micro_batch)
        assert keys == whole.keys(step, 0)


def windowed(sizes: list[int], window: int, batch: int = 4, seed: int = 0) -> StepSampler:
    starts = torch.tensor([0, *sizes]).cumsum(0)
    return StepSampler(sum(sizes), BatchLayout(batch), seed, blocks=RowBlocks(starts, window))


@pytest.mark.parametrize("window", [1, 7, 20, 1000])
def test_every_row_of_blocks_is_in_every_epoch(window):
    sampler = windowed([5, 1, 9, 13, 2, 6], window)
    epochs = [[k.index for step in range(9 * e, 9 * e + 9) for k in sampler.keys(step, 0)] for e in range(3)]
    assert all(sorted(epoch) == list(range(36)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    later = windowed([5, 1, 9, 13, 2, 6], window)
    assert [k.index for step in range(13, 27) for k in later.keys(step, 0)] == (epochs[1] + epochs[2])[16:]


def test_few_blocks_are_read_at_a_time_and_all_are_mixed():
    """With windows of 1,000 rows, 1,000 rows in turn are of about ten blocks of 100, which no two epochs combine."""
    sampler, together = windowed([100] * 1000, 1000, batch=1000), []
    for step in (0, 50, 100, 150):
        blocks = {key.index // 100 for key in sampler.keys(step, 0)}
        assert len(blocks) == 10
        together.append(blocks)
    assert len(set.union(*together)) > 30
    first = [key.index // 100 for key in sampler.keys(0, 0)][:100]
    assert len(set(first)) == 10  # they are mixed, not one after another

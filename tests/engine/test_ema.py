from __future__ import annotations

import pytest
import torch
from torch import nn

from training.engine.ema import EMA


def test_ema_weights_follow_the_recursion_with_warm_up():
    layer = nn.Linear(1, 1, bias=False)
    ema = EMA({"layer": layer}, decay=0.9)
    expected = layer.weight.item()
    for step in range(1, 200):
        with torch.no_grad():
            layer.weight.fill_(float(step % 7))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step % 7)
    assert ema.state_dict()["layer.weight"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_that_is_left_out_on_the_device_changes_nothing(dtype):
    """And a step that is taken gives the same bits as one that the process knows of."""
    torch.manual_seed(0)
    layer = nn.Linear(50, 50, dtype=dtype)
    known, told = EMA({"layer": layer}, 0.9), EMA({"layer": layer}, 0.9)
    for step in range(1, 12):
        taken = step % 3 != 0
        with torch.no_grad():
            layer.weight.normal_()
        before = {name: tensor.clone() for name, tensor in told.state_dict().items()}
        known.update(step, taken)
        told.update(step, torch.tensor(taken))
        for name, tensor in told.state_dict().items():
            assert torch.equal(tensor, known.state_dict()[name])
            assert torch.equal(tensor, before[name]) == (not taken or name == "layer.bias")


def test_updates_every_few_steps_are_close_to_updates_every_step():
    often, seldom = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    averages = [EMA({"m": often}, 0.99), EMA({"m": seldom}, 0.99, update_every=4)]
    for step in range(1, 2001):
        for module, ema in zip((often, seldom), averages):
            with torch.no_grad():
                module.weight.fill_(step / 1000)
            ema.update(step)
    a, b = (ema.state_dict()["m.weight"].item() for ema in averages)
    assert a == pytest.approx(b, rel=0.01)


def test_ema_weights_that_begin_late_equal_those_of_a_run_that_begins_there():
    """Without this, the initial weight would still dominate after 40 steps."""
    soon, late, alone = (nn.Linear(1, 1, bias=False) for _ in range(3))
    ema, reference = EMA({"soon": soon, "late": late}, 0.99), EMA({"alone": alone}, 0.99)
    ema.begin_at({late.weight: 200})
    first = ema.state_dict()["late.weight"].item()
    for step in range(1, 241):
        with torch.no_grad():
            soon.weight.fill_(step / 100)
            if step > 200:
                late.weight.fill_(step / 100)
                alone.weight.fill_(step / 100)
        ema.update(step)
        if step <= 200:
            assert ema.state_dict()["late.weight"].item() == first
        else:
            reference.update(step - 200)
    assert ema.state_dict()["late.weight"].item() == pytest.approx(reference.state_dict()["alone.weight"].item())
    assert ema.state_dict()["soon.weight"].item() != pytest.approx(ema.state_dict()["late.weight"].item(), rel=1e-3)


def test_weights_are_restored_even_after_an_exception():
    layer = nn.Linear(3, 3)
    ema = EMA({"layer": layer}, 0.5)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    live = layer.weight.detach().clone()
    pointer = layer.weight.data_ptr()
    seen = []

    def look_and_fail():
        with ema.applied():
            seen.append(layer.weight.detach().clone())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        look_and_fail()
    assert torch.equal(seen[0], before)
    assert torch.equal(layer.weight, live)
    assert layer.weight.data_ptr() == pointer  # optimizers and compiled graphs refer to it


def test_a_state_loads_and_one_of_another_model_does_not():
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    ema, copy = EMA({"m": layer}, 0.9), EMA({"m": other}, 0.9)
    copy.load_state_dict({name: tensor.clone() for name, tensor in ema.state_dict().items()})
    assert all(torch.equal(copy.state_dict()[name], tensor) for name, tensor in ema.state_dict().items())
    with pytest.raises(KeyError):
        EMA({"n": other}, 0.9).load_state_dict(ema.state_dict())

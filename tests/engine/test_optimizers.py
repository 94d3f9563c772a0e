from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.tools.cli import UserError
from training.engine import optimizers
from training.engine.optimizers import OPTIMIZERS
from training.engine.run_config import RunConfig
from training.run.checkpoint import load_json, load_tensors, save_json, save_tensors


def trained(config, steps, seed=0, optimizer=None, layer=None):
    if layer is None:
        torch.manual_seed(seed)
        layer = nn.Linear(80, 80)  # more than 4,096 weights, as bitsandbytes keeps smaller tensors in 32 bit
        optimizer = optimizers.build_optimizer(config, layer.parameters(), 1e-2)
    for step in range(steps):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        layer(torch.randn(4, 80)).square().mean().backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_resumes_exactly(tmp_path, name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config = RunConfig(optimizer=name)
    layer, optimizer = trained(config, 3)
    tensors, rest = optimizers.flatten_optimizer(optimizer)
    save_tensors(tensors, tmp_path / "o.safetensors")
    save_json(rest, tmp_path / "o.json")
    copy, fresh = trained(config, 0)
    copy.load_state_dict(layer.state_dict())
    optimizers.unflatten_optimizer(fresh, load_tensors(tmp_path / "o.safetensors"), load_json(tmp_path / "o.json"))
    trained(config, 2, optimizer=optimizer, layer=layer)
    trained(config, 2, optimizer=fresh, layer=copy)
    assert torch.equal(layer.weight, copy.weight)
    if name == "adamw_8bit":
        assert any(t.dtype == torch.uint8 for t in tensors.values())


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_changed_settings_hold_after_loading(name):
    """They may be changed when a run is resumed, and the saved ones must not take their place."""
    _, optimizer = trained(RunConfig(optimizer=name), 1)
    changed = RunConfig(optimizer=name, weight_decay=0.5, adam_beta1=0.8, adam_epsilon=1e-6)
    layer, fresh = trained(changed, 0)
    before = {key: value for key, value in fresh.param_groups[0].items() if key != "params"}
    optimizers.unflatten_optimizer(fresh, *optimizers.flatten_optimizer(optimizer))
    assert {key: value for key, value in fresh.param_groups[0].items() if key != "params"} == before
    assert fresh.param_groups[0]["params"] == [*layer.parameters()]


def test_a_state_of_another_model_is_refused():
    _, optimizer = trained(RunConfig(), 1)
    tensors, rest = optimizers.flatten_optimizer(optimizer)
    other = optimizers.build_optimizer(RunConfig(), nn.Linear(3, 3, bias=False).parameters(), 1e-2)
    with pytest.raises(ValueError):
        optimizers.unflatten_optimizer(other, tensors, rest)


def test_settings_are_checked():
    for field, value in (("optimizer", "adamv"), ("lr_scheduler", "cosin"), ("learning_rate", 0.0), ("ema_decay", 1.0)):
        with pytest.raises(UserError, match=field):
            RunConfig(**{field: value}).validate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_a_step_that_is_decided_on_the_device_gives_the_same_bits(name, dtype, tmp_path):
    """Four steps: as they are, clipped, left out because of a NaN, and as they are."""
    from accelerate import Accelerator

    config = RunConfig(output_dir=str(tmp_path), optimizer=name)
    results = []
    for on_device in (True, False):
        parameters = [nn.Parameter(torch.linspace(-1, 1, 50, dtype=dtype)), nn.Parameter(torch.ones(3, 4, dtype=dtype))]
        optimizer = Accelerator(cpu=True).prepare_optimizer(optimizers.build_optimizer(config, parameters, 0.1))
        assert optimizers.can_leave_out_steps(optimizer)
        for step, limit in enumerate((1e3, 0.5, 0.5, 1e3)):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            if step == 2:
                parameters[0].grad[3] = float("nan")
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            if on_device:
                clipped = norm > optimizers.float32_up_to(limit)
                optimizers.step_if(torch.isfinite(norm), optimizer, parameters, norm, clipped, limit)
            elif step == 1:
                optimizers.clipped_step(optimizer, parameters, norm, limit)
            elif step != 2:
                optimizer.step()
        results.append([*parameters, *optimizers.flatten_optimizer(optimizer)[0].values()])
        assert not hasattr(optimizer.optimizer, "found_inf")
    assert len(results[0]) == 8  # two parameters, each with two moments and a count
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_optimizers_that_cannot_leave_out_a_step_are_known(tmp_path):
    from accelerate import Accelerator

    for name in ("sgd", "adamw_8bit"):
        if name == "adamw_8bit":
            pytest.importorskip("bitsandbytes")
        built = optimizers.build_optimizer(RunConfig(optimizer=name), [nn.Parameter(torch.ones(2))], 0.1)
        assert not optimizers.can_leave_out_steps(Accelerator(cpu=True).prepare_optimizer(built))


@pytest.mark.parametrize("limit", [1.0, 0.1, 0.05, 0.3, 7.7, 1e-12])
def test_a_limit_is_compared_as_in_double_precision(limit):
    nearest = np.float32(limit)
    below, above = (np.nextafter(nearest, np.float32(side)) for side in ("-inf", "inf"))
    for value in (below, nearest, above):
        assert bool(torch.tensor(value) > optimizers.float32_up_to(limit)) == (float(value) > limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_clipped_step_is_a_step_on_scaled_gradients(name, dtype, tmp_path):
    """Whether the fused kernels scale the gradients or not, the weights equal those from gradients scaled by hand."""
    from accelerate import Accelerator

    config = RunConfig(output_dir=str(tmp_path), optimizer=name)
    weights = []
    for by_hand in (True, False):
        parameters = [nn.Parameter(torch.linspace(-1, 1, 50, dtype=dtype)), nn.Parameter(torch.ones(3, 4, dtype=dtype))]
        optimizer = Accelerator(cpu=True).prepare_optimizer(optimizers.build_optimizer(config, parameters, 0.1))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            if by_hand:
                for parameter in parameters:
                    parameter.grad *= 0.5 / norm
                optimizer.step()
            else:
                optimizers.clipped_step(optimizer, parameters, norm, 0.5)
        weights.append(parameters)
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other, rtol=1e-5), name

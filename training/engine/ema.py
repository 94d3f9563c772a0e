"""EMA weights: an exponential moving average of a model's weights (Polyak averaging), with a warm-up of the decay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.core.options import Options, option
from training.engine.sharding import Shards
from training.run.checkpoint import Contents, load_tensors

EMA_FILE = "ema.safetensors"


@dataclass
class EMAConfig(Options):
    """Options for the exponential moving average (EMA) of the weights."""

    use_ema: bool = option(True)
    """Keep an exponential moving average (EMA) of the weights; validation, previews and the pipeline use it"""
    ema_decay: float = option(0.999, on_resume="warn", at_least=0, below=1, usual="0.999")
    """Maximum EMA decay; the decay at each step is min(ema_decay, (1 + step) / (10 + step))"""
    ema_update_every: int = option(1, on_resume="warn", at_least=1)
    """Update the EMA weights every N steps, with the decay to the power of N; larger values save time"""


class EMA:
    """EMA of every floating-point parameter and buffer of some modules, in the dtype of each tensor.

    At step t (from 1) the decay is min(decay, (1 + t) / (10 + t)): the smaller decay at the beginning makes the EMA
    weights forget the initial weights. With `update_every` = k they are updated every k steps with decay**k, which is
    k times cheaper and makes no visible difference for the usual decays.

    Args:
        shards: of a phase whose weights are divided among the processes; each averages its parts of them.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], decay: float, update_every: int = 1, shards: Shards | None = None
    ):
        self.decay = decay
        self.update_every = update_every
        self._shards = shards
        named = _named_tensors(modules) if shards is None else shards.named_weights(modules)
        self._named = {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}
        self._live = list(self._named.values())
        self._average = [tensor.detach().clone() for tensor in self._live]
        self._places = {id(tensor): i for i, tensor in enumerate(self._live)}
        # Frozen parameters do not change, so they need no average. Buffers may change without a gradient.
        self._moving = [i for i, t in enumerate(self._live) if t.requires_grad or not isinstance(t, nn.Parameter)]
        self.begin_at({})

    def begin_at(self, first_steps: Mapping[Tensor, int]) -> None:
        """Set the step (from 0) at which each tensor is first trained; its EMA begins there. The default is 0.

        The warm-up of the decay counts from that step. Counted from step 0, it would already be over, and the EMA
        weights would consist mostly of the initial weights for a long time.
        """
        self._since: dict[int, list[int]] = {}
        for i in self._moving:
            self._since.setdefault(first_steps.get(self._live[i], 0), []).append(i)

    def decay_at(self, step: int) -> float:
        """Return the decay at `step`, which counts from 1 at the first update of a tensor."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int, taken: Tensor | bool = True) -> None:
        """Update the EMA weights from the live weights after optimizer step `step` (from 1).

        Args:
            taken: whether the step was taken; otherwise, the EMA weights keep their values. A scalar on the device
                (bool) does the same without being read.
        """
        if step % self.update_every or taken is False:
            return
        for first, tensors in self._since.items():
            if step > first:
                average = [self._average[i] for i in tensors]
                live = [self._live[i].detach() for i in tensors]
                weight = 1 - self.decay_at(step - first) ** self.update_every
                if taken is True:
                    torch._foreach_lerp_(average, live, weight)
                else:
                    # A weight of 0 adds 0 to the EMA weights. The live weights are finite where a step was left out.
                    weights = {dtype: taken.to(dtype) * weight for dtype in {tensor.dtype for tensor in average}}
                    torch._foreach_lerp_(average, live, [weights[tensor.dtype] for tensor in average])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the modules their EMA weights inside the block, and restore the live weights after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # Values are exchanged in place, as wrappers, optimizers and compiled graphs refer to the live tensors.
        for live, average in zip(self._live, self._average, strict=True):
            held = live.detach().clone()
            live.copy_(average)
            average.copy_(held)

    def average_of(self, tensor: Tensor) -> Tensor:
        """Return the EMA of a live tensor, or the tensor itself if it has none."""
        place = self._places.get(id(tensor))
        return tensor if place is None else self._average[place]

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self._named, self._average, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        if own.keys() != state.keys():
            raise KeyError(f"EMA weights of other tensors: {sorted(own.keys() ^ state.keys())[:5]}")
        self._load(own, state)

    @torch.no_grad()
    def _load(self, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        for name, tensor in own.items():
            live = self._named[name]
            sharded = self._shards is not None and self._shards.has(live)
            tensor.copy_(self._shards.part_of(live, state[name]) if sharded else state[name])  # type: ignore[union-attr]

    def contents(self, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Contents:
        """Return what a checkpoint contains of the EMA weights.

        If they are sharded, every process calls it, and `keep` returns what is kept of each whole tensor.
        """
        state, shards = self.state_dict(), self._shards
        if shards is not None:
            lives = self._named
            state = {
                name: keep(shards.whole(lives[name], mean) if shards.has(lives[name]) else mean)
                for name, mean in state.items()
            }
        return {EMA_FILE: state}

    def load(self, folder: Path) -> None:
        """Load the EMA weights from a checkpoint's folder."""
        self.load_state_dict(load_tensors(folder / EMA_FILE))

    def load_live(self, folder: Path) -> None:
        """Load the EMA weights from a checkpoint's folder into the live weights."""
        self._load(self._named, load_tensors(folder / EMA_FILE))


def _named_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the parameters and buffers of modules, by the names that they have there with a prefix."""
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }

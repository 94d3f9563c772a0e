"""The attention kernel that suits a device and a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.tools.devices import has_accelerator_device

PLAIN_ATTENTION_TOKENS = 256


def attention_kernel(tokens: int, gradient_checkpointing: bool = False) -> AbstractContextManager:
    """Return a context in which attention over `tokens` tokens uses the faster kernel of this device.

    On a CPU, plain matrix products are faster than torch's fused kernel for short sequences. Measured forward and
    backward in bfloat16: 2.0 against 4.7 ms at 64 tokens, equal at 256, and 145 against 44 ms at 1,024.

    Args:
        gradient_checkpointing: whether the model computes parts of the forward pass a second time in the backward
            pass. That happens outside this context and must use the same kernels, so nothing is changed.
    """
    if gradient_checkpointing or has_accelerator_device() or tokens > PLAIN_ATTENTION_TOKENS:
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def most_attention_tokens(unet: Any) -> int:
    """Return the number of cells of the largest feature map of a U-Net for squares that has attention, or 0."""
    config = unet.config
    sides = [config.sample_size // 2**level for level in range(len(config.down_block_types))]
    attends = ["CrossAttn" in kind for kind in config.down_block_types]
    return max((side**2 for side, own in zip(sides, attends, strict=True) if own), default=0)


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Context in which decoders of Transformers take every row of a batch as one sequence, as they find out themselves.

    They read the positions to see whether several sequences share a row, and the process would wait for a GPU. No
    argument tells them. Compiled code does not read them.
    """
    from transformers import masking_utils

    find = getattr(masking_utils, "find_packed_sequence_indices", None)
    if find is None or torch.compiler.is_compiling():
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find

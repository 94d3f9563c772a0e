"""The attention kernel that suits a device and a number of tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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

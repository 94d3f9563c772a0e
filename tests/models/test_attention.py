"""The choice of the attention kernel, which changes no result."""

from __future__ import annotations

import pytest
import torch

from pipelines.tools.devices import has_accelerator_device
from training.models.attention import PLAIN_ATTENTION_TOKENS, attention_kernel

pytestmark = pytest.mark.skipif(has_accelerator_device(), reason="for CPUs")


def test_attention_over_few_tokens_uses_plain_products_with_equal_results():
    query, key, value = torch.randn(3, 2, 4, 64, 8).unbind()
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    with attention_kernel(PLAIN_ATTENTION_TOKENS + 1):
        assert torch.backends.cuda.flash_sdp_enabled()
    with attention_kernel(64):
        assert not torch.backends.cuda.flash_sdp_enabled()
        torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(query, key, value), fused)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_gradient_checkpointing_keeps_the_kernels_of_the_backward_pass():
    with attention_kernel(64, gradient_checkpointing=True):
        assert torch.backends.cuda.flash_sdp_enabled()

# SPDX-License-Identifier: Apache-2.0
"""The store kernel against the reference, byte by byte, and the anchors that first tokens fix."""

import hypothesis
import pytest
import torch
from kernel_cases import KERNEL_ERROR, ON_GPU, batches, many
from paged_batch import Batch, make_batch, poisoned, relative_error

from sage_kernels import reference
from sage_paged import K_BITS, PageLayout


@many
@hypothesis.given(batches())
def test_store(kernels, case) -> None:
    batch = make_batch(**case[0], device=kernels.device)
    written = batch.garbage.clone()
    kernels.store(batch.key, batch.value, written, batch.slots, batch.layout, batch.k_anchor, batch.v_anchor)
    if not ON_GPU:
        assert torch.equal(written, batch.pages)
        return
    # A GPU fuses the multiplication and the rounding: codes on a boundary may be one off, everything else is equal. With INT4
    # keys, such a code may lead to other levels for its group.
    actual, expected = (batch.layout.views(pages.cpu()) for pages in (written, batch.pages))
    for name in ("k_scale", "v_exponent", "v"):
        if getattr(actual, name) is not None:
            assert torch.equal(getattr(actual, name).view(torch.uint8), getattr(expected, name).view(torch.uint8)), name
    k, k_expected = (reference.key_codes(pages.cpu(), batch.layout)[0].int() for pages in (written, batch.pages))
    assert (k - k_expected).abs().max() <= (1 if batch.layout.k_bits == 8 else 17)
    assert (k != k_expected).float().mean() < (1e-3 if batch.layout.k_bits == 8 else 1e-2)


@pytest.mark.parametrize("k_bits", K_BITS)
def test_values_of_all_sizes(kernels, k_bits: int) -> None:
    """Values around the largest one that has finer scales, and up to those that saturate."""
    batch = make_batch(PageLayout(128, k_bits), [(300, 8)], heads=8, kv_heads=2)
    sizes = torch.tensor([1e-5, 1e-2, 1.0, 100.0, 112.0, 113.0, 224.0, 225.0, 448.0, 800.0, 900.0])
    sizes = sizes.repeat(28)[: len(batch.value), None, None]
    batch.value *= (sizes / batch.value.abs().amax(-1, keepdim=True)).to(torch.bfloat16)
    reference.store(batch.key, batch.value, batch.pages, batch.slots, batch.layout)
    expected = reference.attention(*batch.attention_args())
    batch.pages = batch.garbage
    batch = batch.to(kernels.device)
    kernels.store(batch.key, batch.value, batch.pages, batch.slots, batch.layout)
    for run, options in ((kernels.prefill, {}), (kernels.decode, {"programs": 3})):
        out = poisoned(batch.query)
        run(*batch.attention_args(), out, **options)
        assert relative_error(out, expected) < KERNEL_ERROR


def stored_keys(pages: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The keys that were written for the tokens of a batch, less their anchor: float32 [tokens, kv_heads, head_dim]."""
    codes, k_scale = reference.key_codes(pages, batch.layout)
    slots = batch.slots[batch.slots >= 0]
    block, offset = slots // batch.layout.tokens, slots % batch.layout.tokens
    return (codes * k_scale[..., None])[block, :, offset]


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_first_tokens_fix_the_anchor(kernels, head_dim: int, triton: bool) -> None:
    store, device = (kernels.store, kernels.device) if triton else (reference.store, "cpu")
    batch = make_batch(PageLayout(head_dim), [(100, 1), (80, 1)], heads=2, kv_heads=2, channel_bias=20.0, device=device)
    anchor = torch.full((2, head_dim), float("nan"), device=device)
    pages = batch.garbage.clone()
    store(batch.key, batch.value, pages, torch.full_like(batch.slots, -1), batch.layout, anchor)
    assert anchor.isnan().all(), "padding fixes nothing"
    assert torch.equal(pages, batch.garbage)

    batch.slots[:3] = -1
    store(batch.key, batch.value, pages, batch.slots, batch.layout, anchor)
    assert torch.allclose(anchor, batch.key[3 : reference.ANCHOR_TOKENS].float().mean(0), atol=1e-5)
    fixed = anchor.clone()
    store(2 * batch.key, batch.value, batch.garbage.clone(), batch.slots, batch.layout, anchor)
    assert torch.equal(anchor, fixed), "it changed"

    # All programs stored with the same anchor: with another, errors would be of the size of the keys.
    keys = batch.key[batch.slots >= 0].float()
    error = stored_keys(pages, batch) + anchor - keys
    assert error.abs().max() <= (keys - anchor).abs().max() / 200


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs one program after another")
def test_programs_that_run_at_once_fix_one_anchor(kernels) -> None:
    layout = PageLayout(128)
    key = torch.randn(16384, 8, 128, dtype=torch.bfloat16, device=kernels.device) + 10
    slots = torch.arange(len(key), device=kernels.device)
    for _ in range(200):
        anchor = torch.full((8, 128), float("nan"), device=kernels.device)
        fixing, fixed = (layout.empty(128, 8, kernels.device) for _ in range(2))
        kernels.store(key, key, fixing, slots, layout, anchor)
        kernels.store(key, key, fixed, slots, layout, anchor)
        assert torch.equal(fixing, fixed)


@pytest.mark.parametrize("triton", [False, True])
def test_anchors_are_finite(kernels, triton: bool) -> None:
    store, device = (kernels.store, kernels.device) if triton else (reference.store, "cpu")
    batch = make_batch(PageLayout(64), [(100, 1)], heads=2, kv_heads=2, device=device)
    for slots, key in (
        (torch.where(torch.arange(101, device=device) < 90, -1, batch.slots), batch.key),  # none among the first
        (batch.slots, torch.full_like(batch.key, float("inf"))),
        (batch.slots, torch.full_like(batch.key, float("nan"))),
    ):
        anchor = torch.full((2, 64), float("nan"), device=device)
        store(key, batch.value, batch.garbage.clone(), slots, batch.layout, anchor)
        assert torch.equal(anchor, torch.zeros_like(anchor))

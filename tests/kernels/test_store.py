# SPDX-License-Identifier: Apache-2.0
"""The store kernel against the reference, byte by byte, and what calibrated keys are."""

import hypothesis
import pytest
import torch
from kernel_cases import KERNEL_ERROR, ON_GPU, batches, many
from paged_batch import make_batch, poisoned, relative_error

from sage_kernels import reference
from sage_paged import K_BITS, PageLayout


@many
@hypothesis.given(batches())
def test_store(kernels, case) -> None:
    batch = make_batch(**case[0], device=kernels.device)
    written = batch.garbage.clone()
    kernels.store(batch.key, batch.value, written, batch.slots, batch.layout, batch.calibration)
    if not ON_GPU:
        assert torch.equal(written, batch.pages)
        return
    # A GPU fuses the multiplication and the rounding: codes on a boundary may be one off, everything else is equal. With INT4
    # keys, such a code may lead to other levels for its group.
    actual, expected = (batch.layout.views(pages.cpu()) for pages in (written, batch.pages))
    for name in ("k_scale", "v_exponent", "v"):
        if getattr(actual, name) is not None:
            unequal = getattr(actual, name).view(torch.uint8) != getattr(expected, name).view(torch.uint8)
            assert unequal.float().mean() <= (1e-3 if batch.layout.v_bits == 4 and name == "v" else 0.0), name
    k, k_expected = (reference.key_codes(pages.cpu(), batch.layout)[0].int() for pages in (written, batch.pages))
    assert (k - k_expected).abs().max() <= (1 if batch.layout.k_bits == 8 else 17)
    assert (k != k_expected).float().mean() < (1e-3 if batch.layout.k_bits == 8 else 1e-2)


@pytest.mark.parametrize(("k_bits", "v_bits"), [(8, 8), (4, 8), (8, 4)])
def test_values_of_all_sizes(kernels, k_bits: int, v_bits: int) -> None:
    """Values around the largest one that has finer scales, and up to those that saturate."""
    batch = make_batch(PageLayout(128, k_bits, v_bits=v_bits), [(300, 8)], heads=8, kv_heads=2)
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


@pytest.mark.parametrize(("head_dim", "k_bits", "v_bits"), [(64, 8, 8), (80, 4, 8), (128, 8, 4), (128, 4, 4)])
def test_nan_in_a_channel_stays(kernels, head_dim: int, k_bits: int, v_bits: int) -> None:
    """Attention to such a token is NaN, and to others it is not."""
    layout, slots = PageLayout(head_dim, k_bits, v_bits=v_bits), torch.arange(40, device=kernels.device)
    key, value = torch.randn(2, 40, 1, head_dim)
    key[2, 0, 5] = value[30, 0, head_dim - 1] = float("nan")
    pages = layout.empty(1, 1, kernels.device)
    kernels.store(key.to(kernels.device), value.to(kernels.device), pages, slots, layout)
    codes, k_scale, v, v_exponent = reference.load(pages.cpu(), torch.tensor([0]), layout)
    keys = reference.code_product(torch.eye(head_dim), codes, k_scale).transpose(-1, -2)[0, :40]
    values = (v * v_exponent.exp2()[..., None])[0, :40]
    assert keys.isnan().any(1).nonzero().flatten().tolist() == [2]
    assert values.isnan().any(1).nonzero().flatten().tolist() == [30]


def test_padding_in_front_of_the_first_slot(kernels) -> None:
    """A run of negative slots that looks like the tokens of one page."""
    layout, slots = PageLayout(64, tokens=64), torch.arange(-16, 16)
    key, value = torch.randn(2, 32, 1, 64)
    expected = torch.zeros(4, 1, layout.page_bytes, dtype=torch.uint8)
    reference.store(key, value, expected[2:], slots, layout)
    memory = torch.zeros_like(expected).to(kernels.device)
    kernels.store(*(x.to(kernels.device) for x in (key, value)), memory[2:], slots.to(kernels.device), layout)
    assert not memory[:2].any()
    differ = (memory.cpu() != expected).float().mean()
    assert differ <= (1e-3 if ON_GPU else 0.0), "a GPU's codes on a boundary may be one off"


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("k_bits", K_BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_calibrated_keys_come_back(kernels, head_dim: int, k_bits: int, triton: bool) -> None:
    """What is stored is the key less the anchor, over the equalizer, and `restore_keys` makes the key of it again."""
    store, device = (kernels.store, kernels.device) if triton else (reference.store, "cpu")
    batch = make_batch(PageLayout(head_dim, k_bits), [(100, 1)], heads=2, kv_heads=2, smooth=True, equalize=True, device=device)
    pages = batch.garbage.clone()
    store(batch.key, batch.value, pages, batch.slots, batch.layout, batch.calibration)
    own = pages[batch.requests.block_table[0, :1].long()]
    codes, k_scale = reference.key_codes(own, batch.layout)
    stored = (codes * k_scale[..., None])[0, :, :100]  # [kv_heads, tokens, head_dim]
    expected = batch.key[:-1].float().transpose(0, 1)
    exact = reference.prepare_keys(batch.key[:-1], batch.calibration, batch.layout).transpose(0, 1)
    assert torch.allclose(reference.restore_keys(exact, batch.calibration, batch.layout), expected, atol=1e-4)
    prepared = (expected - batch.calibration.k_anchor[:, None]) / batch.calibration.equalizer[:, None]
    half = head_dim // 2
    whole = torch.cat([torch.arange(8), torch.arange(8) + half]) if k_bits == 4 else torch.arange(head_dim)  # have 8 bits
    for head, order in enumerate(batch.calibration.order.long()):
        channels = torch.cat([order, order + half]) if k_bits == 4 else torch.arange(head_dim)
        error = stored[head] - prepared[head][:, channels]
        assert (error[:, whole].abs().amax(-1) <= 0.52 * prepared[head].abs().amax(-1) / 127).all()
        assert relative_error(stored[head], prepared[head][:, channels]) < (0.03 if k_bits == 8 else 0.2)

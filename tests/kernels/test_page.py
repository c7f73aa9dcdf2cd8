# SPDX-License-Identifier: Apache-2.0
"""The page: its bytes, and what a round trip through it keeps."""

import itertools

import pytest
import torch

from sage_kernels import reference
from sage_paged import GROUP_BYTES, HEAD_DIMS, K_BITS, MAX_V_INT4_DIM, PAGE_TOKENS, V_BITS, PageLayout

FORMATS = list(itertools.product(K_BITS, V_BITS))
LAYOUTS = [
    PageLayout(head_dim, k_bits, tokens, v_bits=v_bits)
    for head_dim, tokens, (k_bits, v_bits) in itertools.product(HEAD_DIMS, PAGE_TOKENS, FORMATS)
    if v_bits == 8 or head_dim <= MAX_V_INT4_DIM
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sections_cover_the_page_without_overlap(layout: PageLayout) -> None:
    pages = layout.empty(3, 2)
    views = layout.views(pages)
    every = (views.k, views.v, views.k_groups, views.k_low, views.k_scale, views.v_exponent)
    sections = [s for s in every if s is not None]
    assert len(sections) == {(8, 8): 4, (4, 8): 5, (8, 4): 4, (4, 4): 6}[layout.k_bits, layout.v_bits]
    unused = layout.page_bytes - sum(s[0, 0].numel() * s.element_size() for s in sections)
    assert unused == (2 * layout.tokens if layout.head_dim // 16 % 2 and layout.k_bits == 4 else 0)
    for mark, section in enumerate(sections, start=1):
        section.view(torch.uint8).copy_(torch.full_like(section.view(torch.uint8), mark))
    counts = [int((pages == mark).sum()) for mark in range(len(sections) + 1)]
    assert counts == [6 * unused, *(s.numel() * s.element_size() for s in sections)]
    assert layout.bytes_per_token * layout.tokens == layout.page_bytes
    assert layout.page_bytes % 16 == 0, "kernels load 16 bytes at a time"
    assert layout.bytes_per_token % 4 == 0, "vLLM hands the cache out as 2 or 4 byte elements"


def decoded(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The keys that codes and scales stand for, as attention sees them: their products with unit vectors."""
    return reference.code_product(torch.eye(codes.shape[-1]), codes, scale).transpose(-1, -2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_round_trip(layout: PageLayout) -> None:
    """Random tokens come back within the rounding of their formats, wherever they were put."""
    g = torch.Generator().manual_seed(layout.page_bytes)
    n, heads = 3 * layout.tokens, 2
    key = torch.randn(n, heads, layout.head_dim, generator=g) * 10 ** (4 * torch.rand(n, 1, 1, generator=g) - 2)
    value = torch.randn(n, heads, layout.head_dim, generator=g) * 10 ** (4 * torch.rand(n, 1, 1, generator=g) - 2.5)
    slots = torch.randperm(5 * layout.tokens, generator=g)[:n]
    pages = torch.randint(0, 256, (5, heads, layout.page_bytes), generator=g, dtype=torch.uint8)
    before = pages.clone()
    reference.store(key, value, pages, slots, layout)

    k, k_scale, v, v_exponent = reference.load(pages, torch.arange(5), layout)
    k, v = decoded(k, k_scale)[:, slots], (v * v_exponent.exp2()[..., None])[:, slots]
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    code = key.abs().amax(-1, keepdim=True) / 127
    if layout.k_bits == 8:
        assert ((k - key).abs() <= 0.5001 * code).all()
    else:
        # At most what 16 levels from a group's least to its largest code leave, wherever between them codes are.
        error, of_groups = (x.unflatten(-1, (2, -1, GROUP_BYTES)) for x in (k - key, key))
        span = of_groups.amax((-3, -1)) - of_groups.amin((-3, -1))
        step = (span / code / 15 + 1 / 15).ceil() * code
        assert (error.square().mean((-3, -1)).sqrt() <= 0.5 * step + 0.51 * code).all()
        assert (error[..., 0, :].abs() <= 0.505 * code[..., None]).all(), "8 bits, and k_scale is off by up to 2**-15"
        assert (error / step[..., None, :, None]).square().mean().sqrt() < 0.3
    if layout.v_bits == 8:
        # e4m3 keeps 3 fraction bits: half a step is 1/16 of a number, and 2**-10 of the scale for its subnormals.
        assert ((v - value).abs() <= torch.maximum(value.abs() / 16, v_exponent.exp2()[:, slots, None] * 2**-10)).all()
    else:
        error = (reference.rotate_values_back(v) - value).square().mean(-1) / value.square().mean(-1)
        assert error.max() < 0.04
        assert error.mean() < 0.0105, "16 levels, chosen for the normal distribution"

    untouched = torch.ones(5 * layout.tokens, dtype=torch.bool).index_fill_(0, slots, False)
    for name in ("k", "k_groups", "k_low", "k_scale", "v_exponent"):
        if getattr(layout.views(pages), name) is None:
            continue
        old, new = (getattr(layout.views(x), name).contiguous().view(torch.uint8) for x in (before, pages))
        old, new = (x.unflatten(2, (layout.tokens, -1)).transpose(1, 2).flatten(0, 1) for x in (old, new))
        assert torch.equal(old[untouched], new[untouched]), f"{name} of other tokens changed"


@pytest.mark.parametrize(("k_bits", "v_bits"), FORMATS)
def test_zero_nan_and_huge_tokens_stay_their_own(k_bits: int, v_bits: int) -> None:
    layout = PageLayout(64, k_bits, v_bits=v_bits)
    key = torch.randn(4, 1, 64)
    value = torch.randn(4, 1, 64)
    key[1], value[1] = 0, 0
    key[2, 0, 5], value[2, 0, 5] = float("nan"), float("nan")
    key[3], value[3] = 3e38, -900
    pages = layout.empty(1, 1)
    reference.store(key, value, pages, torch.arange(4), layout)
    k, k_scale, v, v_exponent = reference.load(pages, torch.tensor([0]), layout)
    k, v = decoded(k, k_scale)[0], (v * v_exponent.exp2()[..., None])[0]
    assert (k[1] == 0).all()
    assert k[2].isnan().any()
    assert v[2].isnan().any()
    torch.testing.assert_close(k[3], key[3, 0], rtol=1e-2, atol=0)
    if v_bits == 8:
        assert (v[1] == 0).all()
        assert (v[3] == -896).all(), "V saturates there"
    else:
        v = reference.rotate_values_back(v)
        assert (v[1].abs() < 2e-3).all(), "no level is 0"
        torch.testing.assert_close(v[3], value[3, 0], rtol=0.07, atol=0)
    torch.testing.assert_close(k[0], key[0, 0], rtol=0, atol=0.02 if k_bits == 8 else 0.25)


def test_int4_keys_stand_for_int8_codes() -> None:
    codes = torch.randint(-127, 128, (500, 2, 96), dtype=torch.int8)
    codes[:200] //= 20  # groups that 16 levels suffice for
    codes[0], codes[1], codes[2] = 127, -127, 0
    packed, groups, low = reference.pack_int4(codes)
    assert (packed.shape, groups.shape, low.shape) == ((500, 2, 48), (500, 2, 2, 6), (500, 2, 8))
    step, zero = groups.int().unbind(-2)
    assert (step >= 1).all()
    assert (zero[..., 1:] + 15 * step[..., 1:] <= 127).all()
    wide = reference.unpack_int4(packed, groups, low)
    assert torch.equal(wide[:200], codes[:200])
    first = torch.cat([torch.arange(8), torch.arange(8) + 48])
    assert torch.equal(wide[..., first], codes[..., first]), "the first group has 8 bits"
    assert not torch.equal(wide, codes)

    # Byte i has channels i and i + 48, with the step and the zero point of i // 8; the first group has low nibbles besides.
    def unpack(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.view(torch.uint8) & 0xF, x.view(torch.uint8) >> 4], -2).int()

    of_byte = torch.arange(48) // GROUP_BYTES
    expected = zero[..., None, of_byte] + step[..., None, of_byte] * unpack(packed)
    expected[..., :GROUP_BYTES] += unpack(low)
    assert torch.equal(wide.int().unflatten(-1, (2, 48)), expected)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotated_values(head_dim: int) -> None:
    """The rotation is orthogonal, mixes spans of 16 or 64 channels, and has an inverse."""
    matrix = reference.rotate_values(torch.eye(head_dim)).T  # its columns
    span = 64 if head_dim % 64 == 0 else 16
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), rtol=0, atol=1e-6)
    torch.testing.assert_close(reference.rotate_values_back(matrix.T), torch.eye(head_dim), rtol=0, atol=1e-6)
    blocks = torch.block_diag(*[torch.ones(span, span)] * (head_dim // span))
    assert torch.equal(matrix.abs(), blocks * span**-0.5)
    constant = reference.rotate_values(torch.ones(head_dim)).abs().max()
    assert constant <= 2 * 2**0.5, "a constant vector has no single peak"


def test_4_bit_values_are_the_nearest_levels() -> None:
    levels = reference.v_levels(torch.arange(16))
    assert (levels * 512).tolist() == [1, 4, 7, 10, 14, 18, 24, 30, -1, -4, -7, -10, -14, -18, -24, -30]
    value = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 300)[:, None]
    nibbles, exponent = reference.quantize_v_int4(value)
    scaled = value / exponent.exp2()[:, None]
    nearest = (scaled[..., None] - levels).abs().amin(-1)
    torch.testing.assert_close((scaled - reference.v_levels(nibbles)).abs(), nearest, rtol=0, atol=1e-6)

    def error(exponent: torch.Tensor) -> torch.Tensor:
        """Relative squared errors with the nearest levels for these exponents."""
        miss = ((value / exponent.exp2()[:, None])[..., None] - levels).abs().amin(-1) * exponent.exp2()[:, None]
        return miss.square().sum(-1) / value.square().sum(-1)

    best = torch.stack([error(exponent + change) for change in torch.linspace(-1, 1, 33)]).amin(0)
    assert best.mean() < error(exponent).mean() < 1.15 * best.mean(), "the five scales are nearly as good as any"


@pytest.mark.parametrize(("argument", "value"), [("head_dim", 72), ("k_bits", 5), ("tokens", 32), ("v_bits", 2)])
def test_unknown_formats_are_refused(argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value} is not supported"):
        PageLayout(**{"head_dim": 128, argument: value})


def test_large_heads_have_no_4_bit_values() -> None:
    with pytest.raises(ValueError, match="v_bits=4 is not supported at head_dim=512, only up to 256"):
        PageLayout(512, v_bits=4)


def test_an_engine_cache_is_seen_as_pages() -> None:
    layout = PageLayout(128)
    cache = torch.zeros(4, 2, layout.tokens, layout.bytes_per_token // 2, dtype=torch.bfloat16)
    pages = layout.pages(cache)
    pages[3, 1, -1] = 7
    assert pages.shape == (4, 2, layout.page_bytes)
    assert cache.view(torch.uint8)[3, 1, -1, -1] == 7
    with pytest.raises(ValueError, match="does not hold pages"):
        layout.pages(cache.transpose(1, 2))


def test_inverses_of_scales_of_v_are_e4m3_numbers() -> None:
    """What the kernel for prompts on sm_90 multiplies P with, to sum it."""
    largest = torch.cat([torch.logspace(-8, 3, 4000), torch.tensor([0.0, 111.9, 112.0, 112.1, 224.0, 448.0, 896.0, 1e30])])
    value = torch.rand(len(largest), 64, generator=torch.Generator().manual_seed(0)) * largest[:, None]
    value[:, 0] = largest
    inverse = (-8 - reference.quantize_v(value)[1]).exp2()
    rounded = inverse.to(torch.float8_e4m3fn).float()
    assert (rounded > 0).all()
    torch.testing.assert_close(inverse, rounded, rtol=1e-6, atol=0.0)
    assert len((rounded.log2() % 1).mul(1000).round().remainder(1000).unique()) == 1 + len(reference.V_EIGHTHS)

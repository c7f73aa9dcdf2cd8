# SPDX-License-Identifier: Apache-2.0
"""The reference against exact attention: what quantization costs, and what smoothing gains."""

from typing import Any

import pytest
import torch
from paged_batch import make_batch, relative_error

from sage_kernels import LayerCalibration, Modifiers, reference
from sage_paged import K_BITS, PageLayout

VARIANTS = [{}, {"soft_cap": 10.0}, {"window": 50}, {"sinks": torch.linspace(-3, 6, 8)}]


@pytest.mark.parametrize(("k_bits", "smooth", "bound"), [(8, False, 0.05), (8, True, 0.045), (4, False, 0.2), (4, True, 0.11)])
@pytest.mark.parametrize("soft_cap", [0.0, 10.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [0, 50])
def test_biased_keys(k_bits: int, smooth: bool, bound: float, soft_cap: float, with_sinks: bool, window: int) -> None:
    """Keys with strong channel bias."""
    layout = PageLayout(128, k_bits)
    batch = make_batch(layout, [(384, 384)], heads=8, kv_heads=2, channel_bias=8.0, smooth=smooth)
    sinks = torch.linspace(-3, 6, 8) if with_sinks else None
    modifiers = Modifiers(window, soft_cap, sinks, batch.calibration)
    actual = reference.attention(*batch.attention_args(), modifiers)
    exact = reference.exact_attention(batch.query, batch.key[:-1], batch.value[:-1], batch.scale, modifiers)  # no padding
    assert relative_error(actual, exact) < bound


@pytest.mark.parametrize(("k_bits", "gain"), [(8, 0.15), (4, 0.05)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_biased_values(k_bits: int, gain: float, variant: dict[str, Any]) -> None:
    """Values with strong channel bias: V smoothing removes more than this share of the error."""
    errors = []
    for smooth_v in (False, True):
        shape = {"requests": [(384, 384)], "heads": 8, "kv_heads": 2, "value_bias": 8.0, "smooth": True, "smooth_v": smooth_v}
        batch = make_batch(PageLayout(128, k_bits), **shape)
        modifiers = Modifiers(**variant, calibration=batch.calibration)
        actual = reference.attention(*batch.attention_args(), modifiers)
        exact = reference.exact_attention(batch.query, batch.key[:-1], batch.value[:-1], batch.scale, modifiers)
        errors.append(relative_error(actual, exact))
    assert errors[1] < (1 - gain) * errors[0]


@pytest.mark.parametrize(("k_bits", "gain"), [(8, 0.07), (4, 0.006)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_biased_queries(k_bits: int, gain: float, variant: dict[str, Any]) -> None:
    """Queries with strong channel bias: Q smoothing removes more than this share of the error."""
    shape = {"requests": [(384, 384)], "heads": 8, "kv_heads": 2, "query_bias": 8.0, "smooth": True}
    batch = make_batch(PageLayout(128, k_bits), **shape)
    plain, smoothed = (
        Modifiers(**variant, calibration=batch.calibration, q_block=q_block) for q_block in (0, reference.tile_tokens(4))
    )
    exact = reference.exact_attention(batch.query, batch.key[:-1], batch.value[:-1], batch.scale, plain)
    errors = [relative_error(reference.attention(*batch.attention_args(), each), exact) for each in (plain, smoothed)]
    assert errors[1] < (1 - gain) * errors[0]


@pytest.mark.parametrize(("k_bits", "gain"), [(8, 0.6), (4, 0.3)])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_keys_with_outlier_channels(k_bits: int, gain: float, variant: dict[str, Any]) -> None:
    """Channels of keys that are large, but not alike in all keys, and small in queries: equalization removes more than this
    share of the error."""
    batch = make_batch(PageLayout(128, k_bits), [(384, 384)], heads=8, kv_heads=2)
    factor = torch.ones(64)
    factor[::13] = 32.0
    factor = factor.repeat(2)
    batch.key, batch.query = batch.key * factor, batch.query / factor
    exact = reference.exact_attention(batch.query, batch.key[:-1], batch.value[:-1], batch.scale, Modifiers(**variant))
    errors = []
    for calibration in (LayerCalibration(), LayerCalibration(equalizer=factor.expand(2, -1).contiguous())):
        reference.store(batch.key, batch.value, batch.pages, batch.slots, batch.layout, calibration)
        actual = reference.attention(*batch.attention_args(), Modifiers(**variant, calibration=calibration))
        errors.append(relative_error(actual, exact))
    assert errors[1] < (1 - gain) * errors[0]


@pytest.mark.parametrize("k_bits", K_BITS)
def test_4_bit_values_with_outlier_channels(k_bits: int) -> None:
    """A few large channels of values do not set the scale of all: the rotation spreads them. Without it, the small channels
    would have errors several times as large."""
    shape = {"requests": [(384, 384)], "heads": 8, "kv_heads": 2, "smooth": True}
    batch = make_batch(PageLayout(128, k_bits, v_bits=4), **shape)
    large = torch.arange(128) % 16 == 3
    batch.value[..., large] *= 8
    reference.store(batch.key, batch.value, batch.pages, batch.slots, batch.layout, batch.calibration)
    exact = reference.exact_attention(batch.query, batch.key[:-1], batch.value[:-1], batch.scale)
    actual = reference.attention(*batch.attention_args(), Modifiers(calibration=batch.calibration))
    assert relative_error(actual, exact) < (0.12 if k_bits == 8 else 0.16)
    nibbles, exponent = reference.quantize_v_int4(batch.value)
    value = (reference.v_levels(nibbles) * exponent.exp2()[..., None])[:-1]
    plain = reference.exact_attention(batch.query, batch.key[:-1], value, batch.scale)
    rotated, unrotated = (relative_error(x[..., ~large], exact[..., ~large]) for x in (actual, plain))
    assert rotated < 0.75 * unrotated


def test_pairs_that_matter_most_have_8_bits() -> None:
    """INT4 keys with a few RoPE pairs whose products with queries are large: the order removes over 30% of the error."""
    batch = make_batch(PageLayout(128, 4), [(384, 384)], heads=8, kv_heads=2, channel_bias=0.0)
    large = torch.arange(64) % 8 == 3
    batch.key[..., torch.cat([large, large])] *= 3
    batch.query[..., torch.cat([large, large])] *= 2
    exact = reference.exact_attention(batch.query, batch.key[:-1], batch.value[:-1], batch.scale)
    order = (~large).int().argsort(stable=True).int().expand(2, -1).contiguous()
    errors = []
    for calibration in (LayerCalibration(), LayerCalibration(order=order)):
        reference.store(batch.key, batch.value, batch.pages, batch.slots, batch.layout, calibration)
        actual = reference.attention(*batch.attention_args(), Modifiers(calibration=calibration))
        errors.append(relative_error(actual, exact))
    assert errors[1] < 0.7 * errors[0]

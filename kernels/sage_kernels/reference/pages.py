# SPDX-License-Identifier: Apache-2.0
"""Keys and values into KV pages and back: where the bytes of a token are written, in plain torch."""

import torch

from sage_kernels.batch import NOT_CALIBRATED, LayerCalibration
from sage_kernels.page_cache import PageCache
from sage_kernels.reference.page_cache import frame_slots
from sage_kernels.reference.quantize import (
    pack_int4,
    quantize_k,
    quantize_v,
    quantize_v_int4,
    rotate_values,
    unpack_int4,
    v_levels,
)
from sage_paged import PageLayout, v_position


def _channels(calibration: LayerCalibration, layout: PageLayout) -> torch.Tensor | None:
    """For each channel of a stored key, that of the model's key, int64 [kv_heads, head_dim]; None for the same."""
    order = calibration.for_keys(layout.k_bits).order
    if order is None:
        return None
    order = order.long()
    return torch.cat([order, order + layout.head_dim // 2], -1)


def prepare_keys(key: torch.Tensor, calibration: LayerCalibration, layout: PageLayout) -> torch.Tensor:
    """What is quantized of keys [tokens, kv_heads, head_dim]: float32, less the anchor, over the equalizer, in order."""
    key = key.float()
    if calibration.k_anchor is not None:
        key = key - calibration.k_anchor
    if calibration.equalizer is not None:
        key = key * calibration.equalizer.reciprocal()
    channels = _channels(calibration, layout)
    return key if channels is None else key.gather(-1, channels.expand_as(key))


def prepare_queries(query: torch.Tensor, calibration: LayerCalibration, layout: PageLayout) -> torch.Tensor:
    """What is quantized of queries [kv_heads, ..., queries, head_dim]: float32, times the equalizer, in the order of keys."""
    query, shape = query.float(), (-1, *[1] * (query.dim() - 2), query.shape[-1])
    if calibration.equalizer is not None:
        query = query * calibration.equalizer.view(shape)
    channels = _channels(calibration, layout)
    return query if channels is None else query.gather(-1, channels.view(shape).expand_as(query))


def restore_keys(key: torch.Tensor, calibration: LayerCalibration, layout: PageLayout) -> torch.Tensor:
    """The inverse of `prepare_keys`, for keys float32 [..., kv_heads, tokens, head_dim]."""
    channels = _channels(calibration, layout)
    if channels is not None:
        key = torch.empty_like(key).scatter_(-1, channels[:, None].expand_as(key), key)
    if calibration.equalizer is not None:
        key = key * calibration.equalizer[:, None]
    return key if calibration.k_anchor is None else key + calibration.k_anchor[:, None]


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
    calibration: LayerCalibration = NOT_CALIBRATED,
    cache: PageCache | None = None,
) -> None:
    """Quantize tokens and write them into their pages.

    key, value: [tokens, kv_heads, head_dim], any float dtype. pages: uint8 [blocks, kv_heads, page_bytes], written in place.
    slots: int [tokens]; token t goes to block slots[t] // layout.tokens, at slots[t] % layout.tokens; a negative slot is
    padding and is skipped. calibration: the layer's. cache: the layer's, whose frames get the tokens too.
    """
    if cache is not None:
        for head, of_frames in enumerate(frame_slots(cache, slots, layout)):
            own = slice(head, head + 1)
            store(key[:, own], value[:, own], cache.frames[:, own], of_frames, layout, calibration.heads(own))
    used = slots >= 0
    slots = slots[used].long()
    block, offset = slots // layout.tokens, slots % layout.tokens
    views = layout.views(pages)
    k_codes, k_scale = quantize_k(prepare_keys(key[used], calibration, layout))
    v_anchor = calibration.v_anchor
    v = value[used] if v_anchor is None else value[used].float() - v_anchor
    if layout.v_bits == 4:
        nibbles, v_exponent = quantize_v_int4(rotate_values(v))
        v_codes = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    else:
        v_codes, v_exponent = quantize_v(v, fine=views.v_exponent is not None)
    if views.k_groups is not None and views.k_low is not None:
        k_codes, views.k_groups[block, :, offset], views.k_low[block, :, offset] = pack_int4(k_codes)
    if views.v_exponent is not None:
        views.v_exponent[block, :, offset] = v_exponent
    else:
        biased = v_exponent.int() + 127
        k_scale = ((k_scale.contiguous().view(torch.int32) & ~0xFF) | biased).view(torch.float32)
    views.k[block, :, offset] = k_codes
    # torch cannot index-assign float8, so the codes are copied as bytes.
    v_bytes = v_codes.view(torch.uint8) if layout.v_bits == 8 else v_codes.to(torch.uint8)
    views.v.view(torch.uint8)[block, :, :, v_position(offset)] = v_bytes
    views.k_scale[block, :, offset] = k_scale


def key_codes(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 codes [..., tokens, head_dim] and float32 scales [..., tokens] of the keys in pages [..., page_bytes]."""
    views = layout.views(pages)
    if views.k_groups is None or views.k_low is None:
        return views.k, views.k_scale
    return unpack_int4(views.k, views.k_groups, views.k_low), views.k_scale


def load(
    pages: torch.Tensor, block_table: torch.Tensor, layout: PageLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather the pages of one request.

    pages: uint8 [blocks, kv_heads, page_bytes]. block_table: int [n], or [kv_heads, n] where each KV head reads its own pages.
    Returns K as INT8 codes [kv_heads, n * tokens, head_dim] and its scales, float32 [kv_heads, n * tokens]; V codes, float32 of
    K's shape, rotated if they have 4 bits (`rotate_values`), and its exponents, float32 [kv_heads, n * tokens].
    """
    heads = torch.arange(pages.shape[1], device=pages.device)[:, None]
    pages = pages[block_table.long().expand(pages.shape[1], -1), heads]
    views = layout.views(pages)
    k_codes, k_scale = key_codes(pages, layout)
    if layout.v_bits == 4:
        v_codes = v_levels(torch.stack([views.v.int() & 0xF, views.v.int() >> 4 & 0xF], -2).flatten(-3, -2))
    else:
        v_codes = views.v.float()
    v_codes = v_codes[..., v_position(torch.arange(layout.tokens, device=pages.device))].transpose(-1, -2)
    v_exponent = views.v_exponent
    if v_exponent is None:
        v_exponent = ((k_scale.view(torch.int32) & 0xFF) - 127).float()
    return k_codes.flatten(1, 2), k_scale.flatten(1), v_codes.flatten(1, 2), v_exponent.flatten(1)

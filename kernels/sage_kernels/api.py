# SPDX-License-Identifier: Apache-2.0
"""Paged SageAttention: store keys and values in quantized KV pages, and attend to them.

These functions run on the CPU and on NVIDIA GPUs from sm_80 on. They choose the implementation by the device of their tensors,
the page layout and the modifiers (`choose_kernels`): torch on a CPU, portable Triton kernels, or Gluon kernels for sm_90. All
of them compute what `reference` specifies. None of them waits for the device, and all can be captured in a CUDA graph.

A whole attention layer, on any device:

    >>> import torch
    >>> from sage_kernels import PagedBatch, PageLayout, attend_prefill, store
    >>> layout = PageLayout(head_dim=64)                   # INT8 keys, FP8 values, 128 tokens a page
    >>> pages = layout.empty(blocks=4, kv_heads=2)
    >>> key, value = torch.randn(200, 2, 64), torch.randn(200, 2, 64)
    >>> store(key, value, pages, torch.arange(200), layout)       # token t goes to slot t: block t // 128
    >>> batch = PagedBatch(
    ...     block_table=torch.tensor([[0, 1]], dtype=torch.int32),
    ...     seq_lens=torch.tensor([200], dtype=torch.int32),
    ...     query_start_loc=torch.tensor([0, 200], dtype=torch.int32),
    ... )
    >>> query = torch.randn(200, 8, 64)
    >>> out = torch.empty_like(query)
    >>> attend_prefill(query, pages, layout, batch, 64**-0.5, out)
    >>> out.isfinite().all().item()
    True
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from sage_kernels import cpu, reference
from sage_kernels.batch import NOT_CALIBRATED, LayerCalibration, Modifiers, PagedBatch
from sage_kernels.device import gluon_available, is_hopper
from sage_kernels.page_cache import PageCache
from sage_paged import SCRATCH_V_BITS, Memory, PageLayout

# The Triton modules are imported where a GPU needs them: importing Triton takes a second, and a CPU build of torch has none.


@dataclass(frozen=True)
class KernelChoice:
    """Which implementations serve a layer on a device.

    prefill, decode: "torch", "portable" or "hopper". fallback_reason: why prefill is portable on a device that has Hopper
    kernels: "gluon_missing" (Triton's Gluon cannot be imported), "page_format" (no kernel for this layout or group) or
    "smooth_q" (no kernel with Q smoothing); None elsewhere.
    """

    prefill: str
    decode: str
    fallback_reason: str | None = None


@functools.cache
def choose_kernels(device: torch.device, layout: PageLayout, group: int, smooth_q: bool = False) -> KernelChoice:
    """The implementations for `group` query heads per KV head, with Q smoothing or not.

    Batches with a RopeShift take portable kernels, whatever the choice.
    """
    if device.type == "cpu":
        return KernelChoice("torch", "torch")
    if not is_hopper(device):
        return KernelChoice("portable", "portable")
    if not gluon_available():
        return KernelChoice("portable", "portable", "gluon_missing")
    from sage_kernels.hopper import decode, prefill

    of_decode = "hopper" if decode.supports(layout) else "portable"
    if not prefill.supports(layout, group):
        return KernelChoice("portable", of_decode, "page_format")
    return KernelChoice("portable", of_decode, "smooth_q") if smooth_q else KernelChoice("hopper", of_decode)


def smoothing_block(device: torch.device, layout: PageLayout, group: int) -> int:
    """The `Modifiers.q_block` of Q smoothing on a device: the query tokens of a prefill tile."""
    if device.type == "cpu":
        return reference.tile_tokens(group)
    from sage_kernels.portable.prefill import tile

    return tile(device, layout, group, smooth_q=True)[0] // group


def prefill_scratch_bytes(
    device: torch.device, layout: PageLayout, group: int, smooth_q: bool = False, shifted: bool = False
) -> int:
    """Memory that `attend_prefill` allocates while it runs, in bytes, unless one KV head of one request needs more. Only pages
    that are widened need any, on a GPU (`portable.widen`), and those that are read at shifted positions."""
    if choose_kernels(device, layout, group, smooth_q).prefill == "torch":
        return 0
    from sage_kernels.portable.widen import SCRATCH, widens

    return SCRATCH if shifted or widens(layout, device) else 0


def selection_scratch_bytes(
    device: torch.device, layout: PageLayout, memory: Memory, tokens: int, requests: int, kv_heads: int, context_pages: int
) -> int:
    """Memory that `select_pages` allocates on a GPU, in bytes, and that stays while its lists are attended to, in a step of
    `tokens` query tokens of `requests` requests, whose block tables have context_pages columns."""
    if device.type == "cpu":
        return 0
    from sage_kernels.portable import recall

    return recall.scratch_bytes(layout, memory, tokens, requests, kv_heads, context_pages)


def max_decode_rows(device: torch.device, layout: PageLayout) -> int:
    """Most query rows (query tokens times query heads per KV head) of a request in `attend_decode` on a GPU, if it has several
    tokens."""
    from sage_kernels.portable.decode import max_rows

    return max_rows(device, layout)


def decode_workspace(device: torch.device, layout: PageLayout, query_rows: int, shifted: bool = False) -> Any:
    """The workspace that `attend_decode` reuses for every layer and step; None on a CPU, which needs none.

    query_rows: the most query tokens of a request times query heads per KV head. shifted: whether batches may have a RopeShift.
    """
    if device.type == "cpu":
        return None
    from sage_kernels.portable import decode as portable

    programs = []
    if choose_kernels(device, layout, 1).decode == "hopper":
        from sage_kernels.hopper import decode as hopper

        programs.append(hopper.count_programs(device, layout))
    if not programs or shifted:
        programs.append(portable.count_programs(device))
    return portable.Workspace.allocate(max(programs), query_rows, layout.head_dim, device)


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
    calibration: LayerCalibration = NOT_CALIBRATED,
    cache: PageCache | None = None,
) -> None:
    """Quantize new tokens and write them into their pages.

    key, value: [tokens, kv_heads, head_dim], float32, float16 or bfloat16, unit stride in head_dim; the first slots.numel()
    tokens count. pages: uint8 [blocks, kv_heads, page_bytes], written in place. slots: int64 [tokens]; token t goes to block
    slots[t] // layout.tokens, at slots[t] % layout.tokens; negative: padding. calibration: of the layer. Attention takes
    the same one, in its modifiers. cache: the layer's, if its pages are in host memory (`PageCache`).

    Raises ValueError for tensors whose shapes or dtypes do not fit together.

        >>> import torch; from sage_kernels import PageLayout, store
        >>> layout = PageLayout(head_dim=64, k_bits=4)
        >>> pages = layout.empty(blocks=1, kv_heads=2)
        >>> store(torch.randn(3, 2, 64), torch.randn(3, 2, 64), pages, torch.tensor([0, 1, -1]), layout)
    """
    shape = (_check_pages(pages, layout), layout.head_dim)
    for name, x in (("key", key), ("value", value)):
        if x.dim() != 3 or tuple(x.shape[1:]) != shape or len(x) < slots.numel():
            raise ValueError(f"{name} is {list(x.shape)}; these pages and slots take {[slots.numel(), *shape]}")
    for name, x in (("key", key), ("value", value)):
        _check_heads(name, x, shape[0])
    calibration.check(*shape)
    if key.device.type == "cpu":
        tokens = slots.numel()
        reference.store(key[:tokens], value[:tokens], pages, slots, layout, calibration, cache)
        return
    from sage_kernels.portable.store import store as triton_store

    triton_store(key, value, pages, slots, layout, calibration, cache)


def attend_prefill(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor,
    modifiers: Modifiers | None = None,
) -> None:
    """Causal attention of many query tokens per request (whole prompts or chunks) over their pages. Writes `out`.

    query, out: [tokens, heads, head_dim], unit stride in head_dim; the batch's requests own rows query_start_loc[0] to
    query_start_loc[-1], and no other row is touched. Keys and values of the query tokens must be stored already. pages: uint8
    [blocks, kv_heads, page_bytes]. scale multiplies the logits, head_dim**-0.5 as a rule. modifiers: of the layer; None for
    plain attention.

    Raises ValueError for shapes or dtypes that do not fit together, and on a GPU for a modifiers.q_block that is neither 0 nor
    `smoothing_block`. The module's docstring has an example.
    """
    modifiers = modifiers or Modifiers()
    group, device = _check_attention(query, pages, layout, batch, out, modifiers), query.device
    if device.type == "cpu":
        cpu.attention(query, pages, layout, batch, scale, out, modifiers)
        return
    choice = choose_kernels(device, layout, group, modifiers.q_block > 0)
    if choice.prefill == "hopper":
        from sage_kernels.hopper.prefill import prefill
    else:
        from sage_kernels.portable.prefill import prefill
    prefill(query, pages, layout, batch, scale, out, modifiers)


def attend_decode(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor,
    modifiers: Modifiers | None = None,
    workspace: Any = None,
) -> None:
    """Causal attention of the last few tokens of each request (one, or one and its drafts), with split-KV. Writes `out`.

    Arguments as for `attend_prefill`. batch.max_query_len bounds the query tokens of a request; None means 1. modifiers.q_block
    is ignored: a few queries have no mean worth subtracting. workspace: from `decode_workspace`; allocated for this call if
    None.

    Raises ValueError as `attend_prefill` does, for a workspace that is too small, and on a GPU for more than `max_decode_rows`
    query rows.

        >>> import torch; from sage_kernels import PagedBatch, PageLayout, attend_decode, store
        >>> layout, key, value = PageLayout(head_dim=64), torch.randn(200, 2, 64), torch.randn(200, 2, 64)
        >>> pages = layout.empty(blocks=2, kv_heads=2)
        >>> store(key, value, pages, torch.arange(200), layout)
        >>> table, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([200], dtype=torch.int32)
        >>> batch = PagedBatch(table, lengths, torch.tensor([0, 1], dtype=torch.int32), max_query_len=1)
        >>> query = torch.randn(1, 8, 64)
        >>> out = torch.empty_like(query)
        >>> attend_decode(query, pages, layout, batch, 64**-0.5, out)
        >>> out.isfinite().all().item()
        True
    """
    modifiers = modifiers or Modifiers()
    group, device = _check_attention(query, pages, layout, batch, out, modifiers), query.device
    if device.type == "cpu":
        cpu.attention(query, pages, layout, batch, scale, out, replace(modifiers, q_block=0))
        return
    choice = choose_kernels(device, layout, group)
    if choice.decode == "hopper" and batch.rope_shift is None:
        from sage_kernels.hopper.decode import decode
    else:
        from sage_kernels.portable.decode import decode
    decode(query, pages, layout, batch, scale, out, modifiers, workspace)


def store_summaries(
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    num_tokens: int,
    shift_table: torch.Tensor | None = None,
    calibration: LayerCalibration = NOT_CALIBRATED,
    cache: PageCache | None = None,
) -> None:
    """Write the summaries of the pages that a step has filled, which `select_pages` reads (InfLLM memory).

    pages: as for `attend_prefill`, of a layout with has_summary, unless there is a cache, which has the summaries then. batch:
    the step's requests, whose tokens are stored. num_tokens: at least the query tokens of the step. shift_table:
    `reference.rope_shift_table`, where select_pages has one. calibration: the one that keys were stored with.

    Raises ValueError for a layout without summaries, if there is no cache.

        >>> import torch; from sage_kernels import PagedBatch, PageLayout, store, store_summaries
        >>> layout = PageLayout(head_dim=64, has_summary=True)
        >>> pages = layout.empty(blocks=2, kv_heads=1)
        >>> store(torch.randn(200, 1, 64), torch.randn(200, 1, 64), pages, torch.arange(200), layout)
        >>> table, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([200], dtype=torch.int32)
        >>> batch = PagedBatch(table, lengths, torch.tensor([0, 200], dtype=torch.int32))
        >>> store_summaries(pages, layout, batch, num_tokens=200)     # of block 0, which is full
    """
    _check_pages(pages, layout)
    _check_summary(layout, cache)
    if pages.device.type == "cpu":
        reference.store_summaries(pages, layout, batch, shift_table, calibration, cache)
        return
    from sage_kernels.portable import recall

    recall.store_summaries(pages, layout, batch, num_tokens, shift_table, calibration, cache)


def select_pages(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    memory: Memory,
    query_block: int,
    shift_table: torch.Tensor | None = None,
    cache: PageCache | None = None,
) -> PagedBatch:
    """Choose the pages of long contexts that queries read: sinks, local pages, and the best of those between (InfLLM, section
    3).

    query: [tokens, heads, head_dim]. batch: the requests. memory: the policy. query_block: positions whose queries choose
    together; 0 for one choice per request, as in decoding, for which batch.max_query_len must be set where requests have
    several query tokens. shift_table: `reference.rope_shift_table`, needed where memory.trained_tokens is not 0. cache: the
    layer's, if it has the summaries.

    Returns a batch to attend with in place of the given one: query blocks replace requests, and each KV head has
    its own page list. Raises ValueError for a layout without summaries, for shapes that do not fit together, without the
    shift_table that memory needs, and with one that it does not need.

        >>> import torch
        >>> from sage_kernels import Memory, PagedBatch, PageLayout, select_pages, store, store_summaries
        >>> layout, memory = PageLayout(64, tokens=64, has_summary=True), Memory(sink_tokens=64, local_tokens=128, topk_pages=2)
        >>> pages = layout.empty(blocks=16, kv_heads=1)
        >>> store(torch.randn(1000, 1, 64), torch.randn(1000, 1, 64), pages, torch.arange(1000), layout)
        >>> table, lengths = torch.arange(16, dtype=torch.int32)[None], torch.tensor([1000], dtype=torch.int32)
        >>> store_summaries(pages, layout, PagedBatch(table, lengths, torch.tensor([0, 1000], dtype=torch.int32)), 1000)
        >>> batch = PagedBatch(table, lengths, torch.tensor([0, 1], dtype=torch.int32), max_query_len=1)
        >>> chosen = select_pages(torch.randn(1, 4, 64), pages, layout, batch, memory, query_block=0)
        >>> chosen.seq_lens.tolist()                                  # 1 sink + 2 recalled pages + 168 local tokens
        [360]
    """
    _check_batch(query, pages, layout, batch)
    _check_summary(layout, cache)
    if bool(memory.trained_tokens) != (shift_table is not None):
        needed = "takes no shift_table" if shift_table is not None else "needs a shift_table (rope_shift_table)"
        raise ValueError(f"memory.trained_tokens is {memory.trained_tokens}, which {needed}")
    if query.device.type == "cpu":
        return reference.select_pages(query, pages, layout, batch, memory, query_block, shift_table, cache)
    from sage_kernels.portable import recall

    return recall.select_pages(query, pages, layout, batch, memory, query_block, shift_table, cache)


def fetch_pages(cache: PageCache, pages: torch.Tensor, layout: PageLayout, batch: PagedBatch) -> PagedBatch:
    """Bring the pages that a batch reads into the cache's frames, and evict those that were not used for longest.

    pages: uint8 [blocks, kv_heads, page_bytes], all pages of the layer; on a GPU, a view of pinned host memory. batch: from
    `select_pages`, or one with short contexts. Its page lists have, in all, at most as many entries a KV head as there are
    frames.

    Returns the batch to attend with, to `cache.frames` in place of `pages`. Raises ValueError if the lists are too long.

        >>> import torch; from sage_kernels import PageCache, PagedBatch, PageLayout, fetch_pages, store
        >>> layout, key, value = PageLayout(head_dim=64), torch.randn(400, 1, 64), torch.randn(400, 1, 64)
        >>> pages, cache = layout.empty(blocks=4, kv_heads=1), PageCache.allocate(blocks=4, kv_heads=1, layout=layout, frames=2)
        >>> store(key, value, pages, torch.arange(400), layout, cache=cache)
        >>> table, one = torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        >>> batch = PagedBatch(table, torch.tensor([144], dtype=torch.int32), one, max_query_len=1)
        >>> held = fetch_pages(cache, pages, layout, batch)
        >>> torch.equal(cache.frames[held.block_table[0, 0].long()], pages[[3, 1]]), cache.fetched.tolist()
        (True, [2])
    """
    _check_pages(pages, layout)
    entries = batch.num_requests * batch.block_table.shape[-1]
    if entries > len(cache.frames):
        raise ValueError(f"the page lists have {entries} entries for {len(cache.frames)} frames; fetch fewer rows at a time")
    if pages.device.type == "cpu":
        return reference.fetch_pages(cache, pages, layout, batch)
    from sage_kernels.portable import page_cache

    return page_cache.fetch_pages(cache, pages, layout, batch)


# Checks look at shapes and dtypes only, never at values: they do not wait for the device. They run once per layer and step, so
# each attribute of a tensor, which costs a third of a microsecond, is read once.


def _check_pages(pages: torch.Tensor, layout: PageLayout) -> int:
    """Returns the number of KV heads."""
    shape = pages.shape
    if layout.v_bits == SCRATCH_V_BITS:
        raise ValueError(f"v_bits={SCRATCH_V_BITS} is for pages that kernels make for themselves")
    if len(shape) != 3 or shape[2] != layout.page_bytes or pages.dtype is not torch.uint8:
        raise ValueError(
            f"pages are {pages.dtype} {list(shape)}; this layout takes uint8 [blocks, kv_heads, {layout.page_bytes}] "
            "(PageLayout.pages views a serving engine's cache so)"
        )
    _check_heads("pages", pages, shape[1])
    return shape[1]


def _check_heads(name: str, x: torch.Tensor, heads: int) -> None:
    """Raises ValueError for x, [_, heads, _], if its heads are so far apart that kernels, which count elements from one head to
    another in 32 bits, would miss them."""
    if (apart := x.stride(1)) * (heads - 1) >= 1 << 31:
        raise ValueError(f"{name} has {apart} elements from one head to the next; all heads must be within 2**31")


def _check_summary(layout: PageLayout, cache: PageCache | None) -> None:
    if not layout.has_summary and cache is None:
        raise ValueError("the layout has no summaries; make it with PageLayout(..., has_summary=True)")


def _check_batch(query: torch.Tensor, pages: torch.Tensor, layout: PageLayout, batch: PagedBatch) -> int:
    """Returns the number of KV heads."""
    kv_heads, shape = _check_pages(pages, layout), query.shape
    if len(shape) != 3 or shape[2] != layout.head_dim or shape[1] % kv_heads:
        raise ValueError(
            f"query is {list(shape)}; these pages take [tokens, heads, {layout.head_dim}], heads a multiple of {kv_heads}"
        )
    table, requests, starts = batch.block_table.shape, batch.seq_lens.numel(), batch.query_start_loc.numel()
    if starts != requests + 1 or table[0] != requests:
        raise ValueError(
            f"the batch has {requests} seq_lens, {starts} query_start_loc and {table[0]} rows of block_table; "
            f"it must have {requests}, {requests + 1} and {requests}"
        )
    _check_heads("query", query, shape[1])
    topk = batch.topk_pages
    if topk is not None and (topk.dtype is not torch.int32 or topk.numel() != requests):
        raise ValueError(f"topk_pages is {topk.dtype} {list(topk.shape)}; it must be int32 [{requests}], one for each request")
    if len(table) == 3 and table[1] != kv_heads:
        raise ValueError(f"block_table is {list(table)}; dimension 1 must be the {kv_heads} KV heads")
    return kv_heads


def _check_attention(
    query: torch.Tensor, pages: torch.Tensor, layout: PageLayout, batch: PagedBatch, out: torch.Tensor, modifiers: Modifiers
) -> int:
    """Returns the number of query heads per KV head."""
    kv_heads, shape = _check_batch(query, pages, layout, batch), query.shape
    _check_heads("out", out, shape[1])
    if out.shape != shape:
        raise ValueError(f"out is {list(out.shape)}; it must have the shape of query, {list(shape)}")
    if modifiers.sinks is not None and modifiers.sinks.numel() != shape[1]:
        raise ValueError(f"sinks has {modifiers.sinks.numel()} entries; it must have one per query head, {shape[1]}")
    modifiers.calibration.check(kv_heads, shape[2])
    return shape[1] // kv_heads

# SPDX-License-Identifier: Apache-2.0
"""Paged SageAttention kernels: quantized KV pages, prefill, split-KV decoding, and InfLLM page selection. Start at `api`."""

from sage_kernels.api import (
    KernelChoice,
    attend_decode,
    attend_prefill,
    choose_kernels,
    decode_workspace,
    fetch_pages,
    max_decode_rows,
    prefill_scratch_bytes,
    select_pages,
    selection_scratch_bytes,
    smoothing_block,
    store,
    store_summaries,
)
from sage_kernels.batch import LayerCalibration, Modifiers, PagedBatch, RopeShift
from sage_kernels.page_cache import PageCache
from sage_paged import Memory, PageLayout

__all__ = [
    "KernelChoice", "LayerCalibration", "Memory", "Modifiers", "PageCache", "PageLayout", "PagedBatch", "RopeShift",
    "attend_decode", "attend_prefill", "choose_kernels", "decode_workspace", "fetch_pages", "max_decode_rows",
    "prefill_scratch_bytes", "select_pages", "selection_scratch_bytes", "smoothing_block", "store", "store_summaries",
]  # fmt: skip

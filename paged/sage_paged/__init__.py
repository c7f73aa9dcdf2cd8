# SPDX-License-Identifier: Apache-2.0
"""The quantized KV page: its bytes, how tensors look at them, and which pages of a long context are read."""

from sage_paged.layout import (
    GROUP_BYTES,
    HEAD_DIMS,
    K_BITS,
    MAX_V_INT4_DIM,
    PAGE_TOKENS,
    SCRATCH_V_BITS,
    V_BITS,
    PageLayout,
    PageViews,
    section_offset,
    v_position,
    v_token,
)
from sage_paged.memory import ALL_PAGES, Memory

__all__ = [
    "ALL_PAGES", "GROUP_BYTES", "HEAD_DIMS", "K_BITS", "MAX_V_INT4_DIM", "PAGE_TOKENS", "SCRATCH_V_BITS", "V_BITS", "Memory",
    "PageLayout", "PageViews", "section_offset", "v_position", "v_token",
]  # fmt: skip

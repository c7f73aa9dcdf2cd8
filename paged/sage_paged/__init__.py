"""The quantized KV page: its bytes, and how tensors look at them."""

from sage_paged.layout import HEAD_DIMS, K_BITS, PAGE_TOKENS, PageLayout, PageViews, v_position, v_token

__all__ = ["HEAD_DIMS", "K_BITS", "PAGE_TOKENS", "PageLayout", "PageViews", "v_position", "v_token"]

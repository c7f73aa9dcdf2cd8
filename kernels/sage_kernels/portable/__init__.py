# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for every GPU from sm_80 on: `store`, `prefill`, `decode`, `recall` (memory), `page_cache` (pages from host
memory), and `widen`, which makes pages of 8-bit codes of those with 4-bit keys or values. `query_tile` walks the pages of a
query tile, `primitives` has the arithmetic, and `scheduler` shares the pages of decodes among programs."""

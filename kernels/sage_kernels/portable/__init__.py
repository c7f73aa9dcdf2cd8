# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for every GPU from sm_80 on: `store`, `prefill`, `decode`, `recall` (memory), `widen` (INT4 pages as INT8 pages).
`query_tile` walks the pages of a query tile, `primitives` has the arithmetic, `scheduler` shares decodes among programs."""

# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for every GPU from sm_80 on: `store`, `prefill`, `decode`, `recall` (memory), and `widen`, which makes INT8
pages of INT4 pages. `query_tile` walks the pages of a query tile, `primitives` has the arithmetic, and `scheduler` shares the
pages of decodes among programs."""

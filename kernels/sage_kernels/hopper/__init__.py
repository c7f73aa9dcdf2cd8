# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode for sm_90, in Gluon. `prefill` and `decode` have the kernels; `copy` brings pages into shared memory,
`ring` has the barriers of its slots, `int4` widens 4-bit codes, and `scheduler` has the tiles of a prefill. Tokens are stored
by `portable.store`."""

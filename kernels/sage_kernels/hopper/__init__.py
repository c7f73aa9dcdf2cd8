# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode for sm_90, in Gluon. `prefill` and `decode` have the kernels; `copy` brings pages into shared memory,
`ring` has the barriers of its slots, `scheduler` the tiles of a prefill. Tokens are stored by `portable.store`."""

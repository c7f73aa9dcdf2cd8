# SPDX-License-Identifier: Apache-2.0
"""How a decode is shared out."""

import random

import hypothesis
import torch
import triton
import triton.language as tl
from hypothesis import strategies as st
from sage_kernels.shares import LANES, find_share

PAGE = tl.constexpr(64)


@triton.jit
def _shares_kernel(found, seq_lens, query_start_loc, num_reqs, kv_heads, WINDOW: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    share = find_share(
        seq_lens, query_start_loc, num_reqs, kv_heads, program, tl.num_programs(0), lanes, WINDOW, PAGE
    )
    for i in tl.static_range(7):
        tl.store(found + program * 7 + i, share[i])


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    st.sampled_from([1, 2, 5, 128, 129, 300]),
    st.sampled_from([0, 0.1, 0.9]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 7, 40]),
    st.sampled_from([0, 200]),
    st.integers(0, 2**31),
)
def test_shares(kernels, count: int, empty: float, kv_heads: int, programs: int, window: int, seed: int) -> None:
    """Shares have the pages that requests see, each once and in order, as many as each other; only the last may have fewer."""
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        queries = rng.choice([0, 1, 1, 5])
        length = 0 if rng.random() < empty else rng.choice([1, 64, 65, rng.randint(1, 1000)])
        requests.append((max(length, queries), queries))
    lengths, starts = (torch.tensor(x, dtype=torch.int32, device=kernels.device) for x in zip(*requests, strict=True))
    starts = torch.nn.functional.pad(starts.cumsum(0), (1, 0)).int()
    found = torch.full((programs, 7), -1, dtype=torch.int32, device=kernels.device)
    _shares_kernel[(programs,)](found, lengths, starts, len(requests), kv_heads, window)

    row = []
    for request, (length, queries) in enumerate(requests):
        first = max(length - queries - window + 1, 0) // 64 if window else 0
        seen = -(-length // 64) - first
        row += [(request, head, first, seen, page) for head in range(kv_heads) for page in range(seen)]
    share = max(2, -(-len(row) // programs))
    for program, (size, left, *where) in enumerate(found.tolist()):
        assert size == share
        assert left == max(0, min(share, len(row) - program * share))
        if left:
            assert tuple(where) == row[program * share]

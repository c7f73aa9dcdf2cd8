# SPDX-License-Identifier: Apache-2.0
"""The split-KV schedule of decoding."""

import random

import hypothesis
import torch
import triton
import triton.language as tl
from hypothesis import strategies as st

from sage_kernels.portable.scheduler import LANES, find_span

PAGE = tl.constexpr(64)


@triton.jit
def _spans_kernel(found, seq_lens, query_start_loc, num_reqs, kv_heads, WINDOW: tl.constexpr):
    """found: int32 [programs, 7], the length of a span and the fields of its WorkItem."""
    program = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    span, item = find_span(seq_lens, query_start_loc, num_reqs, kv_heads, program, tl.num_programs(0), lanes, WINDOW, PAGE)
    tl.store(found + program * 7, span)
    for i in tl.static_range(6):
        tl.store(found + program * 7 + 1 + i, item[i])


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    st.sampled_from([1, 2, 5, 128, 129, 300]),
    st.sampled_from([0, 0.1, 0.9]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 7, 40]),
    st.sampled_from([0, 200]),
    st.integers(0, 2**31),
)
def test_spans(kernels, count: int, empty: float, kv_heads: int, programs: int, window: int, seed: int) -> None:
    """Spans hold the pages that requests see, each once and in order. All have the same length; only the last may be
    shorter."""
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        queries = rng.choice([0, 1, 1, 5])
        length = 0 if rng.random() < empty else rng.choice([1, 64, 65, rng.randint(1, 1000)])
        requests.append((max(length, queries), queries))
    lengths, starts = (torch.tensor(x, dtype=torch.int32, device=kernels.device) for x in zip(*requests, strict=True))
    starts = torch.nn.functional.pad(starts.cumsum(0), (1, 0)).int()
    found = torch.full((programs, 7), -1, dtype=torch.int32, device=kernels.device)
    _spans_kernel[(programs,)](found, lengths, starts, len(requests), kv_heads, window)

    row = []
    for request, (length, queries) in enumerate(requests):
        first = max(length - queries - window + 1, 0) // 64 if window else 0
        seen = -(-length // 64) - first
        row += [(request, head, first, seen, page) for head in range(kv_heads) for page in range(seen)]
    span = max(2, -(-len(row) // programs))
    for program, (size, *item, left) in enumerate(found.tolist()):
        assert size == span
        assert left == max(0, min(span, len(row) - program * span))
        if left:
            assert tuple(item) == row[program * span]

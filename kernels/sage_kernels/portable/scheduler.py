# SPDX-License-Identifier: Apache-2.0
"""The split-KV schedule of decoding: every program reads as many pages as any other, whatever the lengths of the requests.

Laid end to end, request by request and within a request KV head by KV head, the pages that a step reads are one line of work.
It is cut into spans of equal length, one per program, as Stream-K cuts matrix products (Osama et al., PPoPP 2023). A segment is
the pages of one request and KV head. A short segment lies whole in a span and is finished there. A long one is split: its first
part ends a span, its last part begins one, and the parts between fill spans of their own. So a span has at most two partial
results: one of a segment that began in an earlier span, and one of a segment that continues in the next span.
`decode._merge_kernel` combines them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LANES = tl.constexpr(128)
"""Requests whose lengths are read together."""
LEAST_PAGES = tl.constexpr(2)
"""Least length of a span, in pages. Shorter ones would cost more to combine than they save."""


class WorkItem(NamedTuple):
    """Where a program is in its span. request, kv_head: the segment. first, seen: the segment's first visible page, and how
    many are visible. page: index among the visible pages. left: pages left of the span, this one included."""

    request: tl.tensor
    kv_head: tl.tensor
    first: tl.tensor
    seen: tl.tensor
    page: tl.tensor
    left: tl.tensor


@triton.jit
def seen_pages(seq_lens, query_start_loc, request, valid, WINDOW: tl.constexpr, PAGE: tl.constexpr):
    """The first page that a request's queries see, and how many pages they see; 0 where not valid. Both int32."""
    length = tl.load(seq_lens + request, mask=valid, other=0)
    first = length * 0
    if WINDOW > 0:
        begin = tl.load(query_start_loc + request, mask=valid, other=0)
        queries = tl.load(query_start_loc + request + 1, mask=valid, other=0) - begin
        first = tl.maximum(length - queries - WINDOW + 1, 0) // PAGE
    return first, (length + PAGE - 1) // PAGE - first


@triton.jit
def find_span(
    seq_lens, query_start_loc, num_reqs, kv_heads, program, programs, lanes, WINDOW: tl.constexpr, PAGE: tl.constexpr
):
    """The length of a span in pages, and the WorkItem that the span of `program` of `programs` begins with. The last programs
    have nothing left to do where pages are few. lanes: 0 to LANES - 1."""
    total = seen_pages(seq_lens, query_start_loc, 0, num_reqs == 1, WINDOW, PAGE)[1]
    if num_reqs > 1:
        for start in range(0, num_reqs, LANES):
            _, seen = seen_pages(seq_lens, query_start_loc, start + lanes, start + lanes < num_reqs, WINDOW, PAGE)
            total += tl.sum(seen, 0)
    span = tl.maximum((total * kv_heads + programs - 1) // programs, LEAST_PAGES)
    begin = program * span
    request = 0
    before = 0  # pages of the requests before
    if num_reqs > 1:
        so_far = 0
        for start in range(0, num_reqs, LANES):
            valid = start + lanes < num_reqs
            _, seen = seen_pages(seq_lens, query_start_loc, start + lanes, valid, WINDOW, PAGE)
            ends = so_far + tl.cumsum(seen, 0)
            passed = valid & (ends * kv_heads <= begin)
            request += tl.sum(passed.to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
            so_far += tl.sum(seen, 0)
    left = tl.maximum(tl.minimum(span, total * kv_heads - begin), 0)
    first, seen = seen_pages(seq_lens, query_start_loc, request, left > 0, WINDOW, PAGE)
    offset = begin - before * kv_heads
    pages = tl.maximum(seen, 1)  # 0 where nothing is left
    return span, WorkItem(request, offset // pages, first, seen, offset % pages, left)


@triton.jit
def next_segment(
    seq_lens, query_start_loc, request, kv_head, first, seen, kv_heads, more, WINDOW: tl.constexpr, PAGE: tl.constexpr
):
    """The request, KV head, first visible page and number of visible pages of the segment after the one given. more: whether
    there is one. Requests that see no page are skipped."""
    kv_head += 1
    if kv_head == kv_heads:
        kv_head = 0
        request += 1
        if more:
            first, seen = seen_pages(seq_lens, query_start_loc, request, more, WINDOW, PAGE)
            while seen == 0:
                request += 1
                first, seen = seen_pages(seq_lens, query_start_loc, request, more, WINDOW, PAGE)
    return request, kv_head, first, seen


@triton.jit
def partial_slot(program, continued):
    """The workspace slot of a program's partial result. continued: whether the segment began in an earlier span."""
    return 2 * program + 1 - continued.to(tl.int32)


@triton.jit
def count_parts(part, seen, span):
    """The number of parts of a segment of `seen` pages, if its first part has `part` pages."""
    return 1 + (seen - part + span - 1) // span

"""How a decode is shared out: every program reads as many pages as any other, whatever the lengths of the requests.

Laid end to end, request after request and in each its KV heads one after another, the pages that a step reads are one row. It
is cut into shares of equal length, one a program (as Stream-K cuts matrix products: Osama et al., PPoPP 2023). What a share has
of one request's KV head is a part. A share holds many short requests whole, which are done with then; a long one is cut: its
first part ends a share, its last part begins one, and those between are shares of their own. So a share has two cut parts at
most, one that goes on from the share before and one that goes on in the next, and as many places for their results.
`decode._merge_kernel` puts them together.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(128)
"""Requests that are looked at together."""
LEAST_PAGES = tl.constexpr(2)
"""Shorter shares would cost more to put together than they save."""


@triton.jit
def seen_pages(seq_lens, query_start_loc, request, there, WINDOW: tl.constexpr, PAGE: tl.constexpr):
    """The first page that the queries of requests see, and how many they see; 0 where a request is not there. Both int32."""
    length = tl.load(seq_lens + request, mask=there, other=0)
    first = length * 0
    if WINDOW > 0:
        begin = tl.load(query_start_loc + request, mask=there, other=0)
        queries = tl.load(query_start_loc + request + 1, mask=there, other=0) - begin
        first = tl.maximum(length - queries - WINDOW + 1, 0) // PAGE
    return first, (length + PAGE - 1) // PAGE - first


@triton.jit
def find_share(
    seq_lens, query_start_loc, num_reqs, kv_heads, program, programs, lanes, WINDOW: tl.constexpr, PAGE: tl.constexpr
):
    """What `program` of `programs` does: the pages of a share, those of its own (none for the last ones, if there are few), and
    where these begin: the request, its KV head, the first page that the request sees, how many it sees, and the how manieth of
    them it is. lanes: 0 to LANES - 1."""
    total = seen_pages(seq_lens, query_start_loc, 0, num_reqs == 1, WINDOW, PAGE)[1]
    if num_reqs > 1:
        for base in range(0, num_reqs, LANES):
            _, seen = seen_pages(seq_lens, query_start_loc, base + lanes, base + lanes < num_reqs, WINDOW, PAGE)
            total += tl.sum(seen, 0)
    share = tl.maximum((total * kv_heads + programs - 1) // programs, LEAST_PAGES)
    begin = program * share
    request = 0
    before = 0  # pages of the requests before
    if num_reqs > 1:
        so_far = 0
        for base in range(0, num_reqs, LANES):
            there = base + lanes < num_reqs
            _, seen = seen_pages(seq_lens, query_start_loc, base + lanes, there, WINDOW, PAGE)
            ends = so_far + tl.cumsum(seen, 0)
            passed = there & (ends * kv_heads <= begin)
            request += tl.sum(passed.to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
            so_far += tl.sum(seen, 0)
    left = tl.maximum(tl.minimum(share, total * kv_heads - begin), 0)
    first, seen = seen_pages(seq_lens, query_start_loc, request, left > 0, WINDOW, PAGE)
    place = begin - before * kv_heads
    each = tl.maximum(seen, 1)  # where nothing is left
    return share, left, request, place // each, first, seen, place % each


@triton.jit
def next_segment(
    seq_lens, query_start_loc, request, head, first, seen, kv_heads, more, WINDOW: tl.constexpr, PAGE: tl.constexpr
):
    """The request and KV head after those given, the first page that it sees, and how many. more: whether there is one that
    sees pages; those that see none are left out."""
    head += 1
    if head == kv_heads:
        head = 0
        request += 1
        if more:
            first, seen = seen_pages(seq_lens, query_start_loc, request, more, WINDOW, PAGE)
            while seen == 0:
                request += 1
                first, seen = seen_pages(seq_lens, query_start_loc, request, more, WINDOW, PAGE)
    return request, head, first, seen


@triton.jit
def place_of_part(program, goes_on):
    """Where the results of a cut part stand. goes_on: whether the share before has some of the same segment."""
    return 2 * program + 1 - goes_on.to(tl.int32)


@triton.jit
def count_parts(part, seen, share):
    """Of a segment that sees so many pages and whose first part is cut: that part, and those in the shares behind."""
    return 1 + (seen - part + share - 1) // share

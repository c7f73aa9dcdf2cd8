# SPDX-License-Identifier: Apache-2.0
"""The tiles of a prefill: which tile a program takes next, and how its warps learn of it.

Programs are persistent. The first tile of a program is that of its own number; after that it takes the next number of a counter
in global memory. One warp (the producer of pages) takes tiles and puts them into a queue of two slots in shared memory, from
which the other partitions read them.
"""

import functools
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from sage_kernels.hopper.ring import wait_empty, wait_full
from sage_kernels.portable.primitives import find_request, first_block

QUEUE = gl.constexpr(2)
"""Slots of the tile queue."""
FIELDS = gl.constexpr(9)
"""Fields of a Tile."""


class Tile(NamedTuple):
    """One query block of one request and KV head. q_start, q_len: the request's first query row and query tokens; seq_len: its
    tokens; q_block: index of the block within the request; first_page: the first page that the block sees; full_pages: pages
    before this one are seen whole by every row; pages: how many the block sees. No pages: a block behind the last query, or the
    end."""

    request: gl.tensor
    q_start: gl.tensor
    q_len: gl.tensor
    seq_len: gl.tensor
    q_block: gl.tensor
    kv_head: gl.tensor
    first_page: gl.tensor
    full_pages: gl.tensor
    pages: gl.tensor


class TileQueue(NamedTuple):
    """slots: int32 [QUEUE, 16] in shared memory; full, empty: their barriers."""

    slots: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Tables(NamedTuple):
    """The batch: `PagedBatch`'s tensors and the strides of its block table."""

    block_table: gl.tensor
    query_start_loc: gl.tensor
    seq_lens: gl.tensor
    stride: gl.tensor
    head_stride: gl.tensor


@gluon.jit
def find_tile(
    number, tables, num_reqs, q_blocks, kv_heads,
    WINDOW: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """The tile of this number.

    Tiles are ordered by request, and within a request by groups of KV heads, as many as fit into the L2 cache: their queries
    lie next to each other in memory. Within a group the longest tiles come first. One head at a time, 16 prompts of 1024 tokens
    take a quarter longer; eight at a time, one prompt of 131072 takes an eighth longer.
    """
    CACHED: gl.constexpr = (10 << 20) // (2 * HEAD_DIM + 8)  # tokens of a KV head
    last = q_blocks - 1 - number // kv_heads
    request, block = find_request(tables.query_start_loc, last, num_reqs, BLOCK_Q)
    q_start = gl.load(tables.query_start_loc + request)
    q_len = gl.load(tables.query_start_loc + request + 1) - q_start
    seq_len = gl.load(tables.seq_lens + request)
    # Blocks of this request, and tiles before its first.
    end = first_block(tables.query_start_loc, gl.load(tables.query_start_loc), request + 1, BLOCK_Q)
    end = gl.where(request + 1 < num_reqs, end, q_blocks)
    blocks = end - (last - block)
    index = number - (q_blocks - end) * kv_heads
    heads_at_once = gl.minimum(gl.maximum(CACHED // gl.maximum(seq_len, 1), 1), kv_heads)
    first_head = index // (heads_at_once * blocks) * heads_at_once
    heads = gl.minimum(kv_heads - first_head, heads_at_once)
    index -= first_head * blocks
    kv_head = first_head + index % heads
    q_block = blocks - 1 - index // heads
    first_position = seq_len - q_len + q_block * BLOCK_Q
    first_page = 0
    if WINDOW > 0:
        first_page = gl.maximum(first_position - WINDOW + 1, 0) // PAGE
    last_page = (gl.minimum(first_position + BLOCK_Q, seq_len) - 1) // PAGE
    pages = gl.where(q_block * BLOCK_Q < q_len, last_page - first_page + 1, 0)
    full_pages = (first_position + 1) // PAGE if WINDOW == 0 else 0
    return Tile(request, q_start, q_len, seq_len, q_block, kv_head, first_page, full_pages, pages)


@gluon.jit
def put_tile(tile, queue, tile_index):
    """Give a tile to the other partitions. tile_index: how many tiles this program had before."""
    fields = gl.arange(0, 16, gl.BlockedLayout([1], [32], [1], [0]))
    packed = gl.zeros_like(fields)
    for k in gl.static_range(FIELDS):
        packed = gl.where(fields == k, tile[k], packed)
    wait_empty(queue.empty, tile_index, QUEUE)
    queue.slots.index(tile_index % QUEUE).store(packed)
    fence_async_shared()
    mbarrier.arrive(queue.full.index(tile_index % QUEUE))


@gluon.jit
def get_tile(queue, tile_index):
    """The tile with this index. It stays in the queue until `release_tile`."""
    EVERYWHERE: gl.constexpr = gl.BlockedLayout([16], [32], [gl.num_warps()], [0])
    wait_full(queue.full, tile_index, QUEUE)
    packed = queue.slots.index(tile_index % QUEUE).load(EVERYWHERE)
    fields = gl.arange(0, 16, EVERYWHERE)
    values = ()
    for k in gl.static_range(FIELDS):
        values += (gl.sum(gl.where(fields == k, packed, 0), 0),)  # type: ignore[assignment]
    return Tile(*values)  # type: ignore[call-arg]


@gluon.jit
def release_tile(queue, tile_index):
    """This partition does not read the tile again."""
    mbarrier.arrive(queue.empty.index(tile_index % QUEUE))


@functools.cache
def _zeros(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


def counters(device: torch.device) -> torch.Tensor:
    """The counters of tiles and of finished programs, int32 [2], both 0. A launch leaves them 0 again, so that the launches of
    a stream share them."""
    if device.type != "cuda":
        return _zeros(device, 0)
    if torch.cuda.is_current_stream_capturing():  # a graph may be replayed in any stream
        return torch.zeros(2, dtype=torch.int32, device=device)
    return _zeros(device, torch.cuda.current_stream(device).cuda_stream)

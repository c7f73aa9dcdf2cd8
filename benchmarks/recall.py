#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What memory costs and saves in a decode step: attention to all of a context, and to the pages that are recalled from it.

    python3 benchmarks/recall.py --lengths 65536 262144 1048576 --out benchmarks/results/recall-NAME.json

One request of each length is timed, with random keys. Each of --layers layers has its own pages, so that they are not in the L2
cache when the layer runs. A step over all layers is one CUDA graph. Times are per layer: medians of --repeat replays.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common.report import circumstances, save

from sage_kernels import Memory, PagedBatch, PageLayout, attend_decode, select_pages, store, store_summaries
from sage_kernels.reference import rope_shift_table


def graphed(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, repeat: int) -> float:
    times = []
    for _ in range(repeat + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def measure(length: int, arguments: argparse.Namespace) -> dict[str, float | int]:
    heads, kv_heads, dim, where = 32, 8, 128, torch.device("cuda")
    layout = PageLayout(dim, arguments.k_bits, has_summary=True)
    memory = Memory(topk_pages=arguments.topk, trained_tokens=arguments.extrapolate)
    shifts = None
    if arguments.extrapolate:
        frequencies = 500000.0 ** -(torch.arange(0, dim, 2) / dim)
        shifts = rope_shift_table(frequencies, length // layout.tokens + 1, layout.tokens).to(where)
    count = -(-length // layout.tokens)
    lengths, starts = (torch.tensor(x, dtype=torch.int32, device=where) for x in ([length], [0, 1]))
    every = torch.tensor([0, length], dtype=torch.int32, device=where)
    layers = []
    for _ in range(arguments.layers):
        pages = torch.empty(count, kv_heads, layout.page_bytes, dtype=torch.uint8, device=where)
        for slots in torch.arange(count * layout.tokens, device=where).split(1 << 16):
            key, value = (torch.randn(len(slots), kv_heads, dim, dtype=torch.bfloat16, device=where) for _ in range(2))
            store(key, value, pages, slots, layout)
        store_summaries(pages, layout, PagedBatch(torch.arange(count, device=where)[None].int(), lengths, every), length)
        table = torch.randperm(count, device=where, dtype=torch.int32)[None]
        batch = PagedBatch(table, lengths, starts, max_query_len=1)
        layers.append((torch.randn(1, heads, dim, dtype=torch.bfloat16, device=where), pages, batch))
    out = torch.empty(1, heads, dim, dtype=torch.bfloat16, device=where)

    def dense() -> None:
        for query, pages, batch in layers:
            attend_decode(query, pages, layout, batch, dim**-0.5, out)

    def look_up() -> None:
        for query, pages, batch in layers:
            store_summaries(pages, layout, batch, 1, shifts)
            select_pages(query, pages, layout, batch, memory, 0, shifts)

    def remembering() -> None:
        for query, pages, batch in layers:
            store_summaries(pages, layout, batch, 1, shifts)
            selected = select_pages(query, pages, layout, batch, memory, 0, shifts)
            attend_decode(query, pages, layout, selected, dim**-0.5, out)

    figures: dict[str, float | int] = {"tokens": length}
    for name, call in (("dense_ms", dense), ("lookup_ms", look_up), ("memory_ms", remembering)):
        figures[name] = round(milliseconds(graphed(call), arguments.repeat) / arguments.layers, 5)
    figures["times_faster"] = round(figures["dense_ms"] / figures["memory_ms"], 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Time decode attention with and without memory.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 262144, 1048576])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--k-bits", type=int, default=8, choices=(4, 8))
    parser.add_argument("--topk", type=int, default=32, help="pages recalled (default: %(default)s)")
    parser.add_argument("--extrapolate", type=int, default=0, help="trained length, if pages are read at shifted positions")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA device")
    results = []
    for length in arguments.lengths:
        results.append(measure(length, arguments))
        print(results[-1], flush=True)
    if arguments.out:
        save(circumstances("benchmarks/recall.py") | {"results": results}, arguments.out)


if __name__ == "__main__":
    main()

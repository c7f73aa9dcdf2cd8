#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every kernel under NVIDIA's compute-sanitizer: accesses out of bounds, races in shared memory, memory that was never written.

    python3 benchmarks/sanitizer.py run --out benchmarks/results/sanitizer-NAME.json

The GPU's own kernels are launched on small batches for each head size and page format, with lengths that end pages and tiles in
all ways. Each tool gets a process of its own. What it reports is counted by the place in the source.
docs/developer/kernels.md explains each place. `calls` launches everything without a tool, on a CPU too.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common.report import circumstances, save

import sage_kernels as sage
from sage_kernels.reference import rope_shift_table

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LENGTHS = (1, 127, 300, 640)
"""Of the requests of a batch, in tokens. Pages have 128."""
CHUNK, QUERIES, HEADS, KV_HEADS = 190, 3, 8, 2
"""CHUNK, QUERIES: query tokens of a request in a chunk of a prompt, and in a decode with drafts, or as many as it has."""


def batch_of(tokens: int, device: str) -> sage.PagedBatch:
    """A batch of requests of LENGTHS, the last `tokens` of which attend. Their pages are in order, after an unused one."""
    counts = [-(-length // 128) for length in LENGTHS]
    table = torch.zeros(len(LENGTHS), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = 1 + sum(counts[:row]) + torch.arange(count)
    queries = [min(length, tokens) for length in LENGTHS]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    return sage.PagedBatch(table, lengths, starts, max(queries)).to(device)


def slots_of(batch: sage.PagedBatch) -> torch.Tensor:
    """int64 [tokens]: where the requests' tokens go, and one of padding."""
    of_request = [
        row[torch.arange(length) // 128].long() * 128 + torch.arange(length) % 128
        for row, length in zip(batch.block_table.cpu(), LENGTHS, strict=True)
    ]
    return torch.cat([*of_request, torch.tensor([-1])]).to(batch.block_table.device)


def attend(layout: sage.PageLayout, device: str) -> None:
    """Write the keys and values of a batch, and attend to them: prompts, chunks, decodes and drafts."""
    g = torch.Generator().manual_seed(0)

    def normal(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, layout.head_dim, generator=g).bfloat16().to(device)

    slots = slots_of(batch_of(1, device))
    pages = layout.empty(int(slots.max()) // 128 + 1, KV_HEADS, device)
    key = normal(slots.numel(), KV_HEADS)
    calibration = sage.LayerCalibration(key.float().mean(0), v_anchor=torch.zeros(KV_HEADS, layout.head_dim, device=device))
    modifiers, scale = sage.Modifiers(calibration=calibration), layout.head_dim**-0.5
    sage.store(key, normal(slots.numel(), KV_HEADS), pages, slots, layout, calibration)
    for tokens in (max(LENGTHS), CHUNK, QUERIES, 1):
        batch = batch_of(tokens, device)
        query = normal(int(batch.query_start_loc[-1]), HEADS)
        out = torch.empty_like(query)
        function = sage.attend_prefill if tokens > QUERIES else sage.attend_decode
        function(query, pages, layout, batch, scale, out, modifiers)
        assert out.isfinite().all(), (layout, tokens)


def remember(layout: sage.PageLayout, device: str) -> None:
    """Memory: summaries, page selection, turned pages, and frames for pages in host memory."""
    tokens, block = 5000, 128
    pages = layout.empty(-(-tokens // 128), KV_HEADS, device)
    key, value = (torch.randn(tokens, KV_HEADS, layout.head_dim, device=device) for _ in range(2))
    table = torch.arange(len(pages), dtype=torch.int32, device=device)[None]
    lengths = torch.tensor([tokens], dtype=torch.int32, device=device)
    shifts = rope_shift_table(1e4 ** -(torch.arange(0, layout.head_dim, 2) / layout.head_dim), len(pages) + 1, 128).to(device)
    sage.store(key, value, pages, torch.arange(tokens, device=device), layout)

    def batch(queries: int) -> sage.PagedBatch:
        return sage.PagedBatch(table, lengths, torch.tensor([0, queries], dtype=torch.int32, device=device), queries)

    for trained in (0, 2048):
        memory = sage.Memory(local_tokens=512, topk_pages=4, trained_tokens=trained)
        turned = shifts if trained else None
        sage.store_summaries(pages, layout, batch(tokens), tokens, turned)
        cache = sage.PageCache.allocate(len(pages), KV_HEADS, layout, len(pages), device)
        for queries, query_block in ((300, block), (1, 0)):
            query = torch.randn(queries, HEADS, layout.head_dim, device=device).bfloat16()
            chosen = sage.select_pages(query, pages, layout, batch(queries), memory, query_block, turned)
            out = torch.empty_like(query)
            function = sage.attend_decode if query_block == 0 else sage.attend_prefill
            function(query, pages, layout, chosen, 0.1, out)
            assert out.isfinite().all(), (layout, trained, queries)
            if query_block == 0:
                held = sage.fetch_pages(cache, pages, layout, chosen)
                function(query, cache.frames, layout, held, 0.1, out)
                assert out.isfinite().all(), (layout, trained)


def call_all() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for head_dim in (64, 128, 256):
        for k_bits, v_bits in ((8, 8), (4, 8), (4, 4)):
            if v_bits == 8 or head_dim < 256:
                print(f"heads of {head_dim}, K INT{k_bits}, V {v_bits} bits", flush=True)
                attend(sage.PageLayout(head_dim, k_bits, v_bits=v_bits), device)
    print("memory", flush=True)
    remember(sage.PageLayout(128, has_summary=True), device)
    if device == "cuda":
        torch.cuda.synchronize()
    print("all kernels were called", flush=True)


def reports(output: str) -> Counter[str]:
    """What a tool's output reports, by kind and place in the source."""
    found: Counter[str] = Counter()
    access = r"(\w+) access (?:by .*? )?at (\S+?)(?:\+0x\w+)? in (?:\S*/)?(\S+)"
    lines = iter(output.splitlines())
    for line in lines:
        text = re.sub(r"^=+ ?", "", line).strip()
        if match := re.match(rf"(Error|Warning|Warn): (?:Potential )?.*?Race reported between {access}", text, re.IGNORECASE):
            other = re.search(access, next(lines, ""))
            places = sorted({f"{match[2].lower()} at {match[4]}", f"{other[1].lower()} at {other[3]}" if other else "?"})
            found[f"race in {match[3]}: {' and '.join(places)}"] += 1
        elif re.match(r"(Invalid|Uninitialized|Barrier error|Program hit)", text):
            where = next(lines, "").lstrip("= ").strip()
            found[f"{text} {where}"] += 1
    return found


def run(name: str, limit: float) -> dict[str, Any]:
    """Call all kernels under the tool of this name."""
    command = ["compute-sanitizer", "--tool", name, "--print-limit", "100000", "--error-exitcode", "9"]
    command += ["--kernel-name-exclude", "kernel_substring=at::"] if name == "initcheck" else []
    try:
        done = subprocess.run([*command, sys.executable, __file__, "calls"], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit:.0f} s"}
    output = done.stdout + done.stderr
    if "all kernels were called" not in output:
        return {"error": f"exit status {done.returncode}", "output": output[-2000:]}
    summary = re.findall(r"^=+ ((?:\w+ )?SUMMARY: .*)$", output, re.MULTILINE)
    return {"summary": summary[-1] if summary else "", "reports": dict(reports(output).most_common())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Call every kernel under compute-sanitizer.")
    parser.add_argument("what", choices=("run", "calls"))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--limit", type=float, default=600, help="seconds that one tool may take")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "calls":
        call_all()
        return
    if shutil.which("compute-sanitizer") is None:
        sys.exit("sanitizer.py: there is no compute-sanitizer in PATH; it comes with the CUDA toolkit")
    if not torch.cuda.is_available():
        sys.exit("sanitizer.py: torch sees no GPU")
    report = circumstances("benchmarks/sanitizer.py") | {"tools": {}}
    for name in arguments.tools:
        report["tools"][name] = run(name, arguments.limit)
        print(json.dumps({name: report["tools"][name]}, indent=1), flush=True)
        if arguments.out:
            save(report, arguments.out)
    if any("error" in each for each in report["tools"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Paged attention kernels side by side on one GPU: these kernels, vLLM's, cuDNN's, SageAttention's and FlashInfer's.

    python3 benchmarks/attention.py run --prefill 4096 16384 32768 131072 --store 32768 --chunk 2048x128000 \\
        --decode 64x8192 128x1024 8x131072 1x131072 --out benchmarks/results/attention-NAME.json
    python3 benchmarks/attention.py plot benchmarks/results/attention-NAME.json

In each case all contenders get the same random bf16 data, with strongly biased key channels. Each is first compared with exact
float32 attention on sampled rows, and only timed if it is close enough. Timings go in rounds: a round times every contender
once, in random order, so that clocks and temperature are the same for all. A timing is the GPU time of one call with its inputs
outside the L2 cache, without the host's time to launch it. With `--sustain S`, each contender also runs for S seconds without
pauses, and its speed and power then are reported. In a server, a prompt is one call after another, and the power limit slows
the GPU down; a single call ends before the limit takes effect.

A contender that is not installed, or fails, is listed with the reason. `plot` needs matplotlib but neither torch nor a GPU.

With `--as-if 8.9`, a Hopper GPU stands in for one that is not at hand: these kernels are the portable ones, with the data types
and the shared memory of that compute capability, and Triton multiplies with its instructions (mma.sync instead of wgmma), in
vLLM's Triton kernels too. Ratios between contenders then say something about such a GPU; times do not. With FP8 they say less:
Hopper's mma.sync takes no e4m3, and the compiler widens P and V to float16.

Length: every contender is a short class, and they are compared with each other most easily where they stand together.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from common.report import command_line, save

try:
    import torch
except ModuleNotFoundError:  # all that `plot` needs is in the JSON
    torch = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "paged"), str(ROOT / "kernels")]  # the kernels of this checkout, installed or not

BASELINE = "fa3-bf16"
CHECKED_ROWS = 64
LEAST_ROUNDS = 5
BIAS, BIASED_CHANNELS = 4.0, slice(None, None, 17)

# --- cases and their data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Case:
    """`batch` requests of `length` tokens each. With `others`, one request has `length` tokens, and the rest have `others`. The
    last `queries` tokens of each request attend. store: whether writing is timed too."""

    kind: str
    batch: int
    queries: int
    length: int
    store: bool = False
    others: int = 0

    @property
    def lengths(self) -> list[int]:
        return [self.length, *[self.others or self.length] * (self.batch - 1)]

    @property
    def name(self) -> str:
        if self.others:
            return f"{self.kind} {self.length}+{self.batch - 1}x{self.others}"
        sizes = {
            "prefill": f"{self.length}" if self.batch == 1 else f"{self.batch}x{self.length}",
            "chunk": f"{self.queries}x{self.length - self.queries}",
            "decode": f"{self.batch}x{self.length}",
        }
        return f"{self.kind} {sizes[self.kind]}"

    @property
    def pairs(self) -> int:
        """(query token, visible key) pairs: what causal attention has to compute for one head."""
        return sum(self.queries * (n - self.queries) + self.queries * (self.queries + 1) // 2 for n in self.lengths)

    def description(self) -> dict[str, Any]:
        sizes = {"kind": self.kind, "batch": self.batch, "queries": self.queries, "length": self.length}
        return {"case": self.name, **sizes, **({"others": self.others} if self.others else {}), "pairs": self.pairs}

    def operations(self, shape: Shape) -> int:
        return 4 * shape.heads * shape.head_dim * self.pairs  # a multiplication and an addition, for Q K^T and for P V


@dataclass(frozen=True)
class Paging:
    """Where the tokens of a batch lie in a cache of pages; the pages of a request are in random order.

    block_table: int32 [requests, pages of a request]; slots: int64 [tokens], page * tokens of a page + place in it.
    """

    page: int
    blocks: int
    block_table: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """query: [batch * queries, heads, head_dim]; key, value: [all tokens, kv_heads, head_dim], request after request."""

    case: Case
    shape: Shape
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    peer_page: int
    """Tokens of a page, for contenders with pages of any size."""

    @staticmethod
    def make(case: Case, shape: Shape, device: str, peer_page: int = 64, seed: int = 0) -> Batch:
        g = torch.Generator(device).manual_seed(seed)

        def normal(tokens: int, heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, shape.head_dim, generator=g, dtype=torch.bfloat16, device=device)

        tokens = sum(case.lengths)
        key = normal(tokens, shape.kv_heads)
        key[..., BIASED_CHANNELS] += BIAS
        return Batch(
            case,
            shape,
            normal(case.batch * case.queries, shape.heads),
            key,
            normal(tokens, shape.kv_heads),
            torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.queries,
            torch.tensor(case.lengths, dtype=torch.int32, device=device),
            peer_page,
        )

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    def poisoned(self) -> torch.Tensor:
        """An output full of NaN, which cannot be mistaken for a result."""
        return torch.full_like(self.query, float("nan"))

    def paging(self, page: int) -> Paging:
        g = torch.Generator(self.device).manual_seed(1)
        pages = [-(-length // page) for length in self.case.lengths]
        order = torch.randperm(sum(pages), generator=g, device=self.device)
        table = torch.zeros(len(pages), max(pages), dtype=torch.int32, device=self.device)
        slots = []
        for row, own, length in zip(table, order.split(pages), self.case.lengths, strict=True):
            row[: len(own)] = own
            tokens = torch.arange(length, device=self.device)
            slots.append(own[tokens // page] * page + tokens % page)
        return Paging(page, len(order), table, torch.cat(slots))


# --- contenders -------------------------------------------------------------------------------------------------------------


class Unfit(Exception):
    """Why a contender cannot take part in a case."""


@dataclass(frozen=True)
class Prepared:
    """A contender with its cache filled. attend: returns the output, [tokens, heads, head_dim]; store: writes all tokens."""

    attend: Callable[[], torch.Tensor]
    store: Callable[[], object] | None = None


def sage(batch: Batch, k_bits: int, v_bits: int) -> Prepared:
    from sage_kernels import (
        LayerCalibration,
        Modifiers,
        PagedBatch,
        PageLayout,
        attend_decode,
        attend_prefill,
        decode_workspace,
        store,
    )

    case, shape = batch.case, batch.shape
    layout = PageLayout(shape.head_dim, k_bits, 128, v_bits=v_bits)
    paging = batch.paging(layout.tokens)
    pages = layout.empty(paging.blocks, shape.kv_heads, batch.device)
    # As in an engine, which calibrates keys when it starts.
    equalizer = torch.ones(shape.kv_heads, shape.head_dim, device=batch.device)
    order = torch.arange(shape.head_dim // 2, dtype=torch.int32, device=batch.device).repeat(shape.kv_heads, 1)
    calibration = LayerCalibration(batch.key[:32].float().mean(0), equalizer, order)
    write = partial(store, batch.key, batch.value, pages, paging.slots, layout, calibration)
    write()
    out = batch.poisoned()
    paged = PagedBatch(paging.block_table, batch.seq_lens, batch.query_start_loc)
    arguments = batch.query, pages, layout, paged, batch.scale, out, Modifiers(calibration=calibration)
    if case.kind == "decode":
        workspace = decode_workspace(torch.device(batch.device), layout, shape.heads // shape.kv_heads)
        launch = partial(attend_decode, *arguments, workspace=workspace)
    else:
        launch = partial(attend_prefill, *arguments)

    def attend() -> torch.Tensor:
        launch()
        return out

    return Prepared(attend, write)


def sage_bytes(head_dim: int, k_bits: int, v_bits: int) -> int:
    from sage_paged import PageLayout

    return PageLayout(head_dim, k_bits, 128, v_bits=v_bits).bytes_per_token


def filled(batch: Batch, paging: Paging, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values cast to dtype, [blocks, page, kv_heads, head_dim] each, interleaved as in vLLM's default layout."""
    shape = batch.shape
    cache = torch.zeros(paging.blocks, paging.page, shape.kv_heads, 2 * shape.head_dim, dtype=dtype, device=batch.device)
    tokens = torch.cat([batch.key, batch.value], -1).to(dtype)
    cache.view(torch.uint8).flatten(0, 1)[paging.slots] = tokens.view(torch.uint8)  # as bytes: torch cannot index-assign float8
    key, value = cache.split(shape.head_dim, -1)
    return key, value


def fa3_schedule(batch: Batch, paging: Paging, dtype: torch.dtype) -> torch.Tensor:
    from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata

    return get_scheduler_metadata(
        batch_size=batch.case.batch,
        max_seqlen_q=batch.case.queries,
        max_seqlen_k=batch.case.length,
        num_heads_q=batch.shape.heads,
        num_heads_kv=batch.shape.kv_heads,
        headdim=batch.shape.head_dim,
        cache_seqlens=batch.seq_lens,
        qkv_dtype=dtype,
        cu_seqlens_q=batch.query_start_loc,
        page_size=paging.page,
        causal=True,
    )


def flash_attention(batch: Batch, version: int = 3, fp8: bool = False, cast: bool = False) -> Prepared:
    """As vLLM's FLASH_ATTN backend calls it: the schedule is computed once a step, outside the calls of the layers. The number
    of splits is left to its own heuristic.

    version: 2 is what vLLM takes before Hopper. FP8 is what vLLM does with `--kv-cache-dtype fp8` and scales of 1. cast:
    whether the call includes the cast of Q.
    """
    from vllm.vllm_flash_attn import flash_attn_interface as fa

    if reason := fa.fa_version_unsupported_reason(version):
        raise Unfit(reason)
    case, shape = batch.case, batch.shape
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    paging = batch.paging(batch.peer_page)
    key, value = filled(batch, paging, dtype)
    query, out = batch.query.to(dtype), batch.poisoned()
    ones = torch.ones(case.batch, shape.kv_heads, dtype=torch.float32, device=batch.device) if fp8 else None
    one = torch.ones(1, dtype=torch.float32, device=batch.device)
    schedule = fa3_schedule(batch, paging, dtype) if version == 3 else None

    def cast_query() -> None:
        from vllm._custom_ops import scaled_fp8_quant

        scaled_fp8_quant(batch.query.flatten(1), one, output=query.flatten(1))

    def attend() -> torch.Tensor:
        if cast:
            cast_query()
        fa.flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=case.queries,
            seqused_k=batch.seq_lens,
            max_seqlen_k=case.length,
            softmax_scale=batch.scale,
            causal=True,
            block_table=paging.block_table,
            scheduler_metadata=schedule,
            q_descale=ones,
            k_descale=ones,
            v_descale=ones,
            fa_version=version,
        )
        return out

    return Prepared(attend)


def vllm_triton(batch: Batch, cache_dtype: str) -> Prepared:
    """vLLM's TRITON_ATTN backend itself, with the metadata that its builder makes."""
    import vllm._custom_ops  # noqa: F401 - an engine has loaded its operators, with which INT4 is faster
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention.backends import triton_attn

    case, shape = batch.case, batch.shape
    quantized = cache_dtype != "auto"
    dtype = STR_DTYPE_TO_TORCH_DTYPE[cache_dtype] if quantized else torch.bfloat16
    paging = batch.paging(batch.peer_page)
    content = vllm_triton_bytes(shape.head_dim, cache_dtype) // dtype.itemsize
    raw = torch.zeros(paging.blocks, paging.page, shape.kv_heads, content, dtype=dtype, device=batch.device)
    cache = raw.transpose(1, 2)  # vLLM's default layout, seen in its logical order
    one = torch.ones((), dtype=torch.float32, device=batch.device)
    layer = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)
    implementation = triton_attn.TritonAttentionImpl(
        shape.heads, shape.head_dim, batch.scale, shape.kv_heads, None, None, cache_dtype
    )
    write = partial(implementation.do_kv_cache_update, layer, batch.key, batch.value, cache, paging.slots)
    write()

    threshold = triton_attn.MIN_LAUNCH_GRID_SIZE_2D // shape.kv_heads
    segments = threshold, shape.heads, triton_attn.NUM_PAR_SOFTMAX_SEGMENTS
    channels = 1 << (shape.head_dim - 1).bit_length()
    metadata = triton_attn.TritonAttentionMetadata(
        num_actual_tokens=len(batch.query),
        max_query_len=case.queries,
        query_start_loc=batch.query_start_loc,
        max_seq_len=case.length,
        seq_lens=batch.seq_lens,
        block_table=paging.block_table,
        slot_mapping=paging.slots,
        seq_threshold_3D=threshold,
        num_par_softmax_segments=segments[-1],
        softmax_segm_output=torch.empty(*segments, channels, dtype=torch.float32, device=batch.device),
        softmax_segm_max=torch.empty(segments, dtype=torch.float32, device=batch.device),
        softmax_segm_expsum=torch.empty(segments, dtype=torch.float32, device=batch.device),
        causal=True,
    )
    out = batch.poisoned()

    def attend() -> torch.Tensor:
        return implementation.forward(layer, batch.query, batch.key, batch.value, cache, metadata, out)

    return Prepared(attend, write)


def vllm_triton_bytes(head_dim: int, cache_dtype: str) -> int:
    if cache_dtype == "auto":
        return 4 * head_dim
    data = head_dim // 2 if cache_dtype.startswith("int4") else head_dim
    return 2 * (data + 4)  # and a float32 scale, for K and for V


def whole_prompt(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as [1, heads, tokens, head_dim], contiguous copies, for kernels without pages."""
    if batch.case.kind != "prefill" or batch.case.batch > 1:
        raise Unfit("takes one whole prompt only")
    query, key, value = (x.transpose(0, 1)[None].contiguous() for x in (batch.query, batch.key, batch.value))
    return query, key, value


def cudnn(batch: Batch) -> Prepared:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    tensors = whole_prompt(batch)

    def attend() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(*tensors, is_causal=True, scale=batch.scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return Prepared(attend)


def sage_attention(batch: Batch, major: int) -> Prepared:
    """The original SageAttention, release 1 (Triton) or 2 (CUDA). Quantizing all of K and V is part of each call."""
    version = importlib.metadata.version("sageattention")
    if min(int(version.split(".")[0]), 2) != major:
        raise Unfit(f"sageattention {version} is installed, which is another release")
    query, key, value = whole_prompt(batch)  # a copy of its own: release 1 subtracts the mean of K in place
    if major == 1:
        from sageattention import sageattn as kernel  # type: ignore[import-not-found]
    else:
        from sageattention import sageattn_qk_int8_pv_fp8_cuda_sm90 as kernel

    def attend() -> torch.Tensor:
        out = kernel(query, key, value, tensor_layout="HND", is_causal=True, sm_scale=batch.scale)
        return out[0].transpose(0, 1)

    return Prepared(attend)


def flashinfer(batch: Batch, fp8: bool = False) -> Prepared:
    """With the data types that vLLM's FLASHINFER backend chooses on Hopper: with an FP8 cache, Q is FP8 only for prefill."""
    import flashinfer as fi  # type: ignore[import-not-found]

    case, shape = batch.case, batch.shape
    paging = batch.paging(batch.peer_page)
    cache_dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    cache = tuple(x.contiguous() for x in filled(batch, paging, cache_dtype))
    query = batch.query.to(cache_dtype) if case.kind != "decode" else batch.query
    out = batch.poisoned()
    pages = (batch.seq_lens + paging.page - 1) // paging.page
    page_starts = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    in_table = torch.arange(paging.block_table.shape[1], device=batch.device)[None, :] < pages[:, None]
    tables = page_starts, paging.block_table[in_table], batch.seq_lens - (pages - 1) * paging.page
    sizes = shape.heads, shape.kv_heads, shape.head_dim, paging.page
    types = {"q_data_type": query.dtype, "kv_data_type": cache_dtype, "o_data_type": torch.bfloat16}
    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device=batch.device)
    if case.kind == "decode":
        wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(*tables, *sizes, sm_scale=batch.scale, **types)
    else:
        wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(batch.query_start_loc, *tables, *sizes, causal=True, sm_scale=batch.scale, **types)
    scales = {"q_scale": 1.0, "k_scale": 1.0, "v_scale": 1.0} if fp8 else {}

    def attend() -> torch.Tensor:
        wrapper.run(query, cache, out=out, **scales)
        return out

    return Prepared(attend)


@dataclass(frozen=True)
class Contender:
    """kv_bytes: of one token of one KV head, from head_dim. bound: the relative error above which something is wrong."""

    name: str
    label: str
    kv_bytes: Callable[[int], int]
    bound: float
    prepare: Callable[[Batch], Prepared]


def plain_bytes(head_dim: int, of_an_element: int) -> int:
    return 2 * head_dim * of_an_element


BF16, FP8 = partial(plain_bytes, of_an_element=2), partial(plain_bytes, of_an_element=1)
EXACT, EIGHT_BITS, FOUR_BITS = 0.02, 0.15, 0.5


def sage_contender(k_bits: int, bound: float, v_bits: int = 8) -> Contender:
    name, title = f"sage-int{k_bits}", f"SAGE, K INT{k_bits}"
    if v_bits == 4:
        name, title = f"{name}-v4", f"{title}, V 4 bits"
    formats = {"k_bits": k_bits, "v_bits": v_bits}
    return Contender(name, title, partial(sage_bytes, **formats), bound, partial(sage, **formats))


def triton_contender(name: str, cache_dtype: str, bound: float) -> Contender:
    kv_bytes = partial(vllm_triton_bytes, cache_dtype=cache_dtype)
    prepare = partial(vllm_triton, cache_dtype=cache_dtype)
    return Contender(f"triton-{name}", f"vLLM TRITON_ATTN {name.upper()}", kv_bytes, bound, prepare)


CONTENDERS = {
    contender.name: contender
    for contender in (
        sage_contender(8, EIGHT_BITS),
        sage_contender(4, FOUR_BITS),
        sage_contender(4, FOUR_BITS, v_bits=4),
        Contender("fa3-bf16", "FlashAttention-3 BF16", BF16, EXACT, flash_attention),
        Contender("fa3-fp8", "FlashAttention-3 FP8", FP8, EIGHT_BITS, partial(flash_attention, fp8=True)),
        Contender("fa3-fp8-q", "FlashAttention-3 FP8 + Q cast", FP8, EIGHT_BITS, partial(flash_attention, fp8=True, cast=True)),
        Contender("fa2-bf16", "FlashAttention-2 BF16", BF16, EXACT, partial(flash_attention, version=2)),
        Contender("cudnn-bf16", "cuDNN BF16", BF16, EXACT, cudnn),
        triton_contender("bf16", "auto", EXACT),
        triton_contender("int8", "int8_per_token_head", EIGHT_BITS),
        triton_contender("fp8", "fp8_per_token_head", EIGHT_BITS),
        triton_contender("int4", "int4_per_token_head", FOUR_BITS),
        Contender("sageattention1", "SageAttention 1", BF16, EIGHT_BITS, partial(sage_attention, major=1)),
        Contender("sageattention2", "SageAttention 2", BF16, EIGHT_BITS, partial(sage_attention, major=2)),
        Contender("flashinfer-bf16", "FlashInfer BF16", BF16, EXACT, flashinfer),
        Contender("flashinfer-fp8", "FlashInfer FP8", FP8, EIGHT_BITS, partial(flashinfer, fp8=True)),
    )
}

# --- accuracy ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Exact attention of some rows. tokens, heads: int64 [rows]; expected: float32 [rows, head_dim]."""

    tokens: torch.Tensor
    heads: torch.Tensor
    expected: torch.Tensor

    @staticmethod
    def draw(batch: Batch, rows: int = CHECKED_ROWS) -> Sample:
        """Random rows, and one of the last token: mistakes are most likely at the ends."""
        case, shape = batch.case, batch.shape
        rng = random.Random(2)
        chosen = [(len(batch.query) - 1, rng.randrange(shape.heads))]
        chosen += [(rng.randrange(len(batch.query)), rng.randrange(shape.heads)) for _ in range(rows - 1)]
        expected = []
        ends = list(itertools.accumulate(case.lengths))
        for token, head in chosen:
            request, place = divmod(token, case.queries)
            visible = slice(ends[request] - case.lengths[request], ends[request] - case.queries + place + 1)
            kv_head = head // (shape.heads // shape.kv_heads)
            logits = batch.key[visible, kv_head].float() @ batch.query[token, head].float() * batch.scale
            expected.append(torch.softmax(logits, 0) @ batch.value[visible, kv_head].float())
        tokens, heads = torch.tensor(chosen, device=batch.device).T
        return Sample(tokens, heads, torch.stack(expected))

    def error(self, out: torch.Tensor) -> float:
        """The relative L2 error of a row, as root mean square over the rows. Raises Unfit where `out` is not all finite."""
        if not torch.isfinite(out).all():
            raise Unfit("left NaN or infinity in its output")
        difference = out[self.tokens, self.heads].float() - self.expected
        return float((difference.norm(dim=-1) / self.expected.norm(dim=-1)).square().mean().sqrt())


# --- measuring --------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """GPU time of single calls, each with a cold L2 cache."""

    HEAD_START = 2_000_000
    """Cycles, about a millisecond, that the GPU spins while the host launches the call. So the GPU never waits for the host."""

    def __init__(self) -> None:
        self.flush = torch.zeros(64 << 20, dtype=torch.float32, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds(self, call: Callable[[], object]) -> float:
        self.flush.amax()  # a read: written data would be written back to memory while the call is timed
        torch.cuda._sleep(self.HEAD_START)
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


def interleaved(
    calls: dict[Any, Callable[[], object]], milliseconds: Callable[[Callable[[], object]], float], rounds: int, seconds: float
) -> dict[Any, list[float]]:
    """Time the calls in rounds. All have equal shares of the time; a call that has used up its share skips later rounds."""
    rng = random.Random(3)
    times: dict[Any, list[float]] = {key: [] for key in calls}
    share = seconds * 1e3 / max(len(calls), 1)
    for _ in range(rounds):
        remaining = [key for key in calls if len(times[key]) < LEAST_ROUNDS or sum(times[key]) < share]
        for key in rng.sample(remaining, len(remaining)):
            times[key].append(milliseconds(calls[key]))
    return times


def summary(times: Sequence[float]) -> dict[str, Any]:
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]]
    spread = {"ms": statistics.median(times), "ms_p10": deciles[0], "ms_p90": deciles[-1]}
    return {name: round(value, 5) for name, value in spread.items()} | {"rounds": len(times)}


def speed(contender: Contender, case: Case, shape: Shape, per_second: float) -> dict[str, Any]:
    """Calls per second, in the unit of the case: GB/s for decodes, else TOPS."""
    if case.kind == "decode":
        kv_bytes = sum(case.lengths) * shape.kv_heads * contender.kv_bytes(shape.head_dim)
        return {"kv_bytes": kv_bytes, "gb_per_s": round(kv_bytes * per_second / 1e9, 1)}
    return {"tops": round(case.operations(shape) * per_second / 1e12, 1)}


def figures(contender: Contender, case: Case, shape: Shape, times: Sequence[float]) -> dict[str, Any]:
    """The figures of a contender in this case, from its timings."""
    result = summary(times)
    return result | speed(contender, case, shape, 1e3 / result["ms"])


SAMPLED = "clocks.sm", "power.draw", "clocks_event_reasons.sw_power_cap"


def smi(fields: Sequence[str], form: str = "csv,noheader") -> list[str]:
    """The nvidia-smi command that prints these fields of this process's GPU."""
    uuid = torch.cuda.get_device_properties().uuid
    return ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", f"--format={form}"]


def power(samples: Sequence[str]) -> dict[str, Any]:
    """Medians of clock and power, and the share of samples in which the power limit held the clock back. Empty without usable
    samples."""
    if not samples or any(line.count(", ") != 2 or "[" in line for line in samples):  # such as [N/A], or an unknown field
        return {}
    clocks, watts, capped = zip(*(line.split(", ") for line in samples), strict=True)
    return {
        "sm_mhz": statistics.median(map(float, clocks)),
        "watts": round(statistics.median(map(float, watts)), 1),
        "power_capped": round(sum(word == "Active" for word in capped) / len(capped), 3),
    }


def sustain(call: Callable[[], object], ms: float, seconds: float) -> tuple[float, dict[str, Any]]:
    """Repeat a call without pauses for `seconds`. ms: the time of one call. Returns calls per second and `power`, both for the
    second half, when clock and power have settled."""
    calls = max(1, int(50 / ms))  # between two readings of the clock
    marks = [(0.0, 0)]
    command = [*smi(SAMPLED, "csv,noheader,nounits"), "--loop-ms=100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sampler:
        start = time.perf_counter()
        try:
            while marks[-1][0] < seconds:
                for _ in range(calls):
                    call()
                torch.cuda.synchronize()
                marks.append((time.perf_counter() - start, marks[-1][1] + calls))
        finally:
            sampler.terminate()
        samples = sampler.communicate()[0].splitlines()[:-1]  # the last line may be incomplete
    end, done = marks[-1]
    middle, before = max(mark for mark in marks[:-1] if mark[0] <= end / 2)
    return (done - before) / (end - middle), power(samples[len(samples) // 2 :])


def one_line(error: BaseException) -> str:
    """An error as one short line, with the names of files but not their folders."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", text)
    kind = "" if isinstance(error, Unfit) else type(error).__name__
    return ": ".join(part for part in (kind, text) if part)[:200]


def prepare(contender: Contender, batch: Batch, sample: Sample) -> tuple[dict[str, Any], Prepared | None]:
    """What is known before timing and, if the contender may be timed, the contender, warmed up."""
    result: dict[str, Any] = {"contender": contender.name, "label": contender.label}
    try:
        result["kv_bytes_per_token_head"] = contender.kv_bytes(batch.shape.head_dim)
        prepared = contender.prepare(batch)
        error = sample.error(prepared.attend())
        result["error"] = round(error, 6)
        if not error <= contender.bound:
            raise Unfit(f"relative error {error:.3g} exceeds {contender.bound}")
        for call in (prepared.attend, prepared.store):  # once more, to warm up
            if call:
                call()
    except Exception as error:  # whatever a peer raises is its result
        return result | {"failed": one_line(error)}, None
    return result, prepared


def measure(case: Case, contenders: Iterable[Contender], shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.cuda.empty_cache()
    batch = Batch.make(case, shape, "cuda", arguments.peer_page)
    sample = Sample.draw(batch)
    results: dict[str, dict[str, Any]] = {}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for contender in contenders:
        results[contender.name], prepared = prepare(contender, batch, sample)
        if prepared:
            calls[contender.name, "attend"] = prepared.attend
            if case.store and prepared.store:
                calls[contender.name, "store"] = prepared.store
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise RuntimeError(f"{contender.label} has left the GPU unusable: {one_line(error)}") from error
    for (name, what), times in interleaved(calls, Stopwatch().milliseconds, arguments.rounds, arguments.seconds).items():
        if what == "store":
            results[name]["store"] = summary(times)
        else:
            results[name] |= figures(CONTENDERS[name], case, shape, times)
    for (name, what), call in calls.items():
        if arguments.sustain and what == "attend":
            per_second, drawn = sustain(call, results[name]["ms"], arguments.sustain)
            results[name]["sustained"] = speed(CONTENDERS[name], case, shape, per_second) | drawn
    return case.description() | {"results": list(results.values())}


# --- standing in for other GPUs ---------------------------------------------------------------------------------------------

SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (12, 0): 99}
"""KiB that one program may use, by compute capability (CUDA C++ Programming Guide, technical specifications)."""


def stand_in(capability: tuple[int, int]) -> None:
    """Make this process's kernels those of another compute capability, with mma.sync. Before any kernel is compiled."""
    os.environ["DISABLE_MMA_V3"] = "1"  # Triton then has only mma.sync; part of the key of its cache
    from sage_kernels import device

    actual = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda *_: capability
    try:
        # They remember the answer.
        for ask in (device.fp8_path, device.is_hopper, device.multiplies_by_warp, device.dependent_launch):
            for name in ("cuda", "cuda:0"):
                ask(torch.device(name))
    finally:
        torch.cuda.get_device_capability = actual
    device.shared_memory = lambda _: SHARED_MEMORY[capability] << 10


# --- reporting --------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3])), "cudnn": str(torch.backends.cudnn.version())}
    for name in ("torch", "triton", "vllm", "sageattention", "flashinfer-python"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def device_facts() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties()
    facts: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
    asked = ["driver_version", "power.limit", "clocks.max.sm"]
    try:
        answer = subprocess.run(smi(asked), capture_output=True, text=True, timeout=20, check=True).stdout
        facts |= dict(zip(asked, (value.strip() for value in answer.strip().split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        pass  # these facts are optional
    return facts


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def table(report: dict[str, Any]) -> str:
    """All cases, the contenders of each from the fastest to the slowest; ratios are speed relative to FlashAttention-3 BF16."""
    lines = []
    for case in report["cases"]:
        if "failed" in case:
            lines += [f"  {case['case']}: not measured: {case['failed']}", ""]
            continue
        timed = sorted((result for result in case["results"] if "ms" in result), key=lambda result: result["ms"])
        baseline = next((result["ms"] for result in timed if result["contender"] == BASELINE), None)
        decoding, storing = case["kind"] == "decode", any("store" in result for result in timed)
        sustained = any("sustained" in result for result in timed)
        unit, rate = ("GB/s", "gb_per_s") if decoding else ("TOPS", "tops")
        header = [case["case"], "ms", "p10 - p90", unit, *(["MB of KV"] if decoding else [])]
        header += ["vs FA3 BF16", "error", "KV B/token/head", *(["store ms", "of attention"] if storing else [])]
        header += [f"sustained {unit}", "MHz", "W"] if sustained else []
        rows = [header]
        for result in timed:
            row = [result["label"], f"{result['ms']:.3f}", f"{result['ms_p10']:.3f} - {result['ms_p90']:.3f}"]
            row += [f"{result[rate]:.0f}", *([f"{result['kv_bytes'] / 1e6:.1f}"] if decoding else [])]
            row += [f"{baseline / result['ms']:.2f}x" if baseline else "", f"{result['error']:.4f}"]
            row.append(str(result["kv_bytes_per_token_head"]))
            if storing:
                store = result.get("store")
                row += [f"{store['ms']:.3f}", f"{store['ms'] / result['ms']:.1%}"] if store else ["", ""]
            if sustained:
                steady = result.get("sustained", {})
                row += [f"{steady[name]:.0f}" if name in steady else "" for name in (rate, "sm_mhz", "watts")]
            rows.append(row)
        lines += aligned(rows)
        lines += [f"  {result['label']}: not timed: {result['failed']}" for result in case["results"] if "failed" in result]
        lines.append("")
    return "\n".join(lines).rstrip()


def run(arguments: argparse.Namespace) -> None:
    if torch is None or not torch.cuda.is_available():
        sys.exit("attention.py run: needs an NVIDIA GPU, and torch sees none here; `plot` works without")
    if arguments.sustain and not shutil.which("nvidia-smi"):
        sys.exit("attention.py run: --sustain needs nvidia-smi, which is not in PATH")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_float32_matmul_precision("highest")
    if arguments.as_if:
        stand_in(arguments.as_if)
    shape = Shape(arguments.heads, arguments.kv_heads, arguments.head_dim)
    report: dict[str, Any] = {
        "command": command_line("benchmarks/attention.py", arguments.words),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_facts(),
        "versions": versions(),
        "shape": vars(shape),
        "peer_page": arguments.peer_page,
        **({"as_if": ".".join(map(str, arguments.as_if))} if arguments.as_if else {}),
        "cases": [],
    }
    for case in cases(arguments):
        try:
            measured = measure(case, [CONTENDERS[name] for name in arguments.contenders], shape, arguments)
        except RuntimeError as error:  # out of memory, or a device that a contender has left unusable
            measured = case.description() | {"results": [], "failed": one_line(error)}
        timed = sum("ms" in result for result in measured["results"])
        print(f"{case.name}: timed {timed} of {len(arguments.contenders)} contenders", file=sys.stderr, flush=True)
        report["cases"].append(measured)
        if arguments.out:  # after each case, so that a later failure loses nothing
            save(report, arguments.out)
    print(table(report))
    if not any("ms" in result for case in report["cases"] for result in case["results"]):
        sys.exit("attention.py run: nothing could be timed")


# --- figures ----------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colors, which the color-blind can distinguish, one for each family of kernels. Markers show the formats.
COLORS = {
    "sage": "#D55E00",
    "fa3": "#000000",
    "fa2": "#555555",
    "cudnn": "#999999",
    "triton": "#0072B2",
    "sageattention1": "#009E73",
    "sageattention2": "#56B4E9",
    "flashinfer": "#CC79A7",
}
MARKERS = {"bf16": "o", "fp8": "s", "fp8-q": "D", "int8": "^", "int4": "v"}
LINES = {"bf16": "-", "fp8": "--", "fp8-q": ":", "int8": "-", "int4": "--"}


def style(name: str) -> dict[str, Any]:
    family, _, number = name.partition("-")
    ours = family == "sage"
    return {
        "color": COLORS.get(family, "#E69F00"),
        "marker": MARKERS.get(number, "P"),
        "linestyle": LINES.get(number, "-."),
        "linewidth": 2.6 if ours else 1.5,
        "markersize": 8 if ours else 6,
        "zorder": 3 if ours else 2,
    }


def by_contender(cases: Iterable[dict[str, Any]], key: str) -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """(case, result) pairs of each contender that has `key`, contenders in the order of the report."""
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for case in cases:
        for result in case["results"]:
            if key in result and "failed" not in result:
                found.setdefault(result["contender"], []).append((case, result))
    return found


def short(count: int) -> str:
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def plot_prefill(plt: Any, report: dict[str, Any]) -> Any | None:
    single = [case for case in report["cases"] if case["kind"] == "prefill" and case["batch"] == 1]
    prompts = sorted(single, key=lambda case: case["length"])
    if not (found := by_contender(prompts, "tops")):
        return None
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    for name, pairs in found.items():
        lengths, speeds = [case["length"] for case, _ in pairs], [result["tops"] for _, result in pairs]
        axes.plot(lengths, speeds, label=pairs[0][1]["label"], **style(name))
    axes.set_xscale("log", base=2)
    axes.set_xticks([case["length"] for case in prompts], [short(case["length"]) for case in prompts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens of the prompt", ylabel="TOPS, causal pairs only", title="Prefill of one prompt")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def plot_decode(plt: Any, report: dict[str, Any]) -> Any | None:
    batches = [case for case in report["cases"] if case["kind"] == "decode" and by_contender([case], "ms")]
    if not batches:
        return None
    columns = min(2, len(batches))
    rows = -(-len(batches) // columns)
    most = max(len(by_contender([case], "ms")) for case in batches)
    figure, grid = plt.subplots(
        rows, columns, figsize=(6.5 * columns, (0.34 * most + 1.2) * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(batches) :]:
        axes.set_visible(False)
    for axes, case in zip(grid.flat, batches, strict=False):
        timed = sorted((pairs[0][1] for pairs in by_contender([case], "ms").values()), key=lambda result: -result["ms"])
        longest = max(result["ms_p90"] for result in timed)
        for place, result in enumerate(timed):
            around = [[result["ms"] - result["ms_p10"]], [result["ms_p90"] - result["ms"]]]
            color = style(result["contender"])["color"]
            axes.barh(place, result["ms"], color=color, xerr=around, ecolor="#555555", height=0.72)
            text = f"{result['ms']:.3f} ms, {result['gb_per_s']:.0f} GB/s"
            axes.text(result["ms_p90"] + longest * 0.015, place, text, va="center", fontsize=8)
        axes.set_yticks(range(len(timed)), [result["label"] for result in timed], fontsize=9)
        axes.set_xlim(0, longest * 1.38)
        axes.set_xlabel("ms a layer (bar: median, whisker: p10 to p90)", fontsize=9)
        requests = "1 request" if case["batch"] == 1 else f"{case['batch']} requests"
        sizes = f"{requests} of {short(case['length'])} tokens"
        if case.get("others"):
            sizes = f"1 request of {short(case['length'])} tokens, {case['batch'] - 1} of {short(case['others'])}"
        axes.set_title(f"Decode, {sizes}", fontsize=11)
        axes.grid(visible=False, axis="y")
    return figure


def plot_error(plt: Any, report: dict[str, Any]) -> Any | None:
    if not (found := by_contender(report["cases"], "error")):
        return None
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    for name, pairs in found.items():
        errors = [result["error"] for _, result in pairs]
        middle = statistics.median(errors)
        around = [[middle - min(errors)], [max(errors) - middle]]
        looks = style(name) | {"linestyle": "none"}
        axes.errorbar(pairs[0][1]["kv_bytes_per_token_head"], middle, around, label=pairs[0][1]["label"], capsize=3, **looks)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set(xlabel="bytes of KV cache per token and KV head, scales included", title="Accuracy and memory")
    axes.set_ylabel("relative L2 error of the output\n(median and range over the cases)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def plot(arguments: argparse.Namespace) -> None:
    try:
        report = json.loads(arguments.file.read_text())
        cases, device, shape = report["cases"], report["device"]["name"], report["shape"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"attention.py plot: {arguments.file} is not a report of `run` ({one_line(error)})")
    try:
        import matplotlib  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        sys.exit("attention.py plot: needs matplotlib (pip install matplotlib, or this package's extra `bench`)")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    looks = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
    footnote = f"{device}; {shape['heads']} heads, {shape['kv_heads']} KV heads of {shape['head_dim']}; {report['date'][:10]}"
    for kind, draw in (("prefill", plot_prefill), ("decode", plot_decode), ("error", plot_error)):
        with plt.rc_context(looks):
            if (figure := draw(plt, report)) is None:
                continue
            figure.supxlabel(footnote, fontsize=8, color="#555555")
            path = arguments.file.with_name(f"{arguments.file.stem}-{kind}.png")
            figure.savefig(path, dpi=160)
            plt.close(figure)
            print(path)
    if not cases:
        sys.exit(f"attention.py plot: {arguments.file} holds no cases")


# --- command line -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def pair(text: str, form: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}, two positive integers")
    return int(match[1]), int(match[2])


def stand_in_capability(text: str) -> tuple[int, int]:
    known = {f"{major}.{minor}": (major, minor) for major, minor in SHARED_MEMORY}
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
    return known[text]


def prompts(text: str) -> Case:
    batch, length = pair(text, form="BxS") if "x" in text else (1, positive(text))
    return Case("prefill", batch, length, length)


def decode_case(text: str) -> Case:
    longest, plus, rest = text.rpartition("+")
    batch, length = pair(rest, form="BxS")
    return Case("decode", batch + 1, 1, positive(longest), others=length) if plus else Case("decode", batch, 1, length)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="attention.py", description="Compare paged attention kernels on one GPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    of_run = commands.add_parser("run", help="measure on this machine's GPU")
    some: dict[str, Any] = {"nargs": "+", "default": []}
    of_run.add_argument("--prefill", type=prompts, **some, metavar="[Bx]S", help="one prompt of S tokens, or B of them")
    of_run.add_argument("--store", type=positive, **some, metavar="TOKENS", help="one prompt and writing its KV")
    of_run.add_argument("--chunk", type=partial(pair, form="QxH"), **some, metavar="QxH", help="Q tokens after a history of H")
    of_run.add_argument(
        "--decode", type=decode_case, **some, metavar="[L+]BxS", help="a token for B requests of S tokens (and one of L)"
    )
    of_run.add_argument("--contenders", nargs="+", default=list(CONTENDERS), metavar="NAME", help=f"of {', '.join(CONTENDERS)}")
    of_run.add_argument("--heads", type=positive, default=32)
    of_run.add_argument("--kv-heads", type=positive, default=8)
    of_run.add_argument("--head-dim", type=positive, default=128)
    of_run.add_argument("--peer-page", type=positive, default=64, help="tokens of the other contenders' pages (default: 64)")
    of_run.add_argument("--as-if", type=stand_in_capability, metavar="X.Y", help="stand in for another compute capability")
    of_run.add_argument("--rounds", type=positive, default=25)
    of_run.add_argument("--seconds", type=positive, default=60, help="GPU time for the timings of a case (default: 60)")
    of_run.add_argument("--sustain", type=positive, metavar="S", help="also run each contender for S seconds without pauses")
    of_run.add_argument("--out", type=Path, help="JSON file for the results")
    of_plot = commands.add_parser("plot", help="draw the figures of a report, as PNG files next to it")
    of_plot.add_argument("file", type=Path, metavar="FILE.json")
    arguments = parser.parse_args(words)
    arguments.words = list(words)
    if arguments.command == "run":
        if not cases(arguments):
            of_run.error("nothing to do: give --prefill, --store, --chunk or --decode")
        if unknown := [name for name in arguments.contenders if name not in CONTENDERS]:
            of_run.error(f"unknown contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
        if arguments.heads % arguments.kv_heads:
            of_run.error(f"--heads {arguments.heads} is not a multiple of --kv-heads {arguments.kv_heads}")
    return arguments


def cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases of the command line. `--store N` implies `--prefill N`, because its time is compared with that."""
    stored = [Case("prefill", 1, length, length) for length in arguments.store]
    return [
        *(replace(case, store=case in stored) for case in dict.fromkeys([*arguments.prefill, *stored])),
        *(Case("chunk", 1, queries, queries + history) for queries, history in dict.fromkeys(arguments.chunk)),
        *dict.fromkeys(arguments.decode),
    ]


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(sys.argv[1:] if words is None else words)
    {"run": run, "plot": plot}[arguments.command](arguments)


if __name__ == "__main__":
    main()

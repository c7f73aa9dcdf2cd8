# SPDX-License-Identifier: Apache-2.0
"""What attention functions take besides tensors: a step's requests, a layer's variant of attention, and its calibration."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch


@dataclass(frozen=True)
class RopeShift:
    """How far queries are rotated for each page, so that the page is read as if it were nearer.

    InfLLM (Xiao et al., NeurIPS 2024, section 3.2) reads distant pages at positions that the model was trained for. A query
    that is rotated back by n pages has the same logits as keys that were stored n pages later.

    pages: int32 [requests, kv_heads, pages], the shift in pages, entry by entry of a block table. table: float32 [max_pages,
    head_dim], the cosines of a shift's angles and, in the second half of the channels, their sines
    (`reference.rope_shift_table`).
    """

    pages: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True)
class PagedBatch:
    """The requests of a step and where their KV pages are. Built once a step; all layers share it.

    Request r owns query rows query_start_loc[r] to query_start_loc[r + 1]. They are the last of its seq_lens[r] tokens.

    block_table: int32 [requests, pages], or [requests, kv_heads, pages] where each KV head reads its own pages.
    seq_lens: int32 [requests], tokens of a request, its query tokens included.
    query_start_loc: int32 [requests + 1], ascending.
    max_query_len: upper bound on the query tokens of a request. `attend_decode` sizes its tiles by it; None: 1.
    max_seq_len: upper bound on seq_lens. It saves scratch memory where 4-bit codes are widened; None: what block_table holds.
    rope_shift: set where pages are read at other positions than their own (see `select_pages`).
    topk_pages: int32 [requests], how many pages `select_pages` recalls for each, up to the memory's most_pages, or
        `sage_paged.ALL_PAGES`; None: the memory's topk_pages for all.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    max_query_len: int | None = None
    max_seq_len: int | None = None
    rope_shift: RopeShift | None = None
    topk_pages: torch.Tensor | None = None

    @property
    def num_requests(self) -> int:
        return self.seq_lens.numel()

    @property
    def table_strides(self) -> tuple[int, int]:
        """Strides of block_table, in elements, from one request to the next and from one KV head to the next."""
        return self.block_table.stride(0), self.block_table.stride(1) if self.block_table.dim() == 3 else 0

    def requests(self, start: int, stop: int | None = None, *, max_query_len: int | None = None,
                 max_seq_len: int | None = None) -> "PagedBatch":  # fmt: skip
        """The requests from `start` up to `stop`, as views of the same tensors. Bounds that are None are kept."""
        stop = self.num_requests if stop is None else stop
        return replace(
            self,
            block_table=self.block_table[start:stop],
            seq_lens=self.seq_lens[start:stop],
            query_start_loc=self.query_start_loc[start : stop + 1],
            max_query_len=self.max_query_len if max_query_len is None else max_query_len,
            max_seq_len=self.max_seq_len if max_seq_len is None else max_seq_len,
            rope_shift=self.rope_shift and RopeShift(self.rope_shift.pages[start:stop], self.rope_shift.table),
            topk_pages=None if self.topk_pages is None else self.topk_pages[start:stop],
        )

    def to(self, device: torch.device | str) -> "PagedBatch":
        """The same batch with all tensors on `device`."""
        shift = self.rope_shift
        return replace(
            self,
            block_table=self.block_table.to(device),
            seq_lens=self.seq_lens.to(device),
            query_start_loc=self.query_start_loc.to(device),
            rope_shift=shift and RopeShift(shift.pages.to(device), shift.table.to(device)),
            topk_pages=None if self.topk_pages is None else self.topk_pages.to(device),
        )


@dataclass(frozen=True)
class LayerCalibration:
    """What is done to a layer's keys and values before they are quantized, and undone in attention. Attention is the same with
    and without; its quantization error is not.

    A page stores (key - k_anchor) / equalizer, in `order`, and value - v_anchor, quantized. Queries are multiplied by the
    equalizer, and take the same order. Pages must be read with the calibration that they were stored with.

    k_anchor: float32 [kv_heads, head_dim], subtracted from keys (smoothing: SageAttention, section 4.2); None for none.
    equalizer: float32 [kv_heads, head_dim], positive, the same for both channels of a RoPE pair. It moves magnitude from key
        channels to query channels, as SmoothQuant (Xiao et al., ICML 2023) does from activations to weights; None for none.
    order: int32 [kv_heads, head_dim // 2], a permutation of the RoPE pairs of each head, for INT4 keys: position i of the
        lower and of the upper half of a stored key holds channels order[i] and order[i] + head_dim // 2. The first
        `sage_paged.GROUP_BYTES` pairs have 8 bits. None for the model's own order. INT8 keys do not use it.
    v_anchor: float32 [kv_heads, head_dim], subtracted from values (SageAttention2); None for none.
    """

    k_anchor: torch.Tensor | None = None
    equalizer: torch.Tensor | None = None
    order: torch.Tensor | None = None
    v_anchor: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "LayerCalibration":
        """The same calibration with all tensors on `device`."""
        return self._of_each(lambda x: x.to(device))

    def check(self, kv_heads: int, head_dim: int) -> None:
        """Raises ValueError for tensors of another shape or dtype than those of a layer of this shape, or not contiguous."""
        if (kv_heads, head_dim) in self._checked:  # it is asked for in every call, and shapes do not change
            return
        for name, dtype, wanted in (
            ("k_anchor", torch.float32, (kv_heads, head_dim)),
            ("equalizer", torch.float32, (kv_heads, head_dim)),
            ("order", torch.int32, (kv_heads, head_dim // 2)),
            ("v_anchor", torch.float32, (kv_heads, head_dim)),
        ):
            x = getattr(self, name)
            if x is not None and (x.dtype is not dtype or tuple(x.shape) != wanted or not x.is_contiguous()):
                kind = str(dtype).removeprefix("torch.")
                raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be {kind} {list(wanted)}, contiguous")
        self._checked.add((kv_heads, head_dim))

    @cached_property
    def _checked(self) -> set[tuple[int, int]]:
        """The shapes that have passed `check`."""
        return set()

    @cached_property
    def without_k_anchor(self) -> "LayerCalibration":
        return replace(self, k_anchor=None)

    def for_keys(self, k_bits: int) -> "LayerCalibration":
        """The part that keys of k_bits are stored with: only INT4 keys have an order."""
        return self if k_bits == 4 or self.order is None else replace(self, order=None)

    def heads(self, kv: slice) -> "LayerCalibration":
        """The calibration of some KV heads alone."""
        return self._of_each(lambda x: x[kv])

    def _of_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LayerCalibration":
        tensors = self.k_anchor, self.equalizer, self.order, self.v_anchor
        return LayerCalibration(*(None if x is None else change(x) for x in tensors))


NOT_CALIBRATED = LayerCalibration()


@dataclass(frozen=True)
class Modifiers:
    """What a layer's attention has besides softmax(scale Q K^T) V.

    window: sliding window in tokens: a query sees itself and the window - 1 tokens before it; 0 for all.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap); 0.0 for none.
    sinks: float [heads], logits of an extra key without a value (attention sinks); None for none.
    calibration: the one that keys and values were stored with.
    q_block: query smoothing (SageAttention2, section 3.2): queries are quantized less the mean of their block of this many
        tokens, counted from a request's first query. 0 for none. Kernels support `api.smoothing_block` only.
    """

    window: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    calibration: LayerCalibration = NOT_CALIBRATED
    q_block: int = 0

    def calibration_for(self, batch: PagedBatch, k_bits: int) -> LayerCalibration:
        """The part of the calibration that attention to `batch`, in pages with keys of k_bits, needs.

        Without the anchor of keys, all logits of a row lack the same number, which softmax ignores; a soft cap, sinks and a
        RopeShift do not.
        """
        needs_whole_logits = self.soft_cap > 0 or self.sinks is not None or batch.rope_shift is not None
        own = self.calibration.for_keys(k_bits)
        return own if needs_whole_logits or own.k_anchor is None else own.without_k_anchor

    def to(self, device: torch.device | str) -> "Modifiers":
        """The same modifiers with all tensors on `device`."""
        sinks = None if self.sinks is None else self.sinks.to(device)
        return replace(self, sinks=sinks, calibration=self.calibration.to(device))

    def heads(self, kv: slice, group: int) -> "Modifiers":
        """The modifiers of some KV heads alone, each with `group` query heads."""
        sinks = None if self.sinks is None else self.sinks[kv.start * group : kv.stop * group]
        return replace(self, sinks=sinks, calibration=self.calibration.heads(kv))

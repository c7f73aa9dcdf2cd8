# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer on quantized KV pages."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl

from sage_backend import BACKEND, options
from sage_backend.engine.metadata import Phase, SageMetadata
from sage_backend.features import calibration_file, observers, positions
from sage_backend.observability.definitions import DECODE
from sage_kernels import (
    LayerCalibration,
    Memory,
    Modifiers,
    PageCache,
    PagedBatch,
    PageLayout,
    attend_decode,
    attend_prefill,
    fetch_pages,
    prefill_scratch_bytes,
    select_pages,
    selection_scratch_bytes,
    smoothing_block,
    store,
    store_summaries,
)
from sage_kernels.batch import NOT_CALIBRATED

logger = logging.getLogger(__name__)


class SageImpl(AttentionImpl[SageMetadata]):
    """Attention of one layer."""

    backend = BACKEND
    """How `sage_backend.features.layers` recognizes this class."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        unsupported = [name for name, value in {"alibi_slopes": alibi_slopes, **others}.items() if value not in (None, False)]
        if unsupported:
            raise ValueError(
                f"--attention-backend sage does not support {', '.join(unsupported)}, which this model's attention needs; "
                "use vLLM's default backend for it"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.group = num_heads // self.num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.window = sliding_window or 0
        self.soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.layout = options.current().layout(head_size)
        self.smooth_q = options.current().smooth_q
        self.calibration_file = options.current().calibration
        self.observer: observers.Observer | None = None
        """Sees what this layer stores and attends to, if there is one."""
        self.calibration = NOT_CALIBRATED
        """What this layer's keys and values are stored with. Allocated when the first tokens are stored."""
        self.memory_options = None if self.window else options.current().memory
        """How long contexts are read; None in layers with a sliding window. See also `memory_of`."""
        self.cache: PageCache | None = None
        """What the GPU holds of the pages, if they are in host memory (`sage_backend.engine.host_pages` sets it)."""
        self.frequencies: tuple[float, ...] = ()
        """RoPE frequencies, radians a position, if pages are rotated (`sage_backend.features.positions` sets them)."""
        self.max_pages = 0
        """Pages of the longest context, if pages are rotated."""
        config = get_current_vllm_config_or_none()
        self.max_num_seqs: int = config.scheduler_config.max_num_seqs if config else 0
        """Requests of a step, at most."""
        self.max_model_len: int = config.model_config.max_model_len if config else 0
        """Tokens of a context, at most."""
        self.drafts = False
        """Whether this is a layer of a drafter (`sage_backend.engine.patches.load_model` sets it)."""

    @property
    def rotates_pages(self) -> bool:
        """Whether distant pages are read at other RoPE positions than their own."""
        return self.memory_options is not None and bool(self.memory_options.extrapolate)

    def calibrate(self, found: LayerCalibration, device: torch.device) -> None:
        """Store keys and values with `found` from now on, as far as the options ask for it. No stored key may still be needed.

        The tensors of keys stay where they are: CUDA graphs may have been captured with them. So do those of values, for which
        there is a kernel of its own: a `found` with an anchor of values must come before the first graph.
        """
        chosen, shape = options.current(), (self.num_kv_heads, self.head_size)
        if self.calibration is NOT_CALIBRATED:
            pairs = torch.arange(self.head_size // 2, dtype=torch.int32, device=device)
            self.calibration = LayerCalibration(
                torch.zeros(shape, device=device) if chosen.smooth_k else None,
                torch.ones(shape, device=device) if chosen.equalize else None,
                pairs.repeat(shape[0], 1) if chosen.equalize and self.layout.k_bits == 4 else None,
                found.v_anchor.to(device) if chosen.smooth_v and found.v_anchor is not None else None,
            )
        own = self.calibration
        for target, source in ((own.k_anchor, found.k_anchor), (own.equalizer, found.equalizer), (own.order, found.order)):
            if target is not None and source is not None:
                target.copy_(source)

    def _allocate_calibration(self, layer: Any, device: torch.device) -> None:
        """Allocate this layer's calibration: from the user's file, or else neutral, for `sage_backend.engine.start_calibration`
        to fill when the engine is about to be ready."""
        found = NOT_CALIBRATED
        if self.calibration_file is not None:
            worker = self.num_kv_heads, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            found = calibration_file.calibration(self.calibration_file, layer.layer_name, *worker)
            if found.k_anchor is None:  # a layer of a drafter, which is a model of its own
                logger.warning("%s has nothing for %s, whose keys stay as they are", self.calibration_file, layer.layer_name)
        self.calibrate(found, device)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Quantize new tokens and write them into their pages.

        key, value: [tokens, kv_heads, head_size], of which the first slot_mapping.numel() count; kv_cache: [blocks, kv_heads,
        page_tokens, content] in the model's dtype.
        """
        if kv_cache.numel() == 0:  # the profiling run has no cache yet
            return
        if self.calibration is NOT_CALIBRATED:
            # Not earlier: tensors that are allocated with the weights or with the KV cache do not survive sleep mode. And not
            # in a CUDA graph: vLLM runs every batch once before it captures it.
            self._allocate_calibration(layer, key.device)
        tokens = slot_mapping.numel()
        key, value = key[:tokens], value[:tokens]
        if self.observer is not None:
            self.observer.stored(key, value, slot_mapping)
        store(key, value, self.layout.pages(kv_cache), slot_mapping, self.layout, self.calibration, self.cache)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SageMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend. query, output: [tokens, heads, head_size], of which the first attn_metadata.num_tokens count. Returns
        output."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("--attention-backend sage does not quantize its output; disable the fusion pass")
        if attn_metadata is None or kv_cache.numel() == 0:
            return self._profile(query, output)
        step = attn_metadata
        pages = self.layout.pages(kv_cache)
        query, out = query[: step.num_tokens], output[: step.num_tokens]
        owner = self._owner(layer)
        # Before host pages are allocated, vLLM measures its graphs in a small cache, and there are no summaries yet.
        summarizes = self.memory_options is not None and (owner.cache is not None or self.layout.has_summary)
        memory = self.memory_of(layer) if summarizes else None
        modifiers = self._modifiers(owner, query.device)

        if summarizes and owner is self:  # also in one of dense_layers: layers that share its keys may not be among them
            table = self._shift_table(query.device)
            store_summaries(pages, self.layout, step.batch, step.num_tokens, table, owner.calibration, owner.cache)
        for phase in step.phases:
            with step.observer.timed(phase.name, layer, query.device):
                batch = self._select_pages(memory, query, pages, phase, step, owner.cache)
                for held, part in self._held(pages, batch, owner.cache, step.max_seq_len):
                    if phase.name == DECODE:
                        attend_decode(query, held, self.layout, part, self.scale, out, modifiers, step.workspace)
                    else:
                        attend_prefill(query, held, self.layout, part, self.scale, out, modifiers)
            if batch is not phase.batch:
                queries = query[phase.first_token :]
                step.observer.selected(phase.name, layer, queries, pages, phase.batch, batch, owner.calibration)
        step.observer.attended(layer, self, query, key, value, out)
        return output

    def _profile(self, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Answer vLLM's profiling run, which has no cache yet, with zeros, and allocate what a step allocates: vLLM leaves the
        peak of this run free when it sizes the cache."""
        scratch = prefill_scratch_bytes(query.device, self.layout, self.group, self.smooth_q, self.rotates_pages)
        if self.memory_options is not None:
            tokens, pages = len(query), -(-self.max_model_len // self.layout.tokens)
            batch = min(tokens, self.max_num_seqs), self.num_kv_heads, pages
            scratch += selection_scratch_bytes(query.device, self.layout, self.memory_options.policy, tokens, *batch)
        torch.empty(scratch, dtype=torch.uint8, device=query.device)
        return output.zero_()

    def _owner(self, layer: Any) -> "SageImpl":
        """The layer that stores the keys and values which this layer reads: itself, unless it shares them."""
        target = layer.kv_sharing_target_layer_name
        return self if target is None else get_forward_context().no_compile_layers[target].impl

    def _modifiers(self, owner: "SageImpl", device: torch.device) -> Modifiers:
        return Modifiers(self.window, self.soft_cap, self.sinks, owner.calibration, self.q_block(device, self.layout))

    def q_block(self, device: torch.device, layout: PageLayout) -> int:
        """The `Modifiers.q_block` of this layer with pages of `layout`: 0 without the option smooth_q."""
        return smoothing_block(device, layout, self.group) if self.smooth_q else 0

    def _select_pages(
        self, memory: Memory | None, query: torch.Tensor, pages: torch.Tensor, phase: Phase, step: SageMetadata,
        cache: PageCache | None,
    ) -> PagedBatch:  # fmt: skip
        """What to attend to: the phase's batch, or the pages of it that memory selects."""
        if memory is None or memory.reads_all(self.layout.tokens, step.max_seq_len, step.least_topk):
            return phase.batch
        query_block = 0 if phase.name == DECODE else memory.query_block
        shift_table = self._shift_table(query.device)
        return select_pages(query, pages, self.layout, phase.batch, memory, query_block, shift_table, cache)

    def _held(
        self, pages: torch.Tensor, batch: PagedBatch, cache: PageCache | None, max_seq_len: int
    ) -> Iterator[tuple[torch.Tensor, PagedBatch]]:
        """Pages that the GPU holds and a batch to attend to in them: all of `batch` in `pages`, or, with a cache, its rows in
        the cache's frames, as many at a time as have room there."""
        if cache is None:
            yield pages, batch
            return
        if batch.block_table.dim() == 2:  # a block table, as wide as the longest context that could be; all contexts are short
            batch = replace(batch, block_table=batch.block_table[:, : -(-max_seq_len // self.layout.tokens)])
        rows = len(cache.frames) // batch.block_table.shape[-1]
        for first in range(0, batch.num_requests, rows):
            part = batch.requests(first, min(first + rows, batch.num_requests))
            yield cache.frames, fetch_pages(cache, pages, self.layout, part)

    def memory_of(self, layer: Any) -> Memory | None:
        """The memory policy of this layer; None if it is one of dense_layers, by the index in its name."""
        if self.memory_options is None:
            return None
        dense = self.memory_options.dense_layers  # asked first: parsing names in every step would take time
        return None if dense and extract_layer_index(layer.layer_name) in dense else self.memory_options.policy

    def _shift_table(self, device: torch.device) -> torch.Tensor | None:
        if not self.rotates_pages:
            return None
        return positions.rope_shift_table(self.frequencies, self.max_pages, self.layout.tokens, device)

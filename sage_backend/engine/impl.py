# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer on quantized KV pages."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl

from sage_backend import BACKEND, options
from sage_backend.engine.metadata import SageMetadata
from sage_backend.features import calibration_file, observers, positions
from sage_backend.observability import recorder as metrics
from sage_kernels import cpu, reference
from sage_paged import Memory

logger = logging.getLogger(__name__)

Requests = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""block_table, seq_lens and query_start_loc, as attention takes them."""


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
        self.head_size = head_size
        self.scale = float(scale)
        self.window = sliding_window or 0
        self.soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.layout = options.current().layout(head_size)
        self.smooth_k, self.smooth_v = options.current().smooth_k, options.current().smooth_v
        self.smooth_q = options.current().smooth_q
        self.calibration = options.current().calibration
        self.observer: observers.Observer | None = None
        """Sees the keys, values and queries of this layer, if there is one."""
        self.anchor: torch.Tensor | None = None
        """Subtracted from this layer's keys, float32 [kv_heads, head_size]; all NaN until the first tokens fix it."""
        self.calibrated = False
        """Whether the anchor comes from a calibration."""
        self.v_anchor: torch.Tensor | None = None
        """Subtracted from this layer's values, float32 [kv_heads, head_size], if a calibration has it."""
        self.anchors_made = False
        """Whether both anchors have been set, if only to None."""
        self.memory = None if self.window else options.current().memory
        """The option `memory`, unless the layer has a sliding window. `memory_of` also respects dense layers."""
        self.frequencies: tuple[float, ...] = ()
        """RoPE frequencies, radians a position, if pages are rotated (`sage_backend.features.positions` sets them)."""
        self.max_pages = 0
        """Pages of the longest context, if pages are rotated."""

    @property
    def rotates_pages(self) -> bool:
        """Whether keys are read at other positions than their own."""
        return self.memory is not None and bool(self.memory.extrapolate)

    def smoothing_of_prompts(self, device_: torch.device) -> dict[str, Any]:
        """The arguments by which prefill kernels on a device smooth queries; none if queries are not smoothed."""
        if not self.smooth_q:
            return {}
        if device_.type == "cpu":
            return {"q_block": reference.tile_tokens(self.num_heads // self.num_kv_heads)}
        return {"smooth_q": True}

    @torch.inference_mode()  # in which it was allocated
    def forget_anchor(self) -> None:
        """Let the next tokens fix the anchor again, unless it comes from a calibration. Keys that are stored become invalid."""
        if self.anchor is not None and not self.calibrated:
            self.anchor.fill_(torch.nan)

    def make_anchors(self, layer: Any, device_: torch.device) -> None:
        """Take the anchors from the calibration, if there is one. Otherwise the first tokens will fix that of keys."""
        self.anchors_made = True
        if self.smooth_k:
            shape = self.num_kv_heads, self.head_size
            self.anchor = torch.full(shape, torch.nan, dtype=torch.float32, device=device_)
        if self.calibration is None:
            return
        worker = self.num_kv_heads, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        found, v_found = calibration_file.anchors(self.calibration, layer.layer_name, *worker)
        if self.smooth_v and v_found is not None:
            self.v_anchor = v_found.to(device_)
        if self.anchor is not None and found is not None:
            self.anchor.copy_(found)
            self.calibrated = True
        elif self.anchor is not None:  # a layer of a drafter, which is a model of its own
            logger.warning("%s has no anchor for %s; the first tokens will fix it", self.calibration, layer.layer_name)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write new tokens into their pages. key, value: [tokens, kv_heads, head_size], of which the first
        slot_mapping.numel() count; kv_cache: [blocks, kv_heads, page_tokens, content] in the model's dtype."""
        if kv_cache.numel() == 0:  # the profiling run has no cache yet
            return
        if not self.anchors_made:
            # Not earlier: tensors that are allocated with the weights or with the KV cache do not survive sleep mode. And not
            # in a CUDA graph: vLLM runs every batch once before it captures it.
            self.make_anchors(layer, key.device)
        tokens = slot_mapping.numel()
        pages = self.layout.pages(kv_cache)
        if self.observer is not None:
            self.observer.stored(key[:tokens], value[:tokens], slot_mapping)
        if key.device.type == "cpu":
            store = reference.store
        else:
            from sage_kernels.store import store  # needs Triton, which a CPU build of vLLM lacks

        store(key[:tokens], value[:tokens], pages, slot_mapping, self.layout, self.anchor, self.v_anchor)

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
        """Attend. query, output: [tokens, heads, head_size], of which the first attn_metadata.num_tokens count."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("--attention-backend sage does not quantize its output; disable the fusion pass")
        if attn_metadata is None or kv_cache.numel() == 0:  # profiling and warm-up
            if query.device.type != "cpu":
                from sage_kernels.prefill import scratch_bytes  # needs Triton

                # vLLM looks how much is in use at most, and leaves that free when it makes the cache.
                scratch = scratch_bytes(query.device, self.layout, self.num_heads // self.num_kv_heads, self.smooth_q)
                torch.empty(scratch, dtype=torch.uint8, device=query.device)
            return output.zero_()
        m = attn_metadata
        pages = self.layout.pages(kv_cache)
        query, out = query[: m.num_tokens], output[: m.num_tokens]
        if self.observer is not None:
            self.observer.attended(query)
        memory = self.memory_of(layer)
        # The keys and values may be another layer's.
        target = layer.kv_sharing_target_layer_name
        owner = self if target is None else get_forward_context().no_compile_layers[target].impl
        anchor = owner.anchor
        mask: dict[str, Any] = {
            "window": self.window, "soft_cap": self.soft_cap, "sinks": self.sinks, "v_anchor": owner.v_anchor,
        }  # fmt: skip
        if self.soft_cap or self.sinks is not None or self.rotates_pages:
            mask["anchor"] = anchor  # elsewhere, attention comes out the same with any
        decode: Callable[..., None]
        prefill: Callable[..., None]
        how: dict[str, Any] = {}
        most = self.smoothing_of_prompts(query.device)  # decodes are blocks of a token or a few: there is nothing to smooth
        if query.device.type == "cpu":
            decode = prefill = cpu.attention
        else:
            from sage_kernels.decode import decode  # need Triton
            from sage_kernels.prefill import prefill

            how = {"max_query_len": m.max_decode_query_len, "workspace": m.workspace}
            most["max_seq_len"] = m.max_prefill_len
        n = m.num_decodes
        decodes: Requests = m.block_table[:n], m.seq_lens[:n], m.query_start_loc[: n + 1]
        prefills: Requests = m.block_table[n:], m.seq_lens[n:], m.query_start_loc[n:]
        if memory is not None and target is None:
            self.store_summaries(pages, m, anchor)
        reading = None if memory is None or memory.reads_all(self.layout.tokens, m.max_seq_len) else memory
        if n:
            q = query[: m.num_decode_tokens]
            with metrics.timed(m.sample, "decode", layer, query.device):
                if reading is not None:
                    decodes, mask["turns"] = self.recall(q, pages, decodes, reading, 0, m.max_decode_query_len)
                table, lengths, starts = decodes
                decode(q, pages, self.layout, table, lengths, starts, self.scale, out[: m.num_decode_tokens], **mask, **how)
            if reading is not None and m.sample is not None:
                m.sample.cover("decode", layer, q, pages, m.block_table, m.seq_lens, decodes, anchor)
        if n < m.seq_lens.shape[0] and m.num_decode_tokens < m.num_tokens:
            with metrics.timed(m.sample, "prefill", layer, query.device):
                mask["turns"] = None
                if reading is not None:
                    prefills, mask["turns"] = self.recall(query, pages, prefills, reading, reading.query_block)
                table, lengths, starts = prefills
                prefill(query, pages, self.layout, table, lengths, starts, self.scale, out, **mask, **most)
            if reading is not None and m.sample is not None:
                q = query[m.num_decode_tokens :]
                m.sample.cover("prefill", layer, q, pages, m.block_table[n:], m.seq_lens[n:], prefills, anchor)
        if m.check is not None and m.check.layer == layer.layer_name:
            m.check.compare(self, query, key, value, out)
        return output

    def memory_of(self, layer: Any) -> Memory | None:
        """This layer's memory, None if it reads everything. layer: vLLM's Attention, whose name has the layer's index."""
        if self.memory is None:
            return None
        dense = self.memory.dense_layers  # asked first, for names are taken apart in every step
        return None if dense and extract_layer_index(layer.layer_name) in dense else self.memory.policy

    def rotation_table(self, device_: torch.device) -> torch.Tensor | None:
        if not self.rotates_pages:
            return None
        return positions.rotation_table(self.frequencies, self.max_pages, self.layout.tokens, device_)

    def store_summaries(self, pages: torch.Tensor, m: SageMetadata, anchor: torch.Tensor | None) -> None:
        rotations = self.rotation_table(pages.device)
        if pages.device.type == "cpu":
            reference.store_summaries(pages, self.layout, m.block_table, m.seq_lens, m.query_start_loc, rotations, anchor)
        else:
            from sage_kernels.recall import store_summaries  # needs Triton

            store_summaries(
                pages, self.layout, m.block_table, m.seq_lens, m.query_start_loc, m.num_tokens, rotations, anchor
            )

    def recall(
        self, query: torch.Tensor, pages: torch.Tensor, requests: Requests, memory: Memory, query_block: int,
        max_query_len: int = 1,
    ) -> tuple[Requests, reference.Turns | None]:  # fmt: skip
        """The page lists to attend to instead of the requests' block tables, and the rotations of their pages."""
        args: Any = query, pages, self.layout, *requests, memory, query_block, self.rotation_table(query.device)
        if query.device.type == "cpu":
            lists = reference.recall(*args)
        else:
            from sage_kernels.recall import recall  # needs Triton

            lists = recall(*args, max_query_len=max_query_len)
        return (lists.block_table, lists.seq_lens, lists.query_start_loc), lists.turns

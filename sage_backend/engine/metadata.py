# SPDX-License-Identifier: Apache-2.0
"""A step's batch as attention takes it, built from vLLM's common metadata."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers, split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from sage_backend import options
from sage_backend.engine.request_topk import REQUEST_TOPK, TopkTensor
from sage_backend.observability.definitions import DECODE, PREFILL
from sage_backend.observability.observer import NOT_OBSERVED, StepObserver
from sage_backend.observability.recorder import recorder
from sage_backend.variator.groups import COMPRESSOR
from sage_kernels import PagedBatch, decode_workspace, max_decode_rows


@dataclass(frozen=True)
class Phase:
    """The requests of a step that are attended to in one call. name: PREFILL or DECODE; first_token: index of its first query
    row in the step."""

    name: str
    batch: PagedBatch
    first_token: int


@dataclass
class SageMetadata(AttentionMetadata):
    """One step.

    batch: all requests; those that decode, with few query tokens each, come first. Its tensors are the runner's persistent
    ones, so that a captured graph reads the values of later steps. phases: decodes and prefills, as far as there are any.
    num_tokens: query rows, padding included. max_seq_len: upper bound on seq_lens; in a captured graph, of all steps that
    replay it. workspace: of `attend_decode`. segments: which rows FFNs compress (`sage_backend.variator`). least_topk: the
    least pages that a request has recalled, if requests have numbers of their own (`batch.topk_pages`).
    """

    batch: PagedBatch
    phases: Sequence[Phase]
    num_tokens: int
    max_seq_len: int
    workspace: Any = None
    observer: StepObserver = NOT_OBSERVED
    segments: Sequence[Any] = ()
    least_topk: int | None = None

    @classmethod
    def of(
        cls, batch: PagedBatch, num_tokens: int, num_decodes: int, num_decode_tokens: int, max_prefill_len: int | None = None,
        **others: Any,
    ) -> "SageMetadata":  # fmt: skip
        """Split a batch whose first num_decodes requests decode. batch: all requests, with max_seq_len; its max_query_len is
        that of the decodes. max_prefill_len: upper bound on the seq_lens of the other requests."""
        phases = []
        if num_decodes:
            phases.append(Phase(DECODE, batch.requests(0, num_decodes), 0))
        if num_decodes < batch.num_requests and num_decode_tokens < num_tokens:
            prefills = batch.requests(num_decodes, max_seq_len=max_prefill_len)
            phases.append(Phase(PREFILL, prefills, num_decode_tokens))
        assert batch.max_seq_len is not None
        return cls(batch, phases, num_tokens, batch.max_seq_len, **others)


class SageMetadataBuilder(AttentionMetadataBuilder[SageMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device_: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device_)
        self.kv_heads = kv_cache_spec.num_kv_heads
        self.heads = get_num_attention_heads_from_layers(vllm_config, layer_names) or self.kv_heads
        layers = vllm_config.compilation_config.static_forward_context
        self.recorder = recorder(vllm_config)
        if self.recorder is not None:
            self._record_layers(layer_names, layers, device_)
        self.compressor = layers.get(COMPRESSOR)
        self.topk = None
        if (topk := layers.get(REQUEST_TOPK)) is not None:
            self.topk = TopkTensor(topk, vllm_config.scheduler_config.max_num_seqs, device_)
        self.reorder_batch_threshold: int = max_decode_query_len(vllm_config)
        self.workspace = None
        if device_.type != "cpu":
            layout = layers[layer_names[0]].impl.layout
            limit = max(1, max_decode_rows(device_, layout) * self.kv_heads // self.heads)
            self.reorder_batch_threshold = min(self.reorder_batch_threshold, limit)
            memory = options.current().memory
            self.workspace = decode_workspace(
                device_,
                layout,
                self.reorder_batch_threshold * (self.heads // self.kv_heads),
                shifted=memory is not None and bool(memory.extrapolate),
            )

    def _record_layers(self, layer_names: list[str], layers: dict[str, Any], device: torch.device) -> None:
        assert self.recorder is not None
        names = [name for name in layer_names if not layers[name].impl.drafts]
        if not names:
            return
        remembering = [name for name in names if layers[name].impl.memory_of(layers[name]) is not None]
        sampled = layers[(remembering or names)[-1]]
        shape = sampled.impl.layout, self.kv_heads, self.heads
        self.recorder.add_layers(layer_names, sampled.layer_name, *shape, device, sampled.impl.memory_of(sampled))
        if self.recorder.canary is not None:
            owners = [name for name in names if layers[name].kv_sharing_target_layer_name is None]
            self.recorder.canary.add_layers(layer_names, owners, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SageMetadata:
        common, threshold = common_attn_metadata, self.reorder_batch_threshold
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(common, decode_threshold=threshold)
        others: dict[str, Any] = {"workspace": self.workspace}
        topk_pages, topk = None, None
        if self.topk is not None:
            topk_pages, topk = self.topk.of_step(common.seq_lens.numel())
            others["least_topk"] = min(topk)
        if not fast_build:  # vLLM's first model runner builds the steps of drafts so, which are not counted
            if self.recorder is not None:
                others["observer"] = StepObserver.of(self.recorder, self.layer_names, common, num_decodes, topk)
            if self.compressor is not None:
                others["segments"] = self.compressor.segments(common, num_decodes)
        max_prefill_len, lengths = common.max_seq_len, common.seq_lens_cpu_upper_bound
        if lengths is not None and num_decodes < lengths.numel():
            # The lengths lack what vLLM's own bound allows for: the longest context of a graph that is captured with short
            # ones, and slots that a drafter adds.
            allowed = max(0, max_prefill_len - int(lengths.max()))
            max_prefill_len = min(max_prefill_len, int(lengths[num_decodes:].max()) + allowed)
        batch = PagedBatch(
            common.block_table_tensor, common.seq_lens, common.query_start_loc, threshold, common.max_seq_len,
            topk_pages=topk_pages,
        )  # fmt: skip
        return SageMetadata.of(batch, common.num_actual_tokens, num_decodes, num_decode_tokens, max_prefill_len, **others)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> SageMetadata:
        metadata = self.build(0, common_attn_metadata)
        # The captured grid fits any length; running it at max_model_len for every captured size would take minutes.
        metadata.batch.seq_lens.fill_(self.reorder_batch_threshold)
        metadata.max_seq_len = self.vllm_config.model_config.max_model_len
        return metadata

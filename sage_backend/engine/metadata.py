# SPDX-License-Identifier: Apache-2.0
"""The metadata of a step for attention, and their builder."""

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
from sage_backend.observability.canary import Check
from sage_backend.observability.observer import NOT_OBSERVED, StepObserver
from sage_backend.observability.recorder import Sample, recorder
from sage_backend.variator.groups import COMPRESSOR


@dataclass
class SageMetadata(AttentionMetadata):
    """One step of a batch whose first `num_decodes` requests have few query tokens each.

    query_start_loc: int32 [requests + 1]; seq_lens: int32 [requests], query tokens included; block_table: int32
    [requests, blocks]. The tensors are the runner's persistent ones, so a captured graph sees the values of later steps.
    """

    num_tokens: int
    num_decodes: int
    num_decode_tokens: int
    max_decode_query_len: int
    workspace: Any
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_seq_len: int
    max_prefill_len: int
    """The largest number of tokens, cached ones included, of a request that is no decode."""
    observer: StepObserver = NOT_OBSERVED
    """Reports the step's attention to metrics and the canary."""
    segments: Sequence[Any] = ()
    """The rows that FFNs compress, if any (see `sage_backend.variator.groups.Segment`)."""

    @property
    def sample(self) -> Sample | None:
        return self.observer.sample

    @property
    def check(self) -> Check | None:
        return self.observer.check


class SageMetadataBuilder(AttentionMetadataBuilder[SageMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device_: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device_)
        self.kv_heads = kv_cache_spec.num_kv_heads
        self.heads = get_num_attention_heads_from_layers(vllm_config, layer_names) or self.kv_heads
        self.memory = options.current().memory
        self.reorder_batch_threshold: int = max_decode_query_len(vllm_config)
        self.recorder = recorder(vllm_config)
        if self.recorder is not None:
            known = vllm_config.compilation_config.static_forward_context
            owners = [name for name in layer_names if known[name].kv_sharing_target_layer_name is None]
            layout = known[layer_names[0]].impl.layout
            sampled = known[layer_names[-1]]
            memory = sampled.impl.memory_of(sampled)
            self.recorder.add_layers(layer_names, len(owners), layout, self.kv_heads, self.heads, device_, memory)
            if self.recorder.canary is not None:
                self.recorder.canary.add_layers(layer_names, owners, device_)
        self.compressor = vllm_config.compilation_config.static_forward_context.get(COMPRESSOR)
        self.workspace = None
        if device_.type != "cpu":
            from sage_kernels import decode  # needs Triton, which a CPU build of vLLM lacks

            limit = max(1, decode.MAX_ROWS * self.kv_heads // self.heads)
            self.reorder_batch_threshold = min(self.reorder_batch_threshold, limit)
            query_rows = self.reorder_batch_threshold * (self.heads // self.kv_heads)
            layout = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl.layout
            turning = self.memory is not None and bool(self.memory.extrapolate)  # in steps with long contexts
            programs = max(decode.count_programs(device_, layout, each) for each in {False, turning})
            self.workspace = decode.Workspace.allocate(programs, query_rows, kv_cache_spec.head_size, device_)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SageMetadata:
        common = common_attn_metadata
        threshold = self.reorder_batch_threshold
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(common, decode_threshold=threshold)
        observer = NOT_OBSERVED
        if self.recorder is not None and not fast_build:  # model runner V1 builds drafts' metadata with it
            observer = StepObserver(
                self.recorder.step(self.layer_names, common, num_decodes),
                self.recorder.check(self.layer_names, common, num_decodes),
            )
        segments: Sequence[Any] = ()
        if self.compressor is not None and not fast_build:
            segments = self.compressor.segments(common, num_decodes)
        max_prefill_len, lengths = common.max_seq_len, common.seq_lens_cpu_upper_bound
        if lengths is not None and num_decodes < lengths.numel():
            max_prefill_len = min(max_prefill_len, int(lengths[num_decodes:].max()))
        return SageMetadata(
            num_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            max_decode_query_len=threshold,
            workspace=self.workspace,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            max_seq_len=common.max_seq_len,
            max_prefill_len=max_prefill_len,
            observer=observer,
            segments=segments,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> SageMetadata:
        metadata = self.build(0, common_attn_metadata)
        # The captured grid fits any length; running it at max_model_len for every captured size would take minutes.
        metadata.seq_lens.fill_(metadata.max_decode_query_len)
        metadata.max_seq_len = self.vllm_config.model_config.max_model_len
        return metadata

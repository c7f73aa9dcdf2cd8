"""The attention backend: what vLLM asks of one, answered with pages of `sage_paged` and kernels of `sage_kernels`.

A step goes: vLLM's runner builds its common metadata; `SageMetadataBuilder.build` splits the batch into decodes, which stand
first, and prefills; then for each layer `do_kv_cache_update` writes the new tokens into their pages and `forward` attends.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers, split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from sage_backend import calibration, canary, checks, metrics, options, positions
from sage_backend.plugin import BACKEND, COMPRESSOR
from sage_kernels import cpu, reference
from sage_paged import Memory

logger = logging.getLogger(__name__)


class SageBackend(AttentionBackend):
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type["SageImpl"]:
        return SageImpl

    @staticmethod
    def get_builder_cls() -> type["SageMetadataBuilder"]:
        return SageMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [options.current().page_tokens]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The only one where the tokens of a (block, head) are one run of bytes and blocks can be split.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"--attention-backend sage cannot serve keys of {spec.head_size} and values of {spec.head_size_v} channels"
            )
        layout = options.current().layout(spec.head_size)
        return replace(spec, state_content_bytes=layout.bytes_per_token)

    @classmethod
    def validate_configuration(cls, *, device_capability: Any, **config: Any) -> list[str]:  # type: ignore[override]
        return checks.reasons(**config, options=options.current(), capability=device_capability)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


def choose_pages(specs: dict[str, Any], config: VllmConfig) -> dict[str, Any]:
    """A worker's KV cache specs, by layer, with the pages that a calibration has chosen. Its layers are told of them."""
    file = options.current().calibration
    chosen = calibration.k_bits(file) if file is not None else {}
    for name, layer in config.compilation_config.static_forward_context.items():
        owner = getattr(layer, "kv_sharing_target_layer_name", None) or name
        impl = getattr(layer, "impl", None)
        if owner in chosen and isinstance(impl, SageImpl):
            impl.layout = options.current().layout(impl.head_size, chosen[owner])
            if name in specs:
                specs[name] = replace(specs[name], state_content_bytes=impl.layout.bytes_per_token)
    return specs


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
    """The most tokens of a request that is no decode."""
    sample: metrics.Sample | None = None
    """What to time of this step, if anything."""
    check: canary.Check | None = None
    """What to hold against exact attention of this step, if anything."""
    segments: Sequence[Any] = ()
    """Which rows FFNs compress, if any (see `sage_backend.variator`)."""


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
        self.recorder = metrics.recorder(vllm_config)
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
            from sage_kernels import decode

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
        sample = check = None
        if self.recorder is not None and not fast_build:  # which is how vLLM's first model runner builds drafts
            sample = self.recorder.step(self.layer_names, common, num_decodes)
            check = self.recorder.check(self.layer_names, common, num_decodes)
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
            sample=sample,
            check=check,
            segments=segments,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> SageMetadata:
        metadata = self.build(0, common_attn_metadata)
        # The captured grid fits any length; running it at max_model_len for every captured size would take minutes.
        metadata.seq_lens.fill_(metadata.max_decode_query_len)
        metadata.max_seq_len = self.vllm_config.model_config.max_model_len
        return metadata


Requests = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""block_table, seq_lens and query_start_loc, as attention takes them."""


class SageImpl(AttentionImpl[SageMetadata]):
    """Attention of one layer."""

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
        self.watch: calibration.Watch | None = None
        """Is shown what this layer works on, if it is there."""
        self.anchor: torch.Tensor | None = None
        """What is subtracted from this layer's keys, float32 [kv_heads, head_size]; all NaN until the first tokens fix it."""
        self.calibrated = False
        """Whether the anchor is that of a calibration."""
        self.v_anchor: torch.Tensor | None = None
        """What is subtracted from this layer's values, float32 [kv_heads, head_size], if a calibration has it."""
        self.anchors_made = False
        """Whether both are what they have to be, which may be None."""
        self.memory = None if self.window else options.current().memory
        """What is read of long contexts, unless the layer is one of those that are left dense."""
        self.frequencies: tuple[float, ...] = ()
        self.max_pages = 0
        """Of the model's positions and of the longest context, if pages are turned (see `sage_backend.positions`)."""

    @property
    def turns_pages(self) -> bool:
        return self.memory is not None and bool(self.memory.extrapolate)

    def smoothing_of_prompts(self, device_: torch.device) -> dict[str, Any]:
        """What attention of prompts on a device takes so that queries are smoothed, if they are."""
        if not self.smooth_q:
            return {}
        if device_.type == "cpu":
            return {"q_block": reference.tile_tokens(self.num_heads // self.num_kv_heads)}
        return {"smooth_q": True}

    @torch.inference_mode()  # in which it was allocated
    def forget_anchor(self) -> None:
        """Let the next tokens fix the anchor anew, if they did. No key that is still needed may have been stored with it."""
        if self.anchor is not None and not self.calibrated:
            self.anchor.fill_(torch.nan)

    def make_anchors(self, layer: Any, device_: torch.device) -> None:
        """Take the anchors from the calibration, if there is one; that of keys is left to the first tokens elsewhere."""
        self.anchors_made = True
        if self.smooth_k:
            shape = self.num_kv_heads, self.head_size
            self.anchor = torch.full(shape, torch.nan, dtype=torch.float32, device=device_)
        if self.calibration is None:
            return
        share = self.num_kv_heads, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        found, v_found = calibration.anchors(self.calibration, layer.layer_name, *share)
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
            # Here and no earlier: what is allocated with the weights or with the KV cache does not survive sleep mode. vLLM
            # runs every batch that it captures once before, so that this is no part of a graph.
            self.make_anchors(layer, key.device)
        tokens = slot_mapping.numel()
        pages = self.layout.pages(kv_cache)
        if self.watch is not None:
            self.watch.stored(key[:tokens], value[:tokens], slot_mapping)
        if key.device.type == "cpu":
            store = reference.store
        else:
            from sage_kernels.store import store

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
                from sage_kernels.prefill import scratch_bytes

                # vLLM looks how much is in use at most, and leaves that free when it makes the cache.
                scratch = scratch_bytes(query.device, self.layout, self.num_heads // self.num_kv_heads, self.smooth_q)
                torch.empty(scratch, dtype=torch.uint8, device=query.device)
            return output.zero_()
        m = attn_metadata
        pages = self.layout.pages(kv_cache)
        query, out = query[: m.num_tokens], output[: m.num_tokens]
        if self.watch is not None:
            self.watch.attended(query)
        memory = self.memory_of(layer)
        # The keys and values may be another layer's.
        target = layer.kv_sharing_target_layer_name
        owner = self if target is None else get_forward_context().no_compile_layers[target].impl
        anchor = owner.anchor
        mask: dict[str, Any] = {
            "window": self.window, "soft_cap": self.soft_cap, "sinks": self.sinks, "v_anchor": owner.v_anchor,
        }  # fmt: skip
        if self.soft_cap or self.sinks is not None or self.turns_pages:
            mask["anchor"] = anchor  # elsewhere, attention comes out the same with any
        decode: Callable[..., None]
        prefill: Callable[..., None]
        how: dict[str, Any] = {}
        most = self.smoothing_of_prompts(query.device)  # decodes are blocks of a token or a few: there is nothing to smooth
        if query.device.type == "cpu":
            decode = prefill = cpu.attention
        else:
            from sage_kernels.decode import decode
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
        """What this layer, whose index is in its name, reads of long contexts."""
        if self.memory is None:
            return None
        dense = self.memory.dense_layers  # asked first, for names are taken apart in every step
        return None if dense and extract_layer_index(layer.layer_name) in dense else self.memory.policy

    def turn_table(self, device_: torch.device) -> torch.Tensor | None:
        if not self.turns_pages:
            return None
        return positions.turn_table(self.frequencies, self.max_pages, self.layout.tokens, device_)

    def store_summaries(self, pages: torch.Tensor, m: SageMetadata, anchor: torch.Tensor | None) -> None:
        turns = self.turn_table(pages.device)
        if pages.device.type == "cpu":
            reference.store_summaries(pages, self.layout, m.block_table, m.seq_lens, m.query_start_loc, turns, anchor)
        else:
            from sage_kernels.recall import store_summaries

            store_summaries(
                pages, self.layout, m.block_table, m.seq_lens, m.query_start_loc, m.num_tokens, turns, anchor
            )

    def recall(
        self, query: torch.Tensor, pages: torch.Tensor, requests: Requests, memory: Memory, query_block: int,
        max_query_len: int = 1,
    ) -> tuple[Requests, reference.Turns | None]:  # fmt: skip
        """What to attend to instead of all of the requests' contexts, and how."""
        args: Any = query, pages, self.layout, *requests, memory, query_block, self.turn_table(query.device)
        if query.device.type == "cpu":
            lists = reference.recall(*args)
        else:
            from sage_kernels.recall import recall

            lists = recall(*args, max_query_len=max_query_len)
        return (lists.block_table, lists.seq_lens, lists.query_start_loc), lists.turns

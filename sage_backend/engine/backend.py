# SPDX-License-Identifier: Apache-2.0
"""The attention backend: vLLM's interface to the pages of `sage_paged` and the kernels of `sage_kernels`.

In each step, vLLM's runner builds common metadata. `SageMetadataBuilder.build` splits the batch into decodes, which come first,
and prefills. Then `SageImpl.do_kv_cache_update` writes a layer's new tokens into their pages, and `SageImpl.forward` attends.
"""

from dataclasses import replace
from typing import Any

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from sage_backend import BACKEND, options
from sage_backend.engine import checks
from sage_backend.engine.impl import SageImpl
from sage_backend.engine.metadata import SageMetadataBuilder


class SageBackend(AttentionBackend):
    """`--attention-backend sage`. vLLM's kernel block is a page; a KV block is one or several."""

    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[SageImpl]:
        return SageImpl

    @staticmethod
    def get_builder_cls() -> type[SageMetadataBuilder]:
        return SageMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [options.current().page_tokens]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The only layout in which the tokens of a (block, head) are contiguous and blocks can be split.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec with the bytes per token and KV head of a page. Raises ValueError if keys and values differ in size."""
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"--attention-backend sage cannot serve keys of {spec.head_size} and values of {spec.head_size_v} channels"
            )
        layout = options.current().layout(spec.head_size)
        return replace(spec, state_content_bytes=layout.bytes_per_token)

    @classmethod
    def validate_configuration(cls, *, device_capability: Any, **config: Any) -> list[str]:  # type: ignore[override]
        """`checks.reasons` for a layer."""
        return checks.reasons(**config, options=options.current(), capability=device_capability)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

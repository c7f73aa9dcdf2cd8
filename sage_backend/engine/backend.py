# SPDX-License-Identifier: Apache-2.0
"""The attention backend: what vLLM asks of one, answered with pages of `sage_paged` and kernels of `sage_kernels`.

A step goes: vLLM's runner builds its common metadata; `SageMetadataBuilder.build` splits the batch into decodes, which stand
first, and prefills; then for each layer `do_kv_cache_update` writes the new tokens into their pages and `forward` attends.
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

# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform, except that it honours `--attention-backend sage` (vLLM's own always takes CPU_ATTN)."""

import functools
from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from sage_backend import BACKEND

_Base: Any = resolve_obj_by_qualname(cpu_platform_plugin())  # the plain CPU platform, or that for AMD Zen


class SageCpuPlatform(_Base):
    @classmethod
    def get_attn_backend_cls(cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if selected_backend is None or selected_backend.name != BACKEND:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"--attention-backend sage cannot serve this model: {'; '.join(reasons)}")
        _leave_pages_alone()
        return selected_backend.get_path()


@functools.cache
def _leave_pages_alone() -> None:
    """Have the runners of this backend's engines not zero new blocks of hybrid models.

    Nothing behind a context's last token is ever read of pages, so there is no need. And where a block is several pages,
    vLLM 0.32's first CPU runner takes the numbers of blocks for those of pages, and zeroes other requests' pages instead.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from sage_backend.engine.checks import is_chosen

    zero_blocks = CPUModelRunner._zero_block_ids

    def zero_blocks_of_others(self: Any, block_ids: list[int]) -> None:
        if not is_chosen(self.vllm_config):
            zero_blocks(self, block_ids)

    CPUModelRunner._zero_block_ids = zero_blocks_of_others

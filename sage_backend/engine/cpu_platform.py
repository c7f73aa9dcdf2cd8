# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform, except that it honors `--attention-backend sage` (vLLM's own always takes CPU_ATTN)."""

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from sage_backend import BACKEND
from sage_backend.engine.patches import zero_block_ids

_Base: Any = resolve_obj_by_qualname(cpu_platform_plugin())  # the plain CPU platform, or that for AMD Zen


class SageCpuPlatform(_Base):
    @classmethod
    def get_attn_backend_cls(cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        """The class of the selected backend, by its qualified name. Raises ValueError if it cannot serve the model."""
        if selected_backend is None or selected_backend.name != BACKEND:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"--attention-backend sage cannot serve this model: {'; '.join(reasons)}")
        zero_block_ids.apply()
        return selected_backend.get_path()

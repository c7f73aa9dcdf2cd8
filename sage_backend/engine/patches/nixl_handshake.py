# SPDX-License-Identifier: Apache-2.0
"""Makes NIXL refuse a server whose pages mean something else.

What: wraps `compute_nixl_compatibility_hash`, with which servers compare models and caches before they exchange pages.
Why: codes that were made with other options or another calibration file are wrong keys and values, and nothing else would show
    it: pages of the same size are taken as they are.
Releases: 0.31 to 0.33.
Remove when: an attention backend can add to this hash.
"""

import functools
import logging
from typing import Any

from sage_backend.engine import checks
from sage_backend.engine.patches.target import find, wrap
from sage_backend.options import SageOptions

logger = logging.getLogger(__name__)

_WORKER = "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker"


def apply_for(config: Any) -> None:
    """Apply the patch in a worker whose connector is one of NIXL's, or has one of them. Importing it loads NIXL, so others do
    without."""
    if config.kv_transfer_config is not None and "Nixl" in str(config.kv_transfer_config):
        apply()


@functools.cache
def apply() -> None:
    wrap(__name__, find(__name__, _WORKER), "compute_nixl_compatibility_hash", _with_pages)


def _with_pages(compute: Any) -> Any:
    def compute_with_pages(config: Any, backend: str, *args: Any, **kwargs: Any) -> Any:
        if checks.is_chosen(config):
            pages = SageOptions.parse(config.additional_config).pages
            logger.info("servers exchange KV pages with this one if theirs are the same: %s", pages)
            backend = f"{backend} {pages}"
        return compute(config, backend, *args, **kwargs)

    return compute_with_pages

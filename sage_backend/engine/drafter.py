# SPDX-License-Identifier: Apache-2.0
"""The backend of a drafter, the model that speculates tokens for another one.

vLLM chooses a drafter's backend by itself, or takes the target's, depending on its model runner and on the method. Then pages
that are quantized for the target lie next to a drafter's in BF16. Here a drafter follows its target where it can.
"""

import logging
from typing import Any

from sage_backend import BACKEND
from sage_backend.engine import checks
from sage_backend.features import positions
from sage_backend.options import SageOptions

logger = logging.getLogger(__name__)

METHODS = ("draft_model", "eagle", "eagle3", "mtp")
"""Methods whose drafters have causal attention. Those of other methods have other attention, or none."""


def choose_backend(config: Any, arguments: Any) -> Any:
    """Let the drafter of a configuration (VllmConfig), which vLLM has made of `arguments` (EngineArgs), use this backend if its
    target does, and the user says nothing else. Logs why not.

    Returns the drafter's ModelConfig if it uses this backend, and None otherwise. Raises ValueError, in one line, for a drafter
    that is to use this backend, by the user's choice, and cannot.
    """
    drafts = config.speculative_config
    if drafts is None or drafts.method not in METHODS or getattr(config.attention_config.backend, "name", None) != BACKEND:
        return None
    model, asked = drafts.draft_model_config, getattr(drafts.attention_backend, "name", None)
    if asked not in (None, BACKEND) or (asked is None and "attention_backend" in (arguments.speculative_config or {})):
        return None  # another backend, or "auto", which is vLLM's own choice
    options = SageOptions.parse(config.additional_config)
    found = checks.reasons_of(model, drafts.kv_cache_dtype or config.cache_config.cache_dtype, config, options)
    if options.memory is not None and options.memory.extrapolate:
        try:
            positions.check(model)
        except ValueError as error:
            found.append(str(error))
    if not found:
        drafts.attention_backend = config.attention_config.backend
        return model
    if asked == BACKEND:
        raise ValueError(
            f"--attention-backend sage cannot serve the drafter {model.model}: {'; '.join(found)}; "
            'leave "attention_backend" out of --speculative-config'
        )
    logger.warning("the drafter %s gets vLLM's own choice of a backend: %s", model.model, "; ".join(found))
    return None

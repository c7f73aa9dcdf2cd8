# SPDX-License-Identifier: Apache-2.0
"""Tells a worker's `Compressor` which requests a step runs and in which order.

What: wraps `execute_model` of one model runner and, where it has one (model runner V2), `prepare_inputs`.
Why: attention's metadata say which rows of a batch FFNs compress, but their builder sees no request ids.
Releases: 0.31 to 0.33, model runners V1 and V2.
Remove when: CommonAttentionMetadata has the ids of its requests, or vLLM hands requests' `extra_args` to metadata builders.
"""

from typing import Any

from sage_backend.engine.patches.target import attribute, wrap


def apply(runner: Any, compressor: Any) -> None:
    """runner: vLLM's model runner of this worker; compressor: `sage_backend.variator.layers.Compressor`."""

    def compressing(execute_model: Any) -> Any:
        def execute(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dummy_run"):
                return execute_model(scheduled, *args, **kwargs)
            with compressor.step(scheduled):
                return execute_model(scheduled, *args, **kwargs)

        return execute

    def remembering_order(prepare_inputs: Any) -> Any:
        def prepare(*args: Any, **kwargs: Any) -> Any:
            batch = prepare_inputs(*args, **kwargs)
            compressor.order = lambda: batch.req_ids
            return batch

        return prepare

    wrap(__name__, runner, "execute_model", compressing)
    if hasattr(runner, "prepare_inputs"):
        wrap(__name__, runner, "prepare_inputs", remembering_order)
    else:  # V1 keeps one batch for all steps
        attribute(__name__, runner, "input_batch")
        compressor.order = lambda: runner.input_batch.req_ids

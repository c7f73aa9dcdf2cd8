# SPDX-License-Identifier: Apache-2.0
"""Tells a worker which requests a step runs and in which order.

What: wraps `execute_model` of one model runner and, where it has one (model runner V2), `prepare_inputs`.
Why: attention's metadata say which rows of a batch FFNs compress, and how many pages requests have recalled, but their builder
    sees no request ids.
Releases: 0.31 to 0.33, model runners V1 and V2.
Remove when: CommonAttentionMetadata has the ids of its requests, or vLLM hands requests' `extra_args` to metadata builders.
"""

from typing import Any

from sage_backend.engine.patches.target import attribute, wrap
from sage_backend.features.step_requests import StepRequests


def apply(runner: Any, requests: StepRequests[Any]) -> None:
    """runner: vLLM's model runner of this worker."""

    def following(execute_model: Any) -> Any:
        def execute(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dummy_run"):
                return execute_model(scheduled, *args, **kwargs)
            with requests.step(scheduled):
                return execute_model(scheduled, *args, **kwargs)

        return execute

    def remembering_order(prepare_inputs: Any) -> Any:
        def prepare(*args: Any, **kwargs: Any) -> Any:
            batch = prepare_inputs(*args, **kwargs)
            requests.order = lambda: batch.req_ids
            return batch

        return prepare

    wrap(__name__, runner, "execute_model", following)
    if hasattr(runner, "prepare_inputs"):
        wrap(__name__, runner, "prepare_inputs", remembering_order)
    else:  # V1 keeps one batch for all steps
        attribute(__name__, runner, "input_batch")
        requests.order = lambda: runner.input_batch.req_ids

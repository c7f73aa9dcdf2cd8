# SPDX-License-Identifier: Apache-2.0
"""What the requests of a worker's steps ask for. Metadata builders see no request ids: a worker's model runner tells of its
steps through `engine.patches.model_runner`. Models that draft run outside of these steps, as if requests asked for nothing,
which changes how many drafts are accepted and no answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class StepRequests(Generic[T]):
    """What each request of a worker asks for, and which requests a step runs."""

    def __init__(self, read: Callable[[Mapping[str, Any]], T]) -> None:
        """read: makes of a request's `extra_args` what it asks for."""
        self.asked: dict[str, T] = {}
        """By the ids of all requests that have not ended."""
        self.order: Callable[[], Sequence[str]] = list
        """Returns the ids of the step's requests in the order of the batch (see `engine.patches.model_runner`)."""
        self._read, self._in_step = read, False

    @contextmanager
    def step(self, scheduled: Any) -> Iterator[None]:
        """Around a step of users' requests. scheduled: vLLM's SchedulerOutput."""
        for request in scheduled.finished_req_ids:
            self.asked.pop(request, None)
        for request in scheduled.scheduled_new_reqs:
            if request.req_id in self.asked:  # it was preempted, or is a session with its next prompt
                continue
            asked = self._read((request.sampling_params and request.sampling_params.extra_args) or {})
            self.began(asked)
            self.asked[request.req_id] = asked
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def began(self, asked: T) -> None:
        """A request has come that asks for this."""

    def in_order(self) -> list[T]:
        """What the requests of the step ask for, in the order of the batch; nothing between steps, and in dummy ones."""
        return [self.asked[name] for name in self.order()] if self._in_step else []

# SPDX-License-Identifier: Apache-2.0
"""The decode kernels against the reference: portable, and for sm_90."""

from dataclasses import replace

import hypothesis
import pytest
from hypothesis import strategies as st
from kernel_cases import KERNEL_ERROR, batches, build, many
from paged_batch import make_batch, poisoned, relative_error

from sage_kernels.portable.decode import max_rows
from sage_paged import PageLayout


@many
@hypothesis.given(batches(max_query=8), st.sampled_from([1, 2, 3, 5, 17, 40]))
def test_decode(kernels, case, programs: int) -> None:
    batch, modifiers, expected = build(*case, kernels.device)
    rows = (batch.requests.max_query_len or 1) * batch.query.shape[1] // batch.pages.shape[1]
    hypothesis.assume(rows <= max_rows(batch.query.device, batch.layout))
    out = poisoned(batch.query)
    kernels.decode(*batch.attention_args(), out, modifiers, programs=programs)
    assert relative_error(out, expected) < KERNEL_ERROR


def test_too_many_rows_and_small_workspaces_are_refused(kernels) -> None:
    from sage_kernels.portable.decode import Workspace

    batch = make_batch(PageLayout(64), [(90, 9)], heads=8, kv_heads=1, device=kernels.device)
    out = poisoned(batch.query)
    with pytest.raises(ValueError, match="exceed the decode kernel's 64 rows"):
        kernels.decode(*batch.attention_args(), out)
    batch.requests = replace(batch.requests, max_query_len=8)
    for programs, rows, channels in ((1, 128, 64), (2, 8, 64), (2, 64, 32)):
        workspace = Workspace.allocate(programs, rows, channels, kernels.device)
        has = rf"workspace too small: it has {programs} programs and {2 * programs * rows} slots of {channels} channels"
        with pytest.raises(ValueError, match=has + "; this call needs 2, 256 and 64"):
            kernels.decode(*batch.attention_args(), out, programs=2, workspace=workspace)


def test_requests_of_very_different_lengths(kernels) -> None:
    """One span holds many short requests and padding between them; the long request is spread over many spans."""
    requests = [(3000, 1), (5, 1), (64, 1), (0, 0), (65, 1), *[(10, 1)] * 9, (700, 1)]
    shape = {"layout": PageLayout(64, 8, 64), "requests": requests, "heads": 4, "kv_heads": 2, "smooth": True}
    batch, modifiers, expected = build(shape, {"sinks": True}, kernels.device)
    for programs in (1, 9, 32):
        out = poisoned(batch.query)
        kernels.decode(*batch.attention_args(), out, modifiers, programs=programs)
        assert relative_error(out, expected) < KERNEL_ERROR


def test_a_workspace_is_used_again(kernels) -> None:
    """A workspace serves batches of other sizes, whatever earlier ones have left in it. One context has more parts than are
    merged at a time, and padding follows the last request."""
    from sage_kernels.portable.decode import Workspace

    workspace = Workspace.allocate(40, 6, 64, kernels.device)
    for left in (workspace.out, workspace.m_ref, workspace.l_i):
        left.fill_(float("nan"))
    for requests in ([(2600, 3), (70, 1), (0, 0), (0, 0)], [(64, 1), (130, 2)], [(2600, 3), (70, 1), (0, 0), (0, 0)]):
        shape = {"layout": PageLayout(64, 8, 64), "requests": requests, "heads": 2, "kv_heads": 1, "smooth": True}
        batch, modifiers, expected = build(shape, {"sinks": True}, kernels.device)
        batch.requests = replace(batch.requests, max_query_len=3)
        out = poisoned(batch.query)
        kernels.decode(*batch.attention_args(), out, modifiers, programs=40, workspace=workspace)
        assert relative_error(out, expected) < KERNEL_ERROR

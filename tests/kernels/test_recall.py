# SPDX-License-Identifier: Apache-2.0
"""InfLLM memory: which pages are read, by the reference and by the kernels, and that reading all of them changes nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from paged_batch import Batch, make_batch, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from sage_kernels import LayerCalibration, Modifiers, PagedBatch, cpu, reference
from sage_kernels.portable import recall
from sage_paged import ALL_PAGES, Memory, PageLayout

LAYOUT = PageLayout(64, 8, 64, has_summary=True)
FREQUENCIES = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
SHIFT_TABLE = reference.rope_shift_table(FREQUENCIES, 64, 64)
REQUESTS = [(700, 150), (40, 40), (984, 1), (500, 129)]


def summarize(batch: Batch, shift_table: torch.Tensor | None = None) -> None:
    """Write the summaries of all full pages, as if the whole contexts had been stored in one step."""
    starts = torch.nn.functional.pad(batch.requests.seq_lens.cumsum(0), (1, 0))
    step = replace(batch.requests, query_start_loc=starts)
    reference.store_summaries(batch.pages, batch.layout, step, shift_table, batch.calibration)


def make(
    requests: list[tuple[int, int]] = REQUESTS, layout: PageLayout = LAYOUT, shifted: bool = False, **options: Any
) -> Batch:
    """A batch whose full pages have summaries, of keys that are rotated by SHIFT_TABLE if `shifted`."""
    batch = make_batch(layout, requests, heads=4, kv_heads=2, smooth=True, equalize=True, **options)
    summarize(batch, SHIFT_TABLE if shifted else None)
    return batch


def select(batch: Batch, memory: Memory, query_block: int, shift_table: torch.Tensor | None = None) -> PagedBatch:
    """The reference's choice."""
    return reference.select_pages(batch.query, batch.pages, batch.layout, batch.requests, memory, query_block, shift_table)


def test_summaries_of_full_pages() -> None:
    batch = make()
    views = batch.layout.views(batch.pages)
    stored = replace(batch.calibration, k_anchor=None)  # summaries are of keys less the anchor
    keys = reference.restore_keys(views.k * views.k_scale[..., None], stored, batch.layout)
    full = 0
    for request, (length, _) in enumerate(REQUESTS):
        for page in batch.requests.block_table[request, : length // 64].long():
            center, radius = views.summary[page].float().unbind(1)
            assert torch.allclose(center, keys[page].mean(1), atol=1e-2)
            assert torch.allclose(radius, (keys[page].amax(1) - keys[page].amin(1)) / 2, atol=1e-2)
            full += 1
    assert full == 10 + 0 + 15 + 7
    partly_filled = batch.requests.block_table[1, 0].long()
    assert torch.equal(batch.pages[partly_filled][:, -256:], batch.garbage[partly_filled][:, -256:])


@pytest.mark.parametrize("query_block", [0, 128])
def test_a_list_of_all_pages_changes_nothing(query_block: int) -> None:
    batch = make()
    memory = Memory(sink_tokens=64, local_tokens=128, topk_pages=64, query_block=128)
    chosen = select(batch, memory, query_block)
    dense, recalled = torch.empty_like(batch.query), torch.empty_like(batch.query)
    cpu.attention(*batch.attention_args(), dense)
    cpu.attention(batch.query, batch.pages, batch.layout, chosen, batch.scale, recalled)
    assert relative_error(recalled, dense) < 1e-3


@pytest.mark.parametrize(("head_dim", "k_bits"), [(64, 8), (128, 4)])
def test_a_list_of_all_pages_changes_no_bit(kernels, head_dim: int, k_bits: int) -> None:
    """Prefill and decode by the kernels, with lists by the kernels."""
    # NumPy, with which the interpreter multiplies, rounds a row by its place in a tile: in one of 80 runs with other sinks, one
    # number of 120,000 differed in its last bit.
    torch.manual_seed(0)
    layout = PageLayout(head_dim, k_bits, 64, has_summary=True)
    batch = make(layout=layout, device=kernels.device)
    memory = Memory(sink_tokens=64, local_tokens=128, topk_pages=64, query_block=128)
    modifiers = Modifiers(calibration=batch.calibration, sinks=torch.randn(4, device=kernels.device))
    dense, recalled = (torch.full_like(batch.query, float("nan")) for _ in range(2))

    kernels.prefill(*batch.attention_args(), dense, modifiers)
    chosen = kernels.select_pages(batch.query, batch.pages, layout, batch.requests, memory, 128)
    kernels.prefill(batch.query, batch.pages, layout, chosen, batch.scale, recalled, modifiers)
    assert torch.equal(recalled, dense)

    starts = torch.arange(len(REQUESTS) + 1, dtype=torch.int32, device=kernels.device)
    query, step = batch.query[: len(REQUESTS)], replace(batch.requests, query_start_loc=starts, max_query_len=1)
    dense, recalled = (torch.full_like(query, float("nan")) for _ in range(2))
    kernels.decode(query, batch.pages, layout, step, batch.scale, dense, modifiers, programs=5)
    chosen = kernels.select_pages(query, batch.pages, layout, step, memory, 0)
    kernels.decode(query, batch.pages, layout, chosen, batch.scale, recalled, modifiers, programs=5)
    assert torch.equal(recalled, dense)


def test_pages_that_are_read() -> None:
    """Sinks, local pages, and of the others those whose ellipsoids reach farthest toward the queries, each once, in order."""
    batch = make([(1500, 1)])
    memory = Memory(sink_tokens=100, local_tokens=200, topk_pages=3, query_block=128)
    chosen, table = select(batch, memory, 0), batch.requests.block_table[0]
    views = batch.layout.views(batch.pages)
    for head in range(2):
        queries = batch.query[0].float().view(2, 2, 64)[head]
        reached = []
        for page in range(2, 20):  # 1300 is the first local token, in page 20
            center, radius = views.summary[table[page].long(), head].float()
            axes = 2 * radius
            toward = axes * axes * queries  # the direction from the center to the point with each query's largest product
            steps = toward / (toward / axes).norm(dim=1, keepdim=True)
            assert torch.allclose((steps / axes).norm(dim=1), torch.ones(2))  # on the ellipsoid
            extents = (queries * steps).sum(1)
            reached.append((queries @ center).mean() + extents.square().mean().sqrt())
        best = (torch.stack(reached).topk(3).indices + 2).sort().values.tolist()
        expected = [0, 1, *best, 20, 21, 22, 23]
        assert torch.equal(chosen.block_table[0, head, : len(expected)], table[expected])
    assert chosen.seq_lens.tolist() == [5 * 64 + 1500 - 20 * 64]


def test_distant_pages_are_read_right_before_the_local_ones() -> None:
    """Against exact attention to keys that were rotated to there."""
    g = torch.Generator().manual_seed(1)
    keys, values, queries = (torch.randn(1000, n, 64, generator=g) for n in (2, 2, 4))
    angles = reference.rope_shift_table(FREQUENCIES, 1000, 1)

    def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return reference.turn_back(x, angles[positions][:, None] * torch.cat([torch.ones(32), -torch.ones(32)]))

    layout = PageLayout(64, 8, 64, has_summary=True)
    pages, slots, table = layout.empty(16, 2), torch.arange(1000), torch.arange(16, dtype=torch.int32)[None]
    anchor = torch.full((2, 64), 3.0)
    reference.store(rotated(keys, slots), values, pages, slots, layout, LayerCalibration(anchor))
    batch = PagedBatch(table, torch.tensor([1000], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32))
    memory = Memory(sink_tokens=64, local_tokens=100, topk_pages=20, query_block=64, trained_tokens=400)
    query, modifiers = rotated(queries[999:], torch.tensor([999])), Modifiers(calibration=LayerCalibration(anchor))
    chosen = reference.select_pages(query, pages, layout, batch, memory, 0, SHIFT_TABLE)
    result = reference.attention(query, pages, layout, chosen, 0.125, modifiers)

    local = 14  # the page of token 900
    positions = torch.where(slots < local * 64, (local - 1) * 64 + slots % 64, slots)
    k = rotated(keys, positions).repeat_interleave(2, 1)
    weights = torch.einsum("qhd,khd->hqk", query, k).mul(0.125).softmax(-1)
    exact = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(2, 1))
    assert relative_error(result, exact) < 0.05

    served = torch.empty_like(query)
    cpu.attention(query, pages, layout, chosen, 0.125, served, modifiers)
    assert relative_error(served, result) < 1e-4


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("page_format", [(64, 8, 64, True), (80, 4, 128, True), (128, 8, 128, True, 4), (64, 4, 64, True, 4)])
def test_store_summaries(kernels, page_format: tuple[int, ...], shifted: bool) -> None:
    layout = PageLayout(*page_format)
    table = reference.rope_shift_table(torch.rand(layout.head_dim // 2), 64, layout.tokens) if shifted else None
    batch = make_batch(layout, REQUESTS, heads=4, kv_heads=2, smooth=True)
    expected = batch.pages.clone()
    reference.store_summaries(expected, layout, batch.requests, table, batch.calibration)
    batch = batch.to(kernels.device)
    table = None if table is None else table.to(kernels.device)
    kernels.store_summaries(batch.pages, layout, batch.requests, len(batch.query), table, batch.calibration)
    actual_summary, summary = (layout.views(x.cpu()).summary for x in (batch.pages, expected))
    written = (summary.view(torch.int16) != layout.views(batch.garbage.cpu()).summary.view(torch.int16)).flatten(1).any(1)
    assert written.sum() == sum(length // layout.tokens - (length - n) // layout.tokens for length, n in REQUESTS)
    assert torch.allclose(actual_summary[written].float(), summary[written].float(), atol=1e-2, rtol=1e-3)
    assert torch.equal(batch.pages.cpu()[~written], expected[~written])


@pytest.mark.parametrize("query_block", [0, 128])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("topk", [3, 40])
def test_select_pages(kernels, topk: int, shifted: bool, query_block: int) -> None:
    memory = Memory(sink_tokens=64, local_tokens=150, topk_pages=topk, query_block=128, trained_tokens=400 if shifted else 0)
    batch = make(shifted=shifted)
    expected = select(batch, memory, query_block, SHIFT_TABLE if shifted else None)
    batch = batch.to(kernels.device)
    table = SHIFT_TABLE.to(kernels.device) if shifted else None
    chosen = kernels.select_pages(batch.query, batch.pages, LAYOUT, batch.requests, memory, query_block, table).to("cpu")
    assert torch.equal(chosen.query_start_loc, expected.query_start_loc)
    assert torch.equal(chosen.seq_lens, expected.seq_lens)
    assert (chosen.seq_lens > 0).sum() == (4 if not query_block else 2 + 1 + 1 + 2)
    for row, pages in enumerate((-(-chosen.seq_lens // LAYOUT.tokens)).tolist()):
        assert torch.equal(chosen.block_table[row, :, :pages], expected.block_table[row, :, :pages])
        if shifted:
            assert torch.equal(chosen.rope_shift.pages[row, :, :pages], expected.rope_shift.pages[row, :, :pages])
    if shifted:
        assert expected.rope_shift.pages.any()
    else:
        assert chosen.rope_shift is None


def test_a_request_without_queries_comes_first(kernels) -> None:
    memory, batch = Memory(64, 150, 3, 128), make([(100, 0), (300, 127)])
    expected = select(batch, memory, 128)
    batch = batch.to(kernels.device)
    chosen = kernels.select_pages(batch.query, batch.pages, LAYOUT, batch.requests, memory, 128).to("cpu")
    assert chosen.query_start_loc.tolist() == expected.query_start_loc.tolist()
    assert chosen.seq_lens.tolist() == expected.seq_lens.tolist()
    assert expected.query_start_loc[0] == 0


@pytest.mark.parametrize("query_block", [0, 128])
@pytest.mark.parametrize("shifted", [False, True])
def test_requests_with_numbers_of_pages_of_their_own(kernels, shifted: bool, query_block: int) -> None:
    """Each request of a batch reads what it would read alone under a memory with its number, or its context as it is."""
    own = [3, 1, 2, ALL_PAGES]
    memory = Memory(64, 150, 2, 128, 300 if shifted else 0, max_topk_pages=3, whole=True)
    batch = make(shifted=shifted)
    table = SHIFT_TABLE if shifted else None
    requests = replace(batch.requests, topk_pages=torch.tensor(own, dtype=torch.int32))
    expected = reference.select_pages(batch.query, batch.pages, LAYOUT, requests, memory, query_block, table)
    assert expected.topk_pages is None
    alone = [select(batch, replace(memory, topk_pages=topk), query_block, table) for topk in (3, 1, 2)]
    rows = 0
    for row, (start, length) in enumerate(zip(expected.query_start_loc.tolist(), expected.seq_lens.tolist(), strict=False)):
        if length == 0:
            continue
        request = int((batch.requests.query_start_loc[1:] <= start).sum())
        count = -(-length // LAYOUT.tokens)
        if own[request] == ALL_PAGES:
            context = batch.requests.block_table[request, :count].expand(2, -1)
            assert torch.equal(expected.block_table[row, :, :count], context)
            assert not shifted or not expected.rope_shift.pages[row].any()
        else:
            assert length == alone[request].seq_lens[row]
            assert torch.equal(expected.block_table[row, :, :count], alone[request].block_table[row, :, :count])
        rows += 1
    assert rows == (4 if not query_block else 2 + 1 + 1 + 2)

    batch, requests = batch.to(kernels.device), requests.to(kernels.device)
    table = None if table is None else table.to(kernels.device)
    chosen = kernels.select_pages(batch.query, batch.pages, LAYOUT, requests, memory, query_block, table).to("cpu")
    assert torch.equal(chosen.query_start_loc, expected.query_start_loc)
    assert torch.equal(chosen.seq_lens, expected.seq_lens)
    for row, count in enumerate((-(-chosen.seq_lens // LAYOUT.tokens)).tolist()):
        assert torch.equal(chosen.block_table[row, :, :count], expected.block_table[row, :, :count])
        if shifted:
            assert torch.equal(chosen.rope_shift.pages[row, :, :count], expected.rope_shift.pages[row, :, :count])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("pages", [1100, 1300, 2500])
@pytest.mark.parametrize("topk", [3, 128, 1100])
def test_the_best_of_many_pages(kernels, topk: int, pages: int, own: bool) -> None:
    """Contexts whose best pages are found chunk by chunk; many scores are equal, and the earlier page wins. own: both requests
    have numbers of pages of their own."""
    g = torch.Generator().manual_seed(pages)
    memory = Memory(sink_tokens=100, local_tokens=200, topk_pages=topk, query_block=128, max_topk_pages=128 * own)
    cache = LAYOUT.empty(pages, 2)
    LAYOUT.views(cache).summary[:, :, 0, :2] = torch.randint(-20, 20, (pages, 2, 2), generator=g).half()
    query = torch.zeros(2, 4, 64)
    query[..., :2] = torch.randint(-3, 4, (2, 4, 2), generator=g).float()
    batch = PagedBatch(
        torch.stack([torch.randperm(pages, generator=g) for _ in range(2)]).int(),
        torch.tensor([pages * 64 - 70, 900 * 64], dtype=torch.int32),
        torch.tensor([0, 1, 2], dtype=torch.int32),
        topk_pages=torch.tensor([100, 7], dtype=torch.int32) if own else None,
    )
    expected = reference.select_pages(query, cache, LAYOUT, batch, memory, 0)
    query, cache, batch = (x.to(kernels.device) for x in (query, cache, batch))
    chosen = kernels.select_pages(query, cache, LAYOUT, batch, memory, 0).to("cpu")
    assert torch.equal(chosen.seq_lens, expected.seq_lens)
    for row, count in enumerate((-(-expected.seq_lens // 64)).tolist()):
        assert torch.equal(chosen.block_table[row, :, :count], expected.block_table[row, :, :count])


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is active."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if "empty" in function.__name__:
            self.bytes += made.numel() * made.element_size()
        return made


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("pages", [40, 1300])
@pytest.mark.parametrize("trained", [0, 400])
def test_scratch_memory(kernels, trained: int, pages: int, whole: bool) -> None:
    """What vLLM is told to leave free."""
    memory = Memory(64, 150, 3, 128, trained, whole=whole)
    batch = make(shifted=bool(trained)).to(kernels.device)
    tables = torch.zeros(len(REQUESTS), pages, dtype=torch.int32, device=kernels.device)
    tables[:, : batch.requests.block_table.shape[1]] = batch.requests.block_table
    table = SHIFT_TABLE.to(kernels.device) if trained else None
    with Allocations() as made:
        kernels.select_pages(batch.query, batch.pages, LAYOUT, replace(batch.requests, block_table=tables), memory, 128, table)
    assert made.bytes == recall.scratch_bytes(LAYOUT, memory, len(batch.query), len(REQUESTS), 2, pages)


@pytest.mark.parametrize("k_bits", [4, 8])
@pytest.mark.parametrize(
    ("shifted", "soft_cap", "smooth_q"),
    [(False, 0.0, False), (False, 15.0, False), (True, 0.0, False), (True, 15.0, False), (True, 15.0, True)],
)
def test_attention_to_selected_pages(kernels, shifted: bool, smooth_q: bool, soft_cap: float, k_bits: int) -> None:
    """Each KV head with pages of its own, rows of no request, rotated queries, and Q smoothing."""
    layout = PageLayout(80, k_bits, 64, has_summary=True)
    table = reference.rope_shift_table(FREQUENCIES[:1].expand(40) ** torch.rand(40), 64, 64) if shifted else None
    memory = Memory(sink_tokens=64, local_tokens=150, topk_pages=3, query_block=128, trained_tokens=400 if shifted else 0)
    batch = make_batch(layout, REQUESTS, heads=4, kv_heads=2, smooth=True, query_bias=8.0 * smooth_q)
    summarize(batch, table)
    q_block = reference.tile_tokens(2) if smooth_q else 0
    modifiers = Modifiers(0, soft_cap, torch.randn(4), batch.calibration, q_block=q_block)
    for query_block in (0, 128):
        chosen = select(batch, memory, query_block, table)
        expected = reference.attention(batch.query, batch.pages, layout, chosen, batch.scale, modifiers)
        served = torch.empty_like(expected)
        cpu.attention(batch.query, batch.pages, layout, chosen, batch.scale, served, modifiers)
        assert relative_error(served, expected) < 1e-3

        chosen, on_device = chosen.to(kernels.device), modifiers.to(kernels.device)
        query, pages = batch.query.to(kernels.device), batch.pages.to(kernels.device)
        out = torch.full(query.shape, float("nan"), device=kernels.device)
        kernels.prefill(query, pages, layout, chosen, batch.scale, out, on_device)
        turned = reference.attention(batch.query, batch.pages, layout, select(batch, memory, query_block, table), batch.scale,
                                     modifiers, turns_keys=True)  # fmt: skip
        assert relative_error(out, turned) < 2e-3
        if smooth_q:
            continue  # decode does not smooth
        if query_block == 0:
            one = chosen.requests(2, 3, max_query_len=1)  # the request that decodes
            start = int(one.query_start_loc[0])
            assert one.query_start_loc.diff().tolist() == [1]
            one = replace(one, query_start_loc=one.query_start_loc - start)
            decoded = torch.full_like(out[start : start + 1], float("nan"))
            kernels.decode(query[start : start + 1], pages, layout, one, batch.scale, decoded, on_device, programs=5)
            assert relative_error(decoded, expected[start : start + 1]) < 2e-2

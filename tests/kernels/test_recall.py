# SPDX-License-Identifier: Apache-2.0
"""Memory: which pages are read, by the specification and by the kernels, and that reading all of them changes nothing."""

import pytest
import torch
from paged_batch import Batch, make_batch, relative_error

from sage_kernels import cpu, reference
from sage_paged import Memory, PageLayout

ON_GPU = torch.cuda.is_available()
LAYOUT = PageLayout(64, 8, 64, has_summary=True)
FREQUENCIES = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
TURNS = reference.turn_table(FREQUENCIES, 64, 64)
REQUESTS = [(700, 150), (40, 40), (984, 1), (500, 129)]


def make(requests: list[tuple[int, int]] = REQUESTS, layout: PageLayout = LAYOUT, turns: bool = False, **how) -> Batch:
    batch = make_batch(layout, requests, heads=4, kv_heads=2, smooth=True, **how)
    # All pages were filled by steps before.
    starts = torch.tensor([0, *(length for length, _ in requests)]).cumsum(0)
    reference.store_summaries(
        batch.pages, layout, batch.block_table, batch.seq_lens, starts, TURNS if turns else None, batch.anchor
    )
    return batch


def tables(batch: Batch) -> tuple:
    return batch.pages, batch.layout, batch.block_table, batch.seq_lens, batch.query_start_loc


def test_summaries_of_full_pages() -> None:
    batch = make()
    views = batch.layout.views(batch.pages)
    keys = views.k * views.k_scale[..., None]
    full = 0
    for request, (length, _) in enumerate(REQUESTS):
        for page in batch.block_table[request, : length // 64].long():
            center, radius = views.summary[page].float().unbind(1)
            assert torch.allclose(center, keys[page].mean(1), atol=1e-2)
            assert torch.allclose(radius, (keys[page].amax(1) - keys[page].amin(1)) / 2, atol=1e-2)
            full += 1
    assert full == 10 + 0 + 15 + 7
    partly_filled = batch.block_table[1, 0].long()
    assert torch.equal(batch.pages[partly_filled][:, -256:], batch.garbage[partly_filled][:, -256:])


@pytest.mark.parametrize("query_block", [0, 128])
def test_a_list_that_holds_the_context_is_the_context(query_block: int) -> None:
    batch = make()
    memory = Memory(sink_tokens=64, local_tokens=128, topk_pages=64, query_block=128)
    lists = reference.recall(batch.query, *tables(batch), memory, query_block)
    dense, recalled = torch.empty_like(batch.query), torch.empty_like(batch.query)
    cpu.attention(batch.query, *tables(batch), batch.scale, dense)
    args = lists.block_table, lists.seq_lens, lists.query_start_loc, batch.scale
    cpu.attention(batch.query, batch.pages, batch.layout, *args, recalled)
    assert relative_error(recalled, dense) < 1e-3


@pytest.mark.parametrize(("head_dim", "k_bits"), [(64, 8), (128, 4)])
def test_a_list_that_holds_the_context_is_the_context_bit_by_bit(kernels, head_dim: int, k_bits: int) -> None:
    """Prompts and decodes by the kernels, with lists by the kernels."""
    layout = PageLayout(head_dim, k_bits, 64, has_summary=True)
    batch = make(layout=layout, device=kernels.device)
    memory = Memory(sink_tokens=64, local_tokens=128, topk_pages=64, query_block=128)
    mask = {"anchor": batch.anchor, "sinks": torch.randn(4, device=kernels.device)}
    dense, recalled = (torch.full_like(batch.query, float("nan")) for _ in range(2))

    kernels.prefill(*batch.attention_args(), dense, **mask)
    lists = kernels.recall(batch.query, *tables(batch), memory, 128)
    args = lists.block_table, lists.seq_lens, lists.query_start_loc, batch.scale
    kernels.prefill(batch.query, batch.pages, layout, *args, recalled, **mask)
    assert torch.equal(recalled, dense)

    starts = torch.arange(len(REQUESTS) + 1, dtype=torch.int32, device=kernels.device)
    query, where = batch.query[: len(REQUESTS)], (batch.block_table, batch.seq_lens, starts)
    dense, recalled = (torch.full_like(query, float("nan")) for _ in range(2))
    kernels.decode(query, batch.pages, layout, *where, batch.scale, dense, **mask, programs=5)
    lists = kernels.recall(query, batch.pages, layout, *where, memory, 0)
    args = lists.block_table, lists.seq_lens, lists.query_start_loc, batch.scale
    kernels.decode(query, batch.pages, layout, *args, recalled, **mask, programs=5)
    assert torch.equal(recalled, dense)


def test_what_is_read() -> None:
    """Sinks, local pages, and of the others those whose ellipsoids reach farthest towards the queries, each once, in order."""
    batch = make([(1500, 1)])
    memory = Memory(sink_tokens=100, local_tokens=200, topk_pages=3, query_block=128)
    lists = reference.recall(batch.query, *tables(batch), memory, 0)
    views = batch.layout.views(batch.pages)
    for head in range(2):
        queries = batch.query[0].float().view(2, 2, 64)[head]
        reached = []
        for page in range(2, 20):  # 1300 is the first local token, in page 20
            center, radius = views.summary[batch.block_table[0, page].long(), head].float()
            axes = 2 * radius
            toward = axes * axes * queries  # from the center to where each query's product is largest, but for its length
            steps = toward / (toward / axes).norm(dim=1, keepdim=True)
            assert torch.allclose((steps / axes).norm(dim=1), torch.ones(2))  # on the ellipsoid
            extents = (queries * steps).sum(1)
            reached.append((queries @ center).mean() + extents.square().mean().sqrt())
        best = (torch.stack(reached).topk(3).indices + 2).sort().values.tolist()
        expected = [0, 1, *best, 20, 21, 22, 23]
        assert torch.equal(lists.block_table[0, head, : len(expected)], batch.block_table[0][expected])
    assert lists.seq_lens.tolist() == [5 * 64 + 1500 - 20 * 64]


def test_turned_pages_are_read_at_the_distance_of_the_page_before_the_local_ones() -> None:
    """Against exact attention to keys that were rotated to there."""
    g = torch.Generator().manual_seed(1)
    keys, values, queries = (torch.randn(1000, n, 64, generator=g) for n in (2, 2, 4))
    at = reference.turn_table(FREQUENCIES, 1000, 1)

    def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return reference.turned(x, at[positions][:, None] * torch.cat([torch.ones(32), -torch.ones(32)]))

    layout = PageLayout(64, 8, 64, has_summary=True)
    pages, slots, table = layout.empty(16, 2), torch.arange(1000), torch.arange(16, dtype=torch.int32)[None]
    anchor = torch.full((2, 64), 3.0)
    reference.store(rotated(keys, slots), values, pages, slots, layout, anchor)
    lengths, starts = torch.tensor([1000], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    memory = Memory(sink_tokens=64, local_tokens=100, topk_pages=20, query_block=64, trained_tokens=400)
    query = rotated(queries[999:], torch.tensor([999]))
    lists = reference.recall(query, pages, layout, table, lengths, starts, memory, 0, TURNS)
    args = lists.block_table, lists.seq_lens, lists.query_start_loc, 0.125
    result = reference.attention(query, pages, layout, *args, anchor=anchor, turns=lists.turns)

    local = 14  # the page of token 900
    positions = torch.where(slots < local * 64, (local - 1) * 64 + slots % 64, slots)
    k = rotated(keys, positions).repeat_interleave(2, 1)
    weights = torch.einsum("qhd,khd->hqk", query, k).mul(0.125).softmax(-1)
    exact = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(2, 1))
    assert relative_error(result, exact) < 0.05

    served = torch.empty_like(query)
    cpu.attention(query, pages, layout, *args, served, anchor=anchor, turns=lists.turns)
    assert relative_error(served, result) < 1e-4


def query_rows(batch: Batch, memory: Memory, query_block: int, turn_table: torch.Tensor | None = None) -> reference.PageLists:
    return reference.recall(batch.query, *tables(batch), memory, query_block, turn_table)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("format", [(64, 8, 64), (80, 4, 128), (128, 8, 128)])
def test_summary_kernel(kernels, format: tuple[int, int, int], turns: bool) -> None:
    layout = PageLayout(*format, has_summary=True)
    table = reference.turn_table(torch.rand(layout.head_dim // 2), 64, layout.tokens) if turns else None
    batch = make_batch(layout, REQUESTS, heads=4, kv_heads=2, smooth=True)
    expected = batch.pages.clone()
    reference.store_summaries(expected, *tables(batch)[1:], table, batch.anchor)
    batch = make_batch(layout, REQUESTS, heads=4, kv_heads=2, smooth=True, device=kernels.device)
    table = None if table is None else table.to(kernels.device)
    kernels.store_summaries(*tables(batch), len(batch.query), table, batch.anchor)
    mine, theirs = (layout.views(x.cpu()).summary for x in (batch.pages, expected))
    written = (theirs.view(torch.int16) != layout.views(batch.garbage.cpu()).summary.view(torch.int16)).flatten(1).any(1)
    assert written.sum() == sum(length // layout.tokens - (length - n) // layout.tokens for length, n in REQUESTS)
    assert torch.allclose(mine[written].float(), theirs[written].float(), atol=1e-2, rtol=1e-3)
    assert torch.equal(batch.pages.cpu()[~written], expected[~written])


@pytest.mark.parametrize("query_block", [0, 128])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("topk", [3, 40])
def test_recall_kernels(kernels, topk: int, turns: bool, query_block: int) -> None:
    memory = Memory(
        sink_tokens=64, local_tokens=150, topk_pages=topk, query_block=128, trained_tokens=400 if turns else 0
    )
    # In a step, decodes come first, and prefills are handed over with what is left of the batch's tensors.
    expected = query_rows(make(turns=turns), memory, query_block, TURNS if turns else None)
    batch = make(turns=turns)
    for name in ("query", "pages", "block_table", "seq_lens", "query_start_loc"):
        setattr(batch, name, getattr(batch, name).to(kernels.device))
    longest = max(n for _, n in REQUESTS)
    table = TURNS.to(kernels.device) if turns else None
    lists = kernels.recall(batch.query, *tables(batch), memory, query_block, table, max_query_len=longest)
    starts, lengths = lists.query_start_loc.cpu(), lists.seq_lens.cpu()
    assert torch.equal(starts, expected.query_start_loc)
    assert torch.equal(lengths, expected.seq_lens)
    assert (lengths > 0).sum() == (4 if not query_block else 2 + 1 + 1 + 2)
    for row, pages in enumerate((-(-lengths // LAYOUT.tokens)).tolist()):
        assert torch.equal(lists.block_table[row, :, :pages].cpu(), expected.block_table[row, :, :pages])
        if turns:
            assert torch.equal(lists.turns.pages[row, :, :pages].cpu(), expected.turns.pages[row, :, :pages])
    if turns:
        assert expected.turns.pages.any()


@pytest.mark.parametrize("pages", [1100, 1300, 2500])
@pytest.mark.parametrize("topk", [3, 128])
def test_the_best_of_many_pages(kernels, topk: int, pages: int) -> None:
    """Contexts whose best pages are found chunk by chunk; many scores are equal, and the earlier page wins."""
    g = torch.Generator().manual_seed(pages)
    memory = Memory(sink_tokens=100, local_tokens=200, topk_pages=topk, query_block=128)
    cache = LAYOUT.empty(pages, 2)
    LAYOUT.views(cache).summary[:, :, 0, :2] = torch.randint(-20, 20, (pages, 2, 2), generator=g).half()
    query = torch.zeros(2, 4, 64)
    query[..., :2] = torch.randint(-3, 4, (2, 4, 2), generator=g).float()
    table = torch.stack([torch.randperm(pages, generator=g) for _ in range(2)]).int()
    requests = table, torch.tensor([pages * 64 - 70, 900 * 64], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    expected = reference.recall(query, cache, LAYOUT, *requests, memory, 0)
    on = [x.to(kernels.device) for x in (query, cache, *requests)]
    lists = kernels.recall(*on[:2], LAYOUT, *on[2:], memory, 0)
    assert torch.equal(lists.seq_lens.cpu(), expected.seq_lens)
    for row, count in enumerate((-(-expected.seq_lens // 64)).tolist()):
        assert torch.equal(lists.block_table[row, :, :count].cpu(), expected.block_table[row, :, :count])


@pytest.mark.parametrize("k_bits", [4, 8])
@pytest.mark.parametrize(
    ("turns", "soft_cap", "smooth_q"),
    [(False, 0.0, False), (False, 15.0, False), (True, 0.0, False), (True, 15.0, False), (True, 15.0, True)],
)
def test_attention_to_page_lists(kernels, turns: bool, smooth_q: bool, soft_cap: float, k_bits: int) -> None:
    """Each head with pages of its own, rows that nobody has, turned queries, of which the means are taken off."""
    layout = PageLayout(80, k_bits, 64, has_summary=True)
    table = reference.turn_table(FREQUENCIES[:1].expand(40) ** torch.rand(40), 64, 64)
    memory = Memory(sink_tokens=64, local_tokens=150, topk_pages=3, query_block=128, trained_tokens=400 if turns else 0)
    batch = make_batch(layout, REQUESTS, heads=4, kv_heads=2, smooth=True, query_bias=8.0 * smooth_q)
    q_block = reference.tile_tokens(2) if smooth_q else 0
    starts = torch.tensor([0, *(length for length, _ in REQUESTS)]).cumsum(0)
    tables_of_all = batch.block_table, batch.seq_lens, starts
    reference.store_summaries(batch.pages, layout, *tables_of_all, table if turns else None, batch.anchor)
    mask = {"soft_cap": soft_cap, "sinks": torch.randn(4), "anchor": batch.anchor}
    for query_block in (0, 128):
        lists = query_rows(batch, memory, query_block, table if turns else None)
        args = lists.block_table, lists.seq_lens, lists.query_start_loc, batch.scale
        how = {**mask, "turns": lists.turns}
        expected = reference.attention(batch.query, batch.pages, layout, *args, **how, q_block=q_block)
        served = torch.empty_like(expected)
        cpu.attention(batch.query, batch.pages, layout, *args, served, **how, q_block=q_block)
        assert relative_error(served, expected) < 1e-3

        on = {name: x.to(kernels.device) if isinstance(x, torch.Tensor) else x for name, x in mask.items()}
        if lists.turns is not None:
            on["turns"] = reference.Turns(lists.turns.pages.to(kernels.device), table.to(kernels.device))
        args = (*(x.to(kernels.device) for x in args[:3]), batch.scale)
        query, pages = batch.query.to(kernels.device), batch.pages.to(kernels.device)
        out = torch.full(query.shape, float("nan"), device=kernels.device)
        kernels.prefill(query, pages, layout, *args, out, **on, smooth_q=smooth_q)
        assert relative_error(out, expected) < 2e-2
        if smooth_q:
            continue  # decodes are not smoothed
        few = [n for n in lists.query_start_loc.diff().tolist() if n <= 8]
        if query_block == 0 and few:
            one = 2  # the request that decodes
            rows = slice(int(lists.query_start_loc[one]), int(lists.query_start_loc[one + 1]))
            if "turns" in on:
                on["turns"] = reference.Turns(on["turns"].pages[one : one + 1], on["turns"].table)
            single = args[0][one : one + 1], args[1][one : one + 1], args[2][one : one + 2] - rows.start, batch.scale
            decoded = torch.full_like(out[rows], float("nan"))
            kernels.decode(query[rows], pages, layout, *single, decoded, **on, programs=5)
            assert relative_error(decoded, expected[rows]) < 2e-2

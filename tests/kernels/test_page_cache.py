# SPDX-License-Identifier: Apache-2.0
"""Pages in host memory: what is in frames, what is evicted, and that attention to frames is attention to pages."""

from dataclasses import replace

import pytest
import torch
from paged_batch import make_batch, relative_error

from sage_kernels import Modifiers, PageCache, PagedBatch, fetch_pages, reference, select_pages
from sage_kernels import store as stored
from sage_paged import Memory, PageLayout

BLOCKS, HEADS = 40, 3
LAYOUT = PageLayout(64, 8, 64)
FETCHED = reference.fetch_pages, "the kernels'"


def fetch_of(kernels, which):
    return kernels.fetch_pages if isinstance(which, str) else which


def lists(tables: torch.Tensor, lengths: list[int]) -> PagedBatch:
    """A batch of requests that decode. tables: int [requests, kv_heads, pages]."""
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    return PagedBatch(tables.int(), torch.tensor(lengths, dtype=torch.int32), starts, max_query_len=1)


def random_pages(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (BLOCKS, HEADS, LAYOUT.page_bytes), generator=torch.Generator().manual_seed(seed)).byte()


def check_tables(cache: PageCache, pages: torch.Tensor) -> None:
    """The two tables are inverse, and every frame has what its page has."""
    for head in range(pages.shape[1]):
        for frame, page in enumerate(cache.page_in[:, head].tolist()):
            if page >= 0:
                assert cache.frame_of[page, head] == frame
                assert torch.equal(cache.frames[frame, head], pages[page, head])
        assert (cache.frame_of[:, head] >= 0).sum() == (cache.page_in[:, head] >= 0).sum()
    assert (cache.frame_of >= -1).all()


@pytest.mark.parametrize("which", FETCHED, ids=["reference", "kernels"])
@pytest.mark.parametrize("window", [1024, 5], ids=["all", "in windows"])
def test_what_is_read_is_in_frames(kernels, which, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random page lists, with pages that several rows share, through a cache of 12 frames."""
    monkeypatch.setattr("sage_kernels.reference.page_cache.EVICTION_WINDOW", window)
    monkeypatch.setattr("sage_kernels.portable.page_cache.EVICTION_WINDOW", 1 << (window - 1).bit_length())
    fetch, device = fetch_of(kernels, which), "cpu" if callable(which) else kernels.device
    g = torch.Generator().manual_seed(3)
    pages = random_pages(1)
    on_device, cache = pages.to(device), PageCache.allocate(BLOCKS, HEADS, LAYOUT, 12, device)
    total = [0] * HEADS
    for step in range(8):
        tables = torch.stack([torch.stack([torch.randperm(BLOCKS, generator=g)[:6] for _ in range(HEADS)]) for _ in range(2)])
        tables[1, :, :2] = tables[0, :, :2]
        lengths = [6 * 64 - int(torch.randint(0, 300, (), generator=g)), 64 * int(torch.randint(1, 7, (), generator=g))]
        batch = lists(tables, lengths)
        resident = [set(cache.page_in[:, head].tolist()) for head in range(HEADS)]
        held = fetch(cache, on_device, LAYOUT, batch.to(device)).block_table.cpu()
        check_tables(PageCache(*(x.cpu() for x in vars(cache).values())), pages)
        for head in range(HEADS):
            wanted = set()
            for row, length in enumerate(lengths):
                for nth in range(-(-length // 64)):
                    page = int(tables[row, head, nth])
                    wanted.add(page)
                    assert torch.equal(cache.frames[held[row, head, nth].long(), head].cpu(), pages[page, head])
            total[head] += len(wanted - resident[head])
        assert cache.fetched.tolist() == total, step
        began, ended, before = cache.times.tolist()
        if device != "cpu" or callable(which):  # the interpreter has no clock
            assert ended > began > before >= 0
            assert (before > 0) == (step > 0)
    assert cache.clock.tolist() == [9] * HEADS


@pytest.mark.parametrize("which", FETCHED, ids=["reference", "kernels"])
def test_the_least_recently_used_pages_make_room(kernels, which) -> None:
    fetch, device = fetch_of(kernels, which), "cpu" if callable(which) else kernels.device
    pages = random_pages(2).to(device)
    cache = PageCache.allocate(BLOCKS, HEADS, LAYOUT, 6, device)

    def read(*wanted: int) -> set[int]:
        """What is in frames after these pages were read, the same in all heads."""
        table = torch.tensor(wanted).expand(1, HEADS, -1)
        fetch(cache, pages, LAYOUT, lists(table, [64 * len(wanted)]).to(device))
        found = [set(cache.page_in[:, head].tolist()) for head in range(HEADS)]
        assert found[0] == found[1] == found[2]
        return found[0] - {-1}

    for page in range(1, 7):
        assert read(page) == set(range(1, page + 1))
    assert read(2) == {1, 2, 3, 4, 5, 6}
    assert read(7) == {2, 3, 4, 5, 6, 7}
    assert read(8, 9) == {2, 5, 6, 7, 8, 9}
    assert read(2, 5) == {2, 5, 6, 7, 8, 9}
    assert read(10, 11, 12, 13) == {2, 5, 10, 11, 12, 13}
    assert read(2, 14, 15, 16, 17, 18) == {2, 14, 15, 16, 17, 18}


def test_more_entries_than_frames_are_refused() -> None:
    cache = PageCache.allocate(BLOCKS, HEADS, LAYOUT, 5)
    with pytest.raises(ValueError, match="6 entries for 5 frames"):
        fetch_pages(cache, random_pages(1), LAYOUT, lists(torch.zeros(2, HEADS, 3), [10, 10]))


@pytest.mark.parametrize("layout", [LAYOUT, PageLayout(128, 4, 64), PageLayout(80, 8, 128, v_bits=4)])
@pytest.mark.parametrize("triton", [False, True], ids=["api", "kernels"])
def test_new_tokens_reach_pages_and_frames(kernels, layout: PageLayout, triton: bool) -> None:
    """Whole tiles of 16 tokens and single ones, padding included, in pages that have a frame in some heads only."""
    g = torch.Generator().manual_seed(5)
    device = kernels.device if triton else "cpu"
    batch = make_batch(layout, [(300, 300), (70, 70)], heads=4, kv_heads=2, smooth=True, equalize=True)
    pages, slots = batch.garbage.clone(), batch.slots.clone()
    slots[torch.randint(0, len(slots), (9,), generator=g)] = -1
    table = torch.stack([batch.requests.block_table[0, :2], batch.requests.block_table[0, 1:3]])[None].long()
    cache = PageCache.allocate(len(pages), 2, layout, 3)
    fetch_pages(cache, pages, layout, lists(table, [2 * layout.tokens]))
    expected = pages.clone()
    reference.store(batch.key, batch.value, expected, slots, layout, batch.calibration)
    batch, pages, slots = batch.to(device), pages.to(device), slots.to(device)
    cache = PageCache(*(x.to(device) for x in vars(cache).values()))
    (kernels.store if triton else stored)(batch.key, batch.value, pages, slots, layout, batch.calibration, cache)
    check_tables(PageCache(*(x.cpu() for x in vars(cache).values())), pages.cpu())
    assert (cache.page_in >= 0).sum() == 4
    if torch.device(device).type == "cpu":
        assert torch.equal(pages, expected)


@pytest.mark.parametrize("shifted", [False, True])
def test_attention_through_frames_is_that_to_pages(kernels, shifted: bool) -> None:
    """Summaries outside of pages choose the same pages. Decode and prefill of a few rows at a time through frames give the same
    bits, also where pages are read at other positions, and where all contexts are short."""
    requests = [(700, 70), (40, 8), (984, 1)]
    with_summaries = replace(LAYOUT, has_summary=True)
    memory = Memory(sink_tokens=64, local_tokens=150, topk_pages=3, query_block=128, trained_tokens=400 if shifted else 0)
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    turns = reference.rope_shift_table(frequencies, 64, 64).to(kernels.device) if shifted else None
    batch = make_batch(LAYOUT, requests, heads=4, kv_heads=2, smooth=True, equalize=True, device=kernels.device)
    room = with_summaries.empty(len(batch.pages), 2, kernels.device)
    room[..., : LAYOUT.page_bytes] = batch.pages
    cache = PageCache.allocate(len(batch.pages), 2, LAYOUT, 20, kernels.device)
    starts = torch.nn.functional.pad(batch.requests.seq_lens.cumsum(0), (1, 0)).int()
    step = replace(batch.requests, query_start_loc=starts)
    tokens = int(starts[-1])
    kernels.store_summaries(batch.pages, LAYOUT, step, tokens, turns, batch.calibration, cache)
    kernels.store_summaries(room, with_summaries, step, tokens, turns, batch.calibration)

    def check(attend, query: torch.Tensor, chosen: PagedBatch) -> None:
        modifiers = Modifiers(calibration=batch.calibration)
        through, direct = (torch.full_like(query, float("nan")) for _ in range(2))
        attend(query, batch.pages, LAYOUT, chosen, batch.scale, direct, modifiers)
        rows_at_once, groups = 20 // chosen.block_table.shape[-1], 0
        for first in range(0, chosen.num_requests, rows_at_once):
            part = chosen.requests(first, min(first + rows_at_once, chosen.num_requests))
            held = kernels.fetch_pages(cache, batch.pages, LAYOUT, part)
            attend(query, cache.frames, LAYOUT, held, batch.scale, through, modifiers)
            groups += 1
        assert groups > 1
        # Pages are split over a decode's programs by what all requests of a call have.
        exact = attend is kernels.prefill
        assert torch.equal(through, direct) if exact else relative_error(through, direct) < 1e-3
        assert direct.isfinite().all()

    chosen = kernels.select_pages(batch.query, batch.pages, LAYOUT, batch.requests, memory, 128, turns, cache)
    expected = kernels.select_pages(batch.query, room, with_summaries, batch.requests, memory, 128, turns)
    assert torch.equal(chosen.block_table, expected.block_table)
    check(kernels.prefill, batch.query, chosen)
    query = batch.query[: len(requests)]
    one = torch.arange(len(requests) + 1, dtype=torch.int32, device=kernels.device)
    decodes = replace(batch.requests, query_start_loc=one, max_query_len=1)
    check(kernels.decode, query, kernels.select_pages(query, batch.pages, LAYOUT, decodes, memory, 0, turns, cache))
    check(kernels.decode, query, replace(decodes, block_table=decodes.block_table[:, : -(-984 // 64)]))


def test_bytes_on_the_device() -> None:
    """`block_bytes` and `frame_bytes` are what is allocated, but for what each KV head or the layer has once."""
    cache = PageCache.allocate(BLOCKS, HEADS, LAYOUT, 12)
    allocated = sum(x.nbytes for x in vars(cache).values())
    once = HEADS * (4 + 4 + 2 * 4 + 8) + 3 * 8
    counted = BLOCKS * PageCache.block_bytes(LAYOUT, HEADS) + 12 * PageCache.frame_bytes(LAYOUT, HEADS)
    assert allocated == counted + once


def test_summaries_in_a_cache_are_those_in_pages() -> None:
    plain = make_batch(LAYOUT, [(300, 300)], heads=2, kv_heads=2)
    batch = replace(plain, layout=replace(LAYOUT, has_summary=True))
    batch.pages = batch.layout.empty(len(plain.pages), 2)
    batch.pages[..., : LAYOUT.page_bytes] = plain.pages
    cache = PageCache.allocate(len(plain.pages), 2, LAYOUT, 4)
    reference.store_summaries(batch.pages, batch.layout, batch.requests)
    reference.store_summaries(plain.pages, LAYOUT, plain.requests, cache=cache)
    full = batch.requests.block_table[0, : 300 // 64].long()
    summary = batch.layout.views(batch.pages).summary
    assert torch.equal(cache.summaries[full], summary[full])
    query = torch.randn(300, 2, 64)
    memory = Memory(sink_tokens=64, local_tokens=64, topk_pages=1, query_block=64)
    one = select_pages(query, batch.pages, batch.layout, batch.requests, memory, 64)
    other = select_pages(query, plain.pages, LAYOUT, plain.requests, memory, 64, cache=cache)
    assert torch.equal(one.block_table, other.block_table)

# SPDX-License-Identifier: Apache-2.0
"""The public functions: which implementation serves a device, what the boundary refuses, and the CPU path end to end."""

import doctest
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import ON_GPU
from paged_batch import make_batch, poisoned, relative_error

import sage_kernels
from sage_kernels import (
    KernelChoice,
    LayerCalibration,
    Memory,
    Modifiers,
    PagedBatch,
    PageLayout,
    RopeShift,
    api,
    device,
    reference,
)
from sage_kernels.portable import decode as portable_decode
from sage_kernels.portable import query_tile, widen
from sage_paged import K_BITS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAYOUT = PageLayout(64, 8, 64, has_summary=True)
REQUESTS = [(700, 150), (40, 40), (984, 1), (500, 129)]
SCALE = 0.125


def test_public_names_and_examples() -> None:
    assert all(hasattr(sage_kernels, name) for name in sage_kernels.__all__)
    failed, tried = doctest.testmod(api)
    assert failed == 0
    assert tried > 20


# --- Dispatch -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth_q", [False, True])
@pytest.mark.parametrize("k_bits", K_BITS)
def test_a_cpu_takes_torch(k_bits: int, smooth_q: bool) -> None:
    layout = PageLayout(128, k_bits)
    assert api.choose_kernels(CPU, layout, 4, smooth_q) == KernelChoice("torch", "torch", None)
    assert api.smoothing_block(CPU, layout, 4) == reference.tile_tokens(4) == 16
    assert api.prefill_scratch_bytes(CPU, layout, 4, smooth_q) == 0
    assert api.decode_workspace(CPU, layout, 8) is None
    assert api.max_decode_rows(CPU, layout) == 64


@pytest.mark.parametrize(
    ("hopper", "gluon", "reads", "smooth_q", "kernel", "reason"),
    [
        (False, True, True, True, "portable", None),
        (True, False, True, True, "portable", "gluon_missing"),
        (True, True, False, True, "portable", "page_format"),
        (True, True, True, True, "portable", "smooth_q"),
        (True, True, True, False, "hopper", None),
    ],
)
def test_kernels_of_a_gpu(
    hopper: bool, gluon: bool, reads: bool, smooth_q: bool, kernel: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them widen INT4 pages, which takes scratch memory. Without FP8, the portable ones widen all pages."""
    from sage_kernels.hopper import decode, prefill

    monkeypatch.setattr(api, "is_hopper", lambda _: hopper)
    monkeypatch.setattr(api, "gluon_available", lambda: gluon)
    monkeypatch.setattr(api, "choose_kernels", api.choose_kernels.__wrapped__)
    monkeypatch.setattr(prefill, "supports", lambda *_: reads)
    monkeypatch.setattr(widen, "fp8_path", lambda _: "native")
    arguments = GPU, PageLayout(128, 4), 4, smooth_q
    assert api.choose_kernels(*arguments) == KernelChoice(kernel, "hopper" if hopper and gluon else "portable", reason)
    assert api.prefill_scratch_bytes(*arguments) == widen.SCRATCH
    assert api.prefill_scratch_bytes(GPU, PageLayout(128, 8), 4, smooth_q) == 0
    assert api.prefill_scratch_bytes(GPU, PageLayout(80, 4), 4, smooth_q) == widen.SCRATCH
    monkeypatch.setattr(widen, "fp8_path", lambda _: "half")
    assert api.prefill_scratch_bytes(GPU, PageLayout(128, 8), 4, smooth_q) == widen.SCRATCH
    assert api.prefill_scratch_bytes(GPU, PageLayout(256, 8), 4, smooth_q) == 0
    monkeypatch.setattr(decode, "supports", lambda _: False)
    assert api.choose_kernels(*arguments) == KernelChoice(kernel, "portable", reason)


@pytest.mark.parametrize(
    ("capability", "path"), [((8, 0), "half"), ((8, 9), "native"), ((9, 0), "native"), ((12, 0), "native"), ((12, 1), "half")]
)
def test_which_devices_multiply_fp8(capability: tuple[int, int], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device.fp8_path.__wrapped__(GPU) == path


@pytest.mark.parametrize(("kib", "head_dim", "tokens", "rows"), [
    (99, 512, 128, 32), (99, 512, 64, 64), (99, 256, 128, 64), (163, 512, 128, 64),
])  # fmt: skip
def test_rows_of_a_decode(kib: int, head_dim: int, tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, probabilities and values of a page must fit into shared memory."""
    monkeypatch.setattr(query_tile, "fp8_path", lambda _: "native")
    monkeypatch.setattr(query_tile, "multiplies_by_warp", lambda _: True)
    monkeypatch.setattr(portable_decode, "shared_memory", lambda _: kib * 1024)
    layout = PageLayout(head_dim, tokens=tokens)
    assert portable_decode.max_rows.__wrapped__(GPU, layout) == rows
    monkeypatch.setattr(portable_decode, "max_rows", portable_decode.max_rows.__wrapped__)
    assert portable_decode.check_rows(GPU, layout, 1, 128) == 128
    assert portable_decode.check_rows(GPU, layout, rows // 8, 8) == rows
    with pytest.raises(ValueError, match=f"9 heads exceed the decode kernel's {rows} rows"):
        portable_decode.check_rows(GPU, layout, rows // 8, 9)


def test_heads_that_are_too_far_apart_are_refused() -> None:
    """For offsets of 32 bits. A tensor with heads outermost may be as large."""
    layout = PageLayout(128)
    pages, table = layout.empty(4, 4, "meta"), torch.zeros(1, 4, dtype=torch.int32, device="meta")
    lengths, starts = (torch.zeros(n, dtype=torch.int32, device="meta") for n in (1, 2))
    batch = PagedBatch(table, lengths, starts)
    near = torch.empty(1, 4, 128, device="meta")
    far = torch.empty_strided((1, 4, 128), (128, 1 << 30, 1), device="meta")
    for name, tensors in {"query": (far, near), "out": (near, far)}.items():
        with pytest.raises(ValueError, match=rf"^{name} has 1073741824 elements from one head to the next"):
            api.attend_prefill(tensors[0], pages, layout, batch, 0.1, tensors[1])
    slots = torch.zeros(1, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"^value has 1073741824 elements"):
        api.store(near, far, pages, slots, layout)


def test_missing_gluon_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    assert not device.gluon_available.__wrapped__()
    assert "Triton's Gluon cannot be used" in caplog.text
    assert not device.is_hopper(CPU)


@pytest.mark.parametrize("k_bits", K_BITS)
def test_only_widened_pages_take_scratch_memory(kernels, k_bits: int) -> None:
    taken = api.prefill_scratch_bytes(torch.device(kernels.device), PageLayout(128, k_bits), 4)
    half = device.fp8_path(torch.device(kernels.device)) == "half"
    assert taken == (widen.SCRATCH if ON_GPU and (k_bits == 4 or half) else 0)


# --- The CPU path -------------------------------------------------------------------------------------------------------------


def test_tokens_without_a_slot_are_not_stored() -> None:
    """A serving engine pads keys and values, and has no slots for the padding."""
    key, value, slots = torch.randn(5, 2, 64), torch.randn(5, 2, 64), torch.tensor([0, -1, 2])
    whole, padded = LAYOUT.empty(1, 2), LAYOUT.empty(1, 2)
    api.store(key[:3], value[:3], whole, slots, LAYOUT)
    api.store(key, value, padded, slots, LAYOUT)
    assert torch.equal(whole, padded)
    assert whole.any()


@pytest.mark.parametrize("k_bits", K_BITS)
def test_store_on_a_cpu(k_bits: int) -> None:
    calibrated = {"smooth": True, "smooth_v": True, "equalize": True}
    batch = make_batch(PageLayout(80, k_bits), [(200, 1), (70, 3)], heads=4, kv_heads=2, **calibrated)
    written = batch.garbage.clone()
    api.store(batch.key, batch.value, written, batch.slots, batch.layout, batch.calibration)
    assert torch.equal(written, batch.pages)


@pytest.mark.parametrize("k_bits", K_BITS)
@pytest.mark.parametrize("attend", [api.attend_prefill, api.attend_decode])
def test_rows_of_no_request_stay_as_they_are(attend: Callable[..., None], k_bits: int) -> None:
    """Attention of the requests in the middle of a batch writes their rows, all of them, and no other."""
    batch = make_batch(PageLayout(64, k_bits), [(90, 2), (300, 5), (0, 0), (70, 3), (40, 4)], heads=8, kv_heads=2, smooth=True)
    modifiers = Modifiers(50, 15.0, torch.linspace(-3, 6, 8), batch.calibration)
    expected = reference.attention(*batch.attention_args(), modifiers)
    out = poisoned(batch.query)
    attend(batch.query, batch.pages, batch.layout, batch.requests.requests(1, 4), batch.scale, out, modifiers)
    assert relative_error(out[2:10], expected[2:10]) < 1e-3
    assert out[:2].isnan().all()
    assert out[10:].isnan().all()


def test_decode_does_not_smooth_queries() -> None:
    batch = make_batch(PageLayout(64), [(90, 8), (300, 8)], heads=8, kv_heads=2, query_bias=8.0)
    outputs = [poisoned(batch.query) for _ in range(4)]
    smooth = Modifiers(q_block=api.smoothing_block(CPU, batch.layout, 4))
    api.attend_decode(*batch.attention_args(), outputs[0])
    api.attend_decode(*batch.attention_args(), outputs[1], smooth)
    api.attend_prefill(*batch.attention_args(), outputs[2])
    api.attend_prefill(*batch.attention_args(), outputs[3], smooth)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[3])


@pytest.mark.parametrize("query_block", [0, 128])
@pytest.mark.parametrize("shifted", [False, True])
def test_memory_on_a_cpu(shifted: bool, query_block: int) -> None:
    """Summaries, selection, and attention to the selected pages, which are read at shifted positions if `shifted`."""
    table = reference.rope_shift_table(10000.0 ** -(torch.arange(0, 64, 2) / 64), 64, 64) if shifted else None
    memory = Memory(sink_tokens=64, local_tokens=150, topk_pages=3, query_block=128, trained_tokens=400 if shifted else 0)
    batch = make_batch(LAYOUT, REQUESTS, heads=4, kv_heads=2, smooth=True, equalize=True)
    starts = torch.nn.functional.pad(batch.requests.seq_lens.cumsum(0), (1, 0))
    whole = replace(batch.requests, query_start_loc=starts)  # the contexts as if they were stored in one step
    expected_pages = batch.pages.clone()
    reference.store_summaries(expected_pages, LAYOUT, whole, table, batch.calibration)
    api.store_summaries(batch.pages, LAYOUT, whole, int(starts[-1]), table, batch.calibration)
    assert torch.equal(batch.pages, expected_pages)

    chosen = api.select_pages(batch.query, batch.pages, LAYOUT, batch.requests, memory, query_block, table)
    assert chosen.block_table.shape[1] == 2, "each KV head has its own pages"
    if shifted:
        assert chosen.rope_shift is not None
        assert chosen.rope_shift.pages.shape == chosen.block_table.shape
        assert chosen.rope_shift.pages.any()
    else:
        assert chosen.rope_shift is None
    modifiers = Modifiers(calibration=batch.calibration, sinks=torch.linspace(-3, 6, 4))
    expected = reference.attention(batch.query, batch.pages, LAYOUT, chosen, batch.scale, modifiers)
    for attend in (api.attend_prefill, api.attend_decode):
        out = poisoned(batch.query)
        attend(batch.query, batch.pages, LAYOUT, chosen, batch.scale, out, modifiers)
        assert relative_error(out, expected) < 1e-3
    if shifted:  # the shift is not ignored
        out = poisoned(batch.query)
        api.attend_prefill(batch.query, batch.pages, LAYOUT, replace(chosen, rope_shift=None), batch.scale, out, modifiers)
        assert relative_error(out, expected) > 1e-2


# --- Views of batches and modifiers -------------------------------------------------------------------------------------------


def test_requests_of_a_batch() -> None:
    table = torch.arange(24, dtype=torch.int32).view(3, 2, 4)
    shift = RopeShift(table + 100, torch.zeros(5, 64))
    lengths, starts = torch.tensor([10, 20, 30]), torch.tensor([0, 1, 3, 6])
    batch = PagedBatch(table, lengths, starts, max_query_len=3, max_seq_len=30, rope_shift=shift)
    assert batch.num_requests == 3
    assert batch.table_strides == (8, 4)
    assert replace(batch, block_table=table[:, 0]).table_strides == (8, 0)
    part = batch.requests(1, 2, max_query_len=2)
    assert torch.equal(part.block_table, table[1:2])
    assert torch.equal(part.rope_shift.pages, shift.pages[1:2])
    assert part.rope_shift.table is shift.table
    assert (part.seq_lens.tolist(), part.query_start_loc.tolist()) == ([20], [1, 3])
    assert (part.max_query_len, part.max_seq_len) == (2, 30)
    assert part.seq_lens.data_ptr() == lengths[1:].data_ptr(), "a view"
    assert batch.requests(1).query_start_loc.tolist() == [1, 3, 6]


def test_modifiers_of_some_heads() -> None:
    sinks, k_anchor, equalizer = torch.arange(6.0), torch.arange(12.0).view(3, 4), torch.arange(12.0).view(3, 4) + 1
    order = torch.arange(6, dtype=torch.int32).view(3, 2)
    part = Modifiers(5, 2.0, sinks, LayerCalibration(k_anchor, equalizer, order), 7).heads(slice(1, 3), group=2)
    assert (part.window, part.soft_cap, part.q_block, part.calibration.v_anchor) == (5, 2.0, 7, None)
    assert torch.equal(part.sinks, sinks[2:6])
    assert torch.equal(part.calibration.k_anchor, k_anchor[1:3])
    assert torch.equal(part.calibration.equalizer, equalizer[1:3])
    assert torch.equal(part.calibration.order, order[1:3])


# --- Refusals -----------------------------------------------------------------------------------------------------------------


def refuses(message: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """`call` raises ValueError with one line that contains `message`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        call(*args, **kwargs)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


def calibrated(**tensors: torch.Tensor) -> dict[str, Any]:
    """An argument of `store`, and a field of Modifiers."""
    return {"calibration": LayerCalibration(**tensors)}


PAGES = LAYOUT.empty(6, 2)
WRONG_PAGES = [
    (PAGES.view(torch.int8), "pages are torch.int8 [6, 2, "),
    (PAGES[..., :-64], f"this layout takes uint8 [blocks, kv_heads, {LAYOUT.page_bytes}]"),
    (PAGES.flatten(1), f"pages are torch.uint8 [6, {2 * LAYOUT.page_bytes}]"),
]


@pytest.mark.parametrize(("pages", "message"), WRONG_PAGES, ids=["dtype", "page_bytes", "dimensions"])
def test_wrong_pages_are_refused(pages: torch.Tensor, message: str) -> None:
    batch = make_batch(LAYOUT, [(90, 5)], heads=4, kv_heads=2)
    out = poisoned(batch.query)
    refuses(message, api.store, batch.key, batch.value, pages, batch.slots, LAYOUT)
    refuses(message, api.attend_prefill, batch.query, pages, LAYOUT, batch.requests, SCALE, out)
    refuses(message, api.attend_decode, batch.query, pages, LAYOUT, batch.requests, SCALE, out)
    refuses(message, api.store_summaries, pages, LAYOUT, batch.requests, 5)
    refuses(message, api.select_pages, batch.query, pages, LAYOUT, batch.requests, Memory(), 0)
    assert out.isnan().all()


def test_layouts_without_summaries_are_refused() -> None:
    batch = make_batch(PageLayout(64), [(90, 5)], heads=4, kv_heads=2)
    message = "the layout has no summaries; make it with PageLayout(..., has_summary=True)"
    refuses(message, api.store_summaries, batch.pages, batch.layout, batch.requests, 5)
    refuses(message, api.select_pages, batch.query, batch.pages, batch.layout, batch.requests, Memory(), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(91, 2, 80)}, "key is [91, 2, 80]; these pages and slots take [91, 2, 64]"),
        ({"key": torch.zeros(91, 4, 64)}, "key is [91, 4, 64]"),
        ({"value": torch.zeros(90, 2, 64)}, "value is [90, 2, 64]; these pages and slots take [91, 2, 64]"),
        ({"value": torch.zeros(91, 128)}, "value is [91, 128]"),
        (calibrated(k_anchor=torch.zeros(2, 80)), "k_anchor is torch.float32 [2, 80]; it must be float32 [2, 64]"),
        (calibrated(v_anchor=torch.zeros(64)), "v_anchor is torch.float32 [64]"),
        (calibrated(v_anchor=torch.zeros(2, 64).half()), "v_anchor is torch.float16 [2, 64]; it must be float32 [2, 64]"),
    ],
    ids=lambda x: x[:30] if isinstance(x, str) else "",
)
def test_tokens_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    batch = make_batch(LAYOUT, [(90, 5)], heads=4, kv_heads=2)
    pages = batch.garbage.clone()
    arguments = {"key": batch.key, "value": batch.value, "pages": pages, "slots": batch.slots, "layout": LAYOUT}
    refuses(message, api.store, **{**arguments, **changes})
    assert torch.equal(pages, batch.garbage)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(8, 4, 80)}, "query is [8, 4, 80]; these pages take [tokens, heads, 64], heads a multiple of 2"),
        ({"query": torch.zeros(8, 5, 64)}, "query is [8, 5, 64]"),
        ({"query": torch.zeros(8, 256)}, "query is [8, 256]"),
        ({"out": torch.zeros(7, 4, 64)}, "out is [7, 4, 64]; it must have the shape of query, [8, 4, 64]"),
        ({"out": torch.zeros(8, 256)}, "out is [8, 256]"),
        ({"seq_lens": torch.tensor([90, 70, 5])}, "the batch has 3 seq_lens, 3 query_start_loc and 2 rows of block_table"),
        ({"query_start_loc": torch.tensor([0, 8])}, "the batch has 2 seq_lens, 2 query_start_loc and 2 rows"),
        ({"block_table": torch.zeros(1, 3)}, "3 query_start_loc and 1 rows of block_table; it must have 2, 3 and 2"),
        ({"block_table": torch.zeros(2, 4, 3)}, "block_table is [2, 4, 3]; dimension 1 must be the 2 KV heads"),
        ({"sinks": torch.zeros(2)}, "sinks has 2 entries; it must have one per query head, 4"),
        (calibrated(k_anchor=torch.zeros(4, 64)), "k_anchor is torch.float32 [4, 64]; it must be float32 [2, 64]"),
        (calibrated(v_anchor=torch.zeros(2, 64).bfloat16()), "v_anchor is torch.bfloat16 [2, 64]; it must be float32 [2, 64]"),
        (calibrated(order=torch.zeros(2, 64).int()), "order is torch.int32 [2, 64]; it must be int32 [2, 32], contiguous"),
        (calibrated(equalizer=torch.ones(64, 2).T), "equalizer is torch.float32 [2, 64]; it must be float32 [2, 64], cont"),
    ],
    ids=lambda x: x[:30] if isinstance(x, str) else "",
)
@pytest.mark.parametrize("attend", [api.attend_prefill, api.attend_decode])
def test_attention_arguments_that_do_not_fit_are_refused(
    attend: Callable[..., None], changes: dict[str, Any], message: str
) -> None:
    batch = make_batch(LAYOUT, [(90, 5), (70, 3)], heads=4, kv_heads=2)
    requests = replace(batch.requests, **{name: x for name, x in changes.items() if hasattr(batch.requests, name)})
    modifiers = Modifiers(**{name: x for name, x in changes.items() if hasattr(Modifiers(), name)})
    query, out = changes.get("query", batch.query), changes.get("out", poisoned(batch.query))
    before = out.clone()
    refuses(message, attend, query, batch.pages, LAYOUT, requests, SCALE, out, modifiers)
    assert torch.equal(out.isnan(), before.isnan()), "the output was written"


def test_page_selection_takes_a_table_past_the_trained_length_only() -> None:
    """With one that it does not need, the GPU's kernels would leave the pages of the RopeShift unwritten, and attention would
    read the table out of bounds."""
    table, lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[0]], [1], [0, 1]))
    batch, memory = PagedBatch(table, lengths, starts), Memory(trained_tokens=8192)
    with pytest.raises(ValueError, match="trained_tokens is 8192, which needs a shift_table"):
        api.select_pages(torch.zeros(1, 4, 64), LAYOUT.empty(1, 2), LAYOUT, batch, memory, 0)
    with pytest.raises(ValueError, match="trained_tokens is 0, which takes no shift_table"):
        api.select_pages(torch.zeros(1, 4, 64), LAYOUT.empty(1, 2), LAYOUT, batch, Memory(), 0, torch.zeros(2, 64))
    wrong = replace(batch, query_start_loc=torch.tensor([0, 1, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"the batch has 1 seq_lens, 3 query_start_loc"):
        api.select_pages(torch.zeros(1, 4, 64), LAYOUT.empty(1, 2), LAYOUT, wrong, Memory(), 0)

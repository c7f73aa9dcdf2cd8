# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode alike: accuracy on long rows, independence of the schedule, extreme logits, padding."""

import sys
from functools import partial

import pytest
import torch
from kernel_cases import DECODE_ERROR, KERNEL_ERROR, ON_GPU, SCHEDULE_ERROR, build
from paged_batch import Batch, make_batch, poisoned, relative_error

from sage_kernels import Modifiers, PagedBatch, cpu, reference
from sage_kernels.portable import decode, prefill, query_tile, store, widen
from sage_paged import K_BITS, PageLayout


@pytest.mark.parametrize("k_bits", K_BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_long_rows(kernels, head_dim: int, k_bits: int) -> None:
    layout = PageLayout(head_dim, k_bits)
    shape = {"layout": layout, "requests": [(500, 8), (700, 8)], "heads": 8, "kv_heads": 2}
    shape |= {"smooth": True, "value_bias": 4.0, "smooth_v": True, "equalize": True}
    batch, modifiers, expected = build(shape, {"sinks": True}, kernels.device)
    for run, options in ((kernels.prefill, {}), (kernels.decode, {"programs": 7})):
        out = poisoned(batch.query)
        run(*batch.attention_args(), out, modifiers, **options)
        assert relative_error(out, expected) < 1e-3


@pytest.fixture
def without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable kernels and the reference as on a GPU without FP8: P and V in float16."""
    for module in (store, query_tile, prefill, decode, widen):
        monkeypatch.setattr(module, "fp8_path", lambda _: "half")
    # Their answers are kept.
    monkeypatch.setattr(prefill, "tile", prefill.tile.__wrapped__)
    for module in (prefill, decode):
        monkeypatch.setattr(module, "pipeline_stages", query_tile.pipeline_stages.__wrapped__)
    specification = sys.modules["sage_kernels.reference.attention"]  # its package has a function of that name
    monkeypatch.setattr(specification, "quantize_p", partial(reference.quantize_p, dtype=torch.float16))


@pytest.mark.parametrize("variant", [{}, {"window": 130, "soft_cap": 15.0}], ids=["plain", "window and cap"])
@pytest.mark.parametrize(("k_bits", "v_bits"), [(8, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize("head_dim", [64, 80, 112, 128, 256])
@pytest.mark.usefixtures("without_fp8")
def test_half_precision(kernels, head_dim: int, k_bits: int, v_bits: int, variant: dict[str, float]) -> None:
    """A page that is partly filled, and memory behind it that holds NaN, are in it. With P in e4m3 it would be further away."""
    shape = {"layout": PageLayout(head_dim, k_bits, v_bits=v_bits), "requests": [(500, 8), (90, 5)], "heads": 8, "kv_heads": 2}
    shape |= {"smooth": True, "value_bias": 4.0, "smooth_v": True, "equalize": True}
    batch, modifiers, expected = build(shape, {**variant, "sinks": True}, kernels.device)
    for run in (prefill.prefill, decode.decode):
        out = poisoned(batch.query)
        run(*batch.attention_args(), out, modifiers)
        assert relative_error(out, expected) < 1e-3


def test_result_does_not_depend_on_the_schedule(kernels) -> None:
    """A query's output is the same in a whole prompt and in a chunk, and as a decode by any number of programs."""
    layout = PageLayout(128)
    whole = make_batch(layout, [(500, 500)], heads=8, kv_heads=2, device=kernels.device, smooth_v=True)
    modifiers = Modifiers(sinks=torch.linspace(-3, 6, 8, device=kernels.device), calibration=whole.calibration)
    prompt = poisoned(whole.query)
    kernels.prefill(*whole.attention_args(), prompt, modifiers)
    for n in (1, 3, 77):
        starts = torch.tensor([0, n], dtype=torch.int32, device=kernels.device)
        requests = PagedBatch(whole.requests.block_table, whole.requests.seq_lens, starts, max_query_len=n)
        tail = whole.query[-n:], whole.pages, layout, requests, whole.scale
        chunk = poisoned(whole.query[-n:])
        kernels.prefill(*tail, chunk, modifiers)
        assert relative_error(chunk, prompt[-n:]) < SCHEDULE_ERROR
        decoded = []
        for programs in (1, 3, 8) if n <= 8 else ():
            decoded.append(poisoned(whole.query[-n:]))
            kernels.decode(*tail, decoded[-1], modifiers, programs=programs)
            assert relative_error(decoded[-1], decoded[0]) < SCHEDULE_ERROR
            assert relative_error(decoded[-1], prompt[-n:]) < DECODE_ERROR


@pytest.mark.parametrize("steps", [(0.0, 90.0, -60.0, 180.0), (200.0, 0.0, -200.0, 199.0), (-300.0, -250.0, -350.0, -300.0)])
@pytest.mark.parametrize("k_bits", K_BITS)
def test_pages_whose_logits_lie_far_apart(kernels, k_bits: int, steps: tuple[float, ...]) -> None:
    """From page to page, the largest logit rises and falls by more than a float32 has exponents for."""
    batch = make_batch(PageLayout(128, k_bits), [(500, 8)], heads=8, kv_heads=2)
    batch.key[:, :, 0] = torch.tensor(steps).repeat_interleave(128)[: len(batch.key), None]
    batch.query[:, :, 0] = 128**0.5
    reference.store(batch.key, batch.value, batch.pages, batch.slots, batch.layout)
    expected = reference.attention(*batch.attention_args())
    batch = batch.to(kernels.device)
    for run, options in ((kernels.prefill, {}), (kernels.decode, {"programs": 3})):
        out = poisoned(batch.query)
        run(*batch.attention_args(), out, **options)
        assert relative_error(out, expected) < KERNEL_ERROR


def test_many_pages(kernels) -> None:
    """Sums are carried from one page's softmax reference to the next, over and over."""
    shape = {"layout": PageLayout(64, 8, 64), "requests": [(12000 if ON_GPU else 4000, 1)], "heads": 4, "kv_heads": 1}
    batch, modifiers, expected = build(shape, {}, kernels.device)
    for run, options in ((kernels.prefill, {}), (kernels.decode, {"programs": 1}), (kernels.decode, {"programs": 5})):
        out = poisoned(batch.query)
        run(*batch.attention_args(), out, modifiers, **options)
        assert relative_error(out, expected) < max(1e-3, DECODE_ERROR)


def test_requests_without_queries_and_padding_are_left_alone(kernels) -> None:
    """A captured graph runs with padding requests: no query tokens, no length, and rows of no request."""
    batch = make_batch(PageLayout(64), [(90, 1), (70, 1)], heads=4, kv_heads=2, device=kernels.device)
    expected = poisoned(batch.query)
    kernels.decode(*batch.attention_args(), expected)
    query, requests = torch.cat([batch.query, batch.query]), batch.requests
    padded = PagedBatch(
        torch.cat([requests.block_table, requests.block_table]),
        torch.cat([requests.seq_lens, torch.zeros_like(requests.seq_lens)]),
        torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32, device=kernels.device),
    )
    for run in (kernels.decode, kernels.prefill):
        out = poisoned(query)
        run(query, batch.pages, batch.layout, padded, batch.scale, out)
        assert torch.equal(out[:2], expected) or relative_error(out[:2], expected) < DECODE_ERROR
        assert out[2:].isnan().all()


def sampled_row(batch: Batch, request: int, row: int, window: int, sinks: torch.Tensor) -> torch.Tensor:
    """A row of attention to the keys and values that the pages hold, in float64 and without quantized weights, for one KV head:
    [heads, head_dim]. row: of batch.query."""
    codes, scale, v, v_exponent = (
        x[0].double() for x in reference.load(batch.pages, batch.requests.block_table[request], batch.layout)
    )
    position = int(batch.requests.seq_lens[request]) - int(batch.requests.query_start_loc[request + 1]) + row
    seen = slice(max(0, position - window + 1), position + 1)
    keys = reference.restore_keys((codes * scale[:, None]).float()[None], batch.calibration, batch.layout)[0, seen].double()
    weights = (batch.query[row].double() @ keys.T * batch.scale).exp()
    values = v[seen] * v_exponent[seen, None].exp2()
    return weights @ values / (weights.sum(-1) + sinks.double().exp())[:, None]


@pytest.mark.parametrize("k_bits", K_BITS)
@pytest.mark.parametrize("window", [127, 128, 129])
def test_sinks_and_windows_of_about_a_page(kernels, window: int, k_bits: int) -> None:
    """Reports of this kind: a window that is a token too long or too short where it is about as long as a page, or a sink that
    is weighed wrongly there. Keys at the start of each row's window have much of its weight. Against the reference and, in some
    rows, against float64."""
    requests, rows = [(300, 8), (129, 3), (128, 1)], [(0, 0), (0, 3), (0, 7), (1, 8), (1, 10), (2, 11)]
    batch = make_batch(PageLayout(64, k_bits), requests, heads=2, kv_heads=1, smooth=True)
    direction = torch.full((64,), 0.125)  # of length 1
    batch.query = (0.3 * batch.query + 8 * direction).to(batch.query.dtype)
    first_token = 0
    for length, queries in requests:
        oldest = length - queries - window  # one before the window of the first row
        for nth, at in enumerate(range(max(0, oldest), length - window + 2)):
            batch.key[first_token + at] += (10 - 0.3 * nth) * direction
        first_token += length
    reference.store(batch.key, batch.value, batch.pages, batch.slots, batch.layout, batch.calibration)
    modifiers = Modifiers(window, sinks=torch.tensor([11.0, 9.0]), calibration=batch.calibration)
    expected = reference.attention(*batch.attention_args(), modifiers)
    exact = [sampled_row(batch, *at, window, modifiers.sinks) for at in rows]
    for wrong_window in (window - 1, window + 1):
        wrong = [sampled_row(batch, *at, wrong_window, modifiers.sinks) for at in rows[:3]]
        assert min(map(relative_error, wrong, exact[:3])) > 0.1, "this test would not notice another window"
    wrong = [sampled_row(batch, *at, window, modifiers.sinks + 1) for at in rows[:3]]
    assert max(map(relative_error, wrong, exact[:3])) > 0.2, "this test would not notice another sink"
    on_device, of_layer = batch.to(kernels.device), modifiers.to(kernels.device)
    runs = [(kernels.prefill, {}), (kernels.decode, {"programs": 3})]
    for run, options in runs if ON_GPU else [*runs, (cpu.attention, {})]:
        out = poisoned(on_device.query)
        run(*on_device.attention_args(), out, of_layer, **options)
        assert relative_error(out, expected) < KERNEL_ERROR
        for (_, row), row_of_exact in zip(rows, exact, strict=True):
            assert relative_error(out[row], row_of_exact) < 0.04  # weights are rounded by up to a sixteenth; 0.02 is seen

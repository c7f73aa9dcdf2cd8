# SPDX-License-Identifier: Apache-2.0
"""benchmarks/attention.py, as far as it runs without a GPU: its figures, checks, reports and refusals. And how
benchmarks/engine.py reports runs that fail, and what sanitizer.py and host_pages.py make of what they find."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from engines import environment

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "attention.py"


def load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def attention() -> ModuleType:
    return load(SCRIPT)


def test_text_is_held_out_by_its_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files with copies under other names: each text once, some held out, in whatever order they come."""
    corpus = load(SCRIPT.with_name("corpus.py"))
    texts = [(f"{i}.py", f"{i} ".encode() * 1500) for i in range(300)]
    found = []
    for order in (texts, texts[::-1]):
        copies = [("copy of " + name, content) for name, content in order]
        monkeypatch.setattr(corpus, "files", lambda kind, all_files=order + copies: iter(all_files))
        found.append([sorted(each) for each in corpus.collect("code")])
    assert found[0] == found[1]
    training, heldout, names = found[0]
    assert sorted(training + heldout) == sorted(content.decode() for _, content in texts)
    assert 0 < len(heldout) == len(names) < 20
    monkeypatch.setitem(corpus.LIMITS, "code", 9000)
    assert sorted(map(len, corpus.collect("code")[0])) == [3000, 6000]  # the last order: a long one, and a later one that fits


def test_answers_of_two_servers_are_compared_up_to_the_first_other_token() -> None:
    """And with it: a tie shows there, as does a token that one server finds unlikely."""
    disaggregation = load(SCRIPT.with_name("disaggregation.py"))

    def answer(tokens: str, *values: float) -> dict[str, Any]:
        filled = [*values, *[-1.0] * (disaggregation.ANSWER - len(values))]
        return {"logprobs": {"tokens": list(tokens.ljust(disaggregation.ANSWER, "z")), "token_logprobs": filled}}

    moved, own = (
        [answer("abc", -1.0, -2.0), answer("ab", -1.0, -2.0, -9.0)],
        [answer("abc", -1.5, -2.0), answer("ax", -1.0, -2.25)],
    )
    same, changes = disaggregation.compare(moved, own)
    assert same == 1
    assert changes == [0.5, *[0.0] * (disaggregation.ANSWER - 1), 0.0, 0.25]


CASES = [("prefill", 1, 5, 5), ("prefill", 3, 5, 5), ("chunk", 1, 3, 7), ("decode", 4, 1, 9)]


def test_requests_of_two_lengths(attention: ModuleType) -> None:
    case = attention.decode_case("9+3x5")
    assert case == attention.Case("decode", 4, 1, 9, others=5)
    assert (case.name, case.lengths, case.pairs) == ("decode 9+3x5", [9, 5, 5, 5], 24)
    data = attention.Batch.make(case, attention.Shape(4, 2, 64), "cpu")
    sample = attention.Sample.draw(data, rows=16)
    paging = data.paging(4)
    keys, values = (x.flatten(0, 1).float() for x in attention.filled(data, paging, torch.bfloat16))
    out = data.poisoned().float()
    for request, length in enumerate(data.seq_lens.tolist()):
        tokens = torch.arange(length)
        slots = paging.block_table[request, tokens // 4].long() * 4 + tokens % 4
        query, key, value = (x.transpose(0, 1) for x in (data.query[request : request + 1].float(), keys[slots], values[slots]))
        out[request] = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)[:, 0]
    assert sample.error(out) < 1e-5


@pytest.mark.parametrize(("kind", "batch", "queries", "length"), CASES)
def test_pairs(attention: ModuleType, kind: str, batch: int, queries: int, length: int) -> None:
    case = attention.Case(kind, batch, queries, length)
    history = length - queries
    assert case.pairs == batch * sum(key <= history + query for query in range(queries) for key in range(length))
    assert case.operations(attention.Shape(8, 2, 64)) == 4 * 8 * 64 * case.pairs


def test_kv_bytes(attention: ModuleType) -> None:
    per_token = {name: contender.kv_bytes(128) for name, contender in attention.CONTENDERS.items()}
    assert per_token["sage-int8"] == 128 + 128 + 8
    assert per_token["sage-int4"] == 64 + 128 + 28
    assert per_token["sage-int4-v4"] == 64 + 64 + 32
    assert per_token["triton-int8"] == per_token["triton-fp8"] == 2 * (128 + 4)
    assert per_token["triton-int4"] == 2 * (64 + 4)
    assert {per_token[name] for name in per_token if name.endswith("bf16") or name.startswith("sageattention")} == {512}
    assert {per_token[name] for name in ("fa3-fp8", "fa3-fp8-q", "flashinfer-fp8")} == {256}


def test_figures(attention: ModuleType) -> None:
    shape, contender = attention.Shape(32, 8, 128), attention.CONTENDERS["fa3-bf16"]
    times = [2.0, 1.0, 3.0]
    decode = attention.figures(contender, attention.Case("decode", 64, 1, 8192), shape, times)
    assert decode["kv_bytes"] == 64 * 8192 * 8 * 512
    assert decode["gb_per_s"] == round(decode["kv_bytes"] / 2e-3 / 1e9, 1)
    assert (decode["ms"], decode["ms_p10"], decode["ms_p90"], decode["rounds"]) == (2.0, 1.2, 2.8, 3)
    prefill = attention.figures(contender, attention.Case("prefill", 1, 4096, 4096), shape, times)
    assert prefill["tops"] == round(4 * 32 * 128 * (4096 * 4097 // 2) / 2e-3 / 1e12, 1)


def test_sustained_speed(attention: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the second half counts, when the clock has gone down and calls take four times as long."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys, time\n"
        "assert '--loop-ms=100' in sys.argv and '--id=GPU-42' in sys.argv\n"
        "for i in range(1000):\n"
        "    print('1980, 300.5, Not Active' if i < 5 else '1750, 699.0, Active', flush=True)\n"
        "    time.sleep(0.1)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid=42))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    start, ends = time.perf_counter(), []

    def call() -> None:
        time.sleep(0.02 if time.perf_counter() - start < 0.9 else 0.08)
        ends.append(time.perf_counter())

    per_second, drawn = attention.sustain(call, 50, 3)
    half = (ends[-1] - start) / 2  # a busy machine lets calls take longer than they sleep
    assert per_second == pytest.approx(sum(end - start > half for end in ends) / half, rel=0.3)
    assert per_second < 15
    assert drawn == {"sm_mhz": 1750.0, "watts": 699.0, "power_capped": 1.0}
    assert attention.power(["1980, 300.0, Not Active", "1750, 700.0, Active"])["power_capped"] == 0.5
    assert attention.power([]) == attention.power(["1980, [N/A], Not Active"]) == {}
    assert attention.power(['Field "clocks_event_reasons.sw_power_cap" is not a valid field to query.']) == {}
    with pytest.raises(ZeroDivisionError):  # and nothing is left running
        attention.sustain(lambda: 1 / 0, 50, 3)


def test_interleaving(attention: ModuleType) -> None:
    """All take part in every round, except those that have used up their share of the time."""
    cost = {"quick": 1.0, "slow": 1000.0}
    times = attention.interleaved({name: name for name in cost}, cost.__getitem__, rounds=20, seconds=1)
    assert {name: len(taken) for name, taken in times.items()} == {"quick": 20, "slow": attention.LEAST_ROUNDS}


@pytest.mark.parametrize(("kind", "batch", "queries", "length"), CASES)
def test_exact_rows_and_paging(attention: ModuleType, kind: str, batch: int, queries: int, length: int) -> None:
    shape = attention.Shape(4, 2, 64)
    data = attention.Batch.make(attention.Case(kind, batch, queries, length), shape, "cpu")
    sample = attention.Sample.draw(data, rows=16)
    query, key, value = (x.float().unflatten(0, (batch, -1)).transpose(1, 2) for x in (data.query, data.key, data.value))
    mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    assert sample.error(whole.transpose(1, 2).flatten(0, 1)) < 1e-5
    with pytest.raises(attention.Unfit, match="NaN"):
        sample.error(data.poisoned())

    paging = data.paging(4)
    keys, values = attention.filled(data, paging, torch.float8_e4m3fn)
    for cache, tensor in ((keys, data.key), (values, data.value)):
        gathered = cache.float()[paging.block_table.long()].flatten(1, 2)[:, :length].flatten(0, 1)
        assert torch.equal(gathered, tensor.to(torch.float8_e4m3fn).float())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["sage-int8", "sage-int4", "sage-int4-v4"])
@pytest.mark.parametrize(("kind", "batch", "queries", "length"), [("chunk", 1, 5, 200), ("decode", 2, 1, 200)])
def test_our_contenders(attention: ModuleType, name: str, kind: str, batch: int, queries: int, length: int) -> None:
    shape = attention.Shape(4, 2, 64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = attention.Batch.make(attention.Case(kind, batch, queries, length), shape, device)
    sample = attention.Sample.draw(data, rows=8)
    result, prepared = attention.prepare(attention.CONTENDERS[name], data, sample)
    assert prepared is not None, result
    assert prepared.store is not None
    assert 0 < result["error"] < attention.CONTENDERS[name].bound


def test_failures_are_reported(attention: ModuleType) -> None:
    data = attention.Batch.make(attention.Case("decode", 1, 1, 8), attention.Shape(2, 1, 64), "cpu")
    sample = attention.Sample.draw(data, rows=4)

    def contender(prepare: Any) -> Any:
        return attention.Contender("x-y", "X", lambda head_dim: 1, 0.1, prepare)

    def broken(batch: Any) -> Any:
        raise ImportError("/opt/somewhere/libx.so.1: cannot open\nmore of it")

    wrong = attention.Prepared(lambda: torch.zeros_like(data.query))
    assert attention.prepare(contender(broken), data, sample)[0]["failed"] == "ImportError: libx.so.1: cannot open"
    result, prepared = attention.prepare(contender(lambda batch: wrong), data, sample)
    assert prepared is None
    assert result["failed"] == "relative error 1 exceeds 0.1"


@pytest.fixture
def report() -> dict[str, Any]:
    """A report of two contenders and one that failed. SAGE is twice as fast as FlashAttention-3."""

    def result(name: str, ms: float, bytes_per_token: int, error: float) -> dict[str, Any]:
        figures = {"tops": 400 / ms, "gb_per_s": 2000 / ms, "kv_bytes": 1 << 30, "rounds": 25}
        spread = {"ms": ms, "ms_p10": ms * 0.98, "ms_p90": ms * 1.05}
        facts = {"contender": name, "label": name.upper(), "kv_bytes_per_token_head": bytes_per_token, "error": error}
        return facts | spread | figures

    def case(kind: str, name: str, batch: int, length: int) -> dict[str, Any]:
        absent = {"contender": "cudnn-bf16", "label": "cuDNN", "failed": "takes whole prompts only"}
        results = [result("fa3-bf16", 1.0, 512, 0.002), result("sage-int8", 0.5, 264, 0.03), absent]
        return {"case": f"{kind} {name}", "kind": kind, "batch": batch, "length": length, "results": results}

    store = case("prefill", "32768", 1, 32768)
    store["results"][1]["store"] = {"ms": 0.025, "ms_p10": 0.02, "ms_p90": 0.03, "rounds": 25}
    lost = case("decode", "1x99999999", 1, 99999999) | {"results": [], "failed": "out of memory"}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "device": {"name": "a GPU"},
        "shape": {"heads": 32, "kv_heads": 8, "head_dim": 128},
        "cases": [
            case("prefill", "4096", 1, 4096),
            store,
            case("decode", "64x8192", 64, 8192),
            lost,
        ],
    }


def test_table(attention: ModuleType, report: dict[str, Any]) -> None:
    known = {"sm_mhz": 1750.0, "watts": 699.0, "power_capped": 1.0}
    theirs, ours, _ = report["cases"][2]["results"]
    theirs["sustained"], ours["sustained"] = {"gb_per_s": 1900.0} | known, {"gb_per_s": 3900.0}
    lines = attention.table(report).splitlines()
    assert [line.split() for line in lines if "SAGE-INT8" in line] == [
        ["SAGE-INT8", "0.500", "0.490", "-", "0.525", "800", "2.00x", "0.0300", "264"],
        ["SAGE-INT8", "0.500", "0.490", "-", "0.525", "800", "2.00x", "0.0300", "264", "0.025", "5.0%"],
        ["SAGE-INT8", "0.500", "0.490", "-", "0.525", "4000", "1073.7", "2.00x", "0.0300", "264", "3900"],
    ]
    assert [line.split()[-3:] for line in lines if "sustained GB/s" in line] == [["GB/s", "MHz", "W"]]
    assert [line.split()[-3:] for line in lines if "FA3-BF16" in line][-1] == ["1900", "1750", "699"]
    assert lines.count("  cuDNN: not timed: takes whole prompts only") == 3
    assert lines[-1] == "  decode 1x99999999: not measured: out of memory"


def test_plot(attention: ModuleType, report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    attention.main(["plot", str(file)])
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in written] == [f"report-{kind}.png" for kind in ("prefill", "decode", "error")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run", "nothing to do: give --prefill, --store, --chunk or --decode"),
        ("run --prefill 0", "argument --prefill: '0' is not a positive integer"),
        ("run --decode 64", "argument --decode: '64' is not BxS, two positive integers"),
        ("run --chunk 0x5", "argument --chunk: '0x5' is not QxH, two positive integers"),
        ("run --prefill 64 --contenders fa4", "unknown contender 'fa4'; there are sage-int8, "),
        ("run --prefill 64 --heads 6 --kv-heads 4", "--heads 6 is not a multiple of --kv-heads 4"),
        ("run --prefill 64 --as-if 9.0", "argument --as-if: '9.0' is not one of 8.0, 8.6, 8.9, 12.0"),
        ("draw", "argument command: invalid choice: 'draw'"),
    ],
)
def test_argument_errors(attention: ModuleType, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        attention.main(words.split())
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(("capability", "path", "early"), [((8, 0), "half", False), ((12, 0), "native", True)])
def test_standing_in(
    attention: ModuleType, capability: tuple[int, int], path: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels choose for the other compute capability, and Triton still compiles for the GPU that is there."""
    from sage_kernels import device

    monkeypatch.setenv("DISABLE_MMA_V3", "0")
    monkeypatch.setattr(device, "shared_memory", device.shared_memory)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    asked = device.fp8_path, device.is_hopper, device.multiplies_by_warp, device.dependent_launch
    cuda = torch.device("cuda")
    try:
        attention.stand_in(capability)
        assert (device.fp8_path(cuda), device.is_hopper(cuda), device.dependent_launch(cuda)["PDL"]) == (path, False, early)
        assert device.multiplies_by_warp(cuda)
        assert device.shared_memory(cuda) == attention.SHARED_MEMORY[capability] * 1024
        assert os.environ["DISABLE_MMA_V3"] == "1"
        assert torch.cuda.get_device_capability() == (9, 0)
    finally:
        for each in asked:
            each.cache_clear()


def test_command_line_to_cases(attention: ModuleType) -> None:
    words = "run --prefill 4096 64 16x1024 --store 64 128 --chunk 16x48 --decode 2x32"
    arguments = attention.parse(words.split())
    assert [(case.name, case.store) for case in attention.cases(arguments)] == [
        ("prefill 4096", False),
        ("prefill 64", True),
        ("prefill 16x1024", False),
        ("prefill 128", True),
        ("chunk 16x48", False),
        ("decode 2x32", False),
    ]


@pytest.mark.parametrize("content", [None, "", "[]", '{"cases": []}'])
def test_plot_of_something_else(attention: ModuleType, content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match=r"report\.json is not a report of `run`") as ended:
        attention.plot(SimpleNamespace(file=file))
    assert "\n" not in str(ended.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_run_without_a_gpu() -> None:
    command = [sys.executable, str(SCRIPT), "run", "--prefill", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "attention.py run: needs an NVIDIA GPU, and torch sees none here; `plot` works without\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_all_of_it_without_a_gpu() -> None:
    done = subprocess.run([str(SCRIPT.with_name("gpu.sh")), "none", "doctor"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == "benchmarks/gpu.sh: needs an NVIDIA GPU, and nvidia-smi lists none here\n"


def test_an_engine_that_fails_is_marked_and_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, out = load(SCRIPT.with_name("engine.py")), tmp_path / "engine.json"
    made: list[str] = []
    really_run = subprocess.run

    def run(command: Any, **how: Any) -> Any:
        if "--only" not in command:  # a library's own command
            return really_run(command, **how)
        name, file = command[-3], Path(command[-1])
        made.append(name)
        if name == "SAGE:k_bits=4":
            lines = ["    raise Error(", "ValueError: head size 64", "RuntimeError: See root cause above.", "Error in a hook"]
            return SimpleNamespace(returncode=1, stderr="\n".join(lines))
        file.write_text(json.dumps({"run": name, "kv_tokens": 1000}))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(engine.subprocess, "run", run)
    runs = ["SAGE", "SAGE:k_bits=4", "SAGE:variator.plugins=random"]
    with environment():
        monkeypatch.setattr("sys.argv", ["engine.py", *runs, "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            engine.main()
        assert ended.value.code == 1
        assert made == runs
        assert json.loads(out.read_text())["results"][1] == {"run": "SAGE:k_bits=4", "error": "head size 64"}
        assert "head size 64" in capsys.readouterr().out
        monkeypatch.setattr("sys.argv", ["engine.py", "SAGE", "SAGE:k_bits=5"])
        with pytest.raises(SystemExit, match='option "k_bits" in --additional-config "sage" is 5; it can be 4 or 8'):
            engine.main()
    assert made == runs


RESULTS = SCRIPT.parent / "results"


@pytest.fixture(scope="module")
def serving() -> ModuleType:
    return load(SCRIPT.with_name("serving.py"))


def test_servers_in_one_plot(serving: ModuleType, tmp_path: Path) -> None:
    """Of files with the same load; a run that failed is left out."""
    files = [RESULTS / f"serving-{name}-h200.json" for name in ("plain", "by-load")]
    (failed := tmp_path / "failed.json").write_text(json.dumps(json.loads(files[0].read_text()) | {"runs": [{"error": "no"}]}))
    report = serving.read([files[0], failed, files[1]])
    assert [run["run"] for run in report["runs"]] == ["SAGE", "SAGE:variator.plugins=random,variator.waiting=4"]
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")
    assert serving.plot(SimpleNamespace(files=files, out=tmp_path / "plot.png")) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_files_that_are_not_of_servers(serving: ModuleType, tmp_path: Path) -> None:
    (wrong := tmp_path / "wrong.json").write_text("[]")
    with pytest.raises(ValueError, match=r"wrong\.json is not a report of `run`"):
        serving.read([wrong])
    others = [RESULTS / f"serving-{name}-h200.json" for name in ("plain", "24gb-sage")]
    with pytest.raises(ValueError, match="the reports differ in shortest: 1024, 2048"):
        serving.read(others)


# sanitizer.py and host_pages.py


def test_reports_of_the_sanitizer() -> None:
    sanitizer = load(SCRIPT.with_name("sanitizer.py"))
    output = """========= COMPUTE-SANITIZER
heads of 64, K INT8, V 8 bits
========= Error: Race reported between Read access at _prefill_kernel+0x11110 in /a/copy.py:91
=========     and Write access at _prefill_kernel+0x2f8c0 in /a/copy.py:92 [5120 hazards]
=========
========= Error: Race reported between Write access at _prefill_kernel+0x30aa0 in /a/copy.py:92
=========     and Read access at _prefill_kernel+0x110d0 in /a/copy.py:91 [4096 hazards]
========= Invalid __global__ read of size 16 bytes
=========     at _decode_kernel+0x10 in decode.py:7
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
all kernels were called
"""
    assert sanitizer.reports(output) == {
        "race in _prefill_kernel: read at copy.py:91 and write at copy.py:92": 2,
        "Invalid __global__ read of size 16 bytes at _decode_kernel+0x10 in decode.py:7": 1,
    }


def test_the_sanitizer_calls_every_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sanitizer = load(SCRIPT.with_name("sanitizer.py"))
    called = {"store": 0, "attend_prefill": 0, "attend_decode": 0, "store_summaries": 0, "select_pages": 0, "fetch_pages": 0}

    def counted(name: str, call: Any) -> Any:
        def counting(*args: Any) -> Any:
            called[name] += 1
            return call(*args)

        return counting

    for name in called:
        monkeypatch.setattr(sanitizer.sage, name, counted(name, getattr(sanitizer.sage, name)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sanitizer.call_all()
    assert all(called.values()), called
    assert capsys.readouterr().out.endswith("all kernels were called\n")


@pytest.fixture
def clients() -> ModuleType:
    return load(SCRIPT.with_name("host_pages.py"))


def test_what_clients_ask(clients: ModuleType) -> None:
    """It depends on the client and the turn alone; some share prefixes, and some are aborted."""
    text = list(range(9000))
    asked = [clients.request(text, client, turn) for client in range(8) for turn in range(8)]
    assert asked == [clients.request(text, client, turn) for client in range(8) for turn in range(8)]
    assert len({tuple(each.prompt) for each in asked}) == 64
    assert max(len(each.prompt) + each.tokens for each in asked) <= clients.LONGEST
    firsts = [each.prompt[0] for each in asked]
    assert all(firsts.count(length) > 4 for length in clients.SHARED)
    assert 0 < sum(each.leaves is not None for each in asked) < 32


def test_answers_are_compared(clients: ModuleType) -> None:
    """A token that differs is a failure, unless it was nearly as likely as another."""

    def played(token: int, fetched: int, margin: float = 1.0, **changes: Any) -> Any:
        answers = {
            (client, 0): clients.Answer([1, token if client == 2 else 3], [-0.5, -0.25], [2.0, margin], 0, 10 + client)
            for client in range(4)
        }
        facts = {"steps": 20, "until": 13, "seconds": 1.0, "aborted": 1, "preemptions": 1, "lost": 0, "damage": ""}
        return clients.Played(answers, **{**facts, **changes}, fetched=fetched)

    report = clients.compare(played(3, 9), played(3, 0), 0.0)
    assert all(report["verdicts"].values())
    assert (report["answers"], report["answers with other tokens"]) == (3, 0), "one ended after the last was asked"
    report = clients.compare(played(4, 9, 0.25), played(3, 0, 0.25), 0.0)
    assert [name for name, holds in report["verdicts"].items() if not holds] == ["the same tokens"]
    assert (report["answers with other tokens"], report["largest margin where tokens differ"]) == (1, 0.25)
    assert all(clients.compare(played(4, 9, 0.25), played(3, 0, 0.25), 0.375)["verdicts"].values())
    for changes, verdict in (
        ({"lost": 2}, "all pages returned"),
        ({"damage": "of a layer"}, "frames hold what their pages hold"),
        ({"until": 5}, "answers were compared"),
        ({"preemptions": 0}, "requests were aborted and preempted"),
    ):
        verdicts = clients.compare(played(3, 9, **changes), played(3, 0), 0.0)["verdicts"]
        assert verdict in [name for name, holds in verdicts.items() if not holds]

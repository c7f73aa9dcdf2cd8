#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Load a running server with many clients, and check that requests end as they should and that counters add up.

    VLLM_API_KEY=some-key deploy/serve.sh
    python3 benchmarks/soak.py --key some-key --seconds 300 --out benchmarks/results/soak-cpu.json

Most requests stream a text to its end. Some clients hang up in the middle; others send prompts that are too long, bodies that
are not JSON, a wrong key or none. Afterwards the server must be healthy and idle, all pages of its KV cache must be free, and
its counters must agree with those of the clients. No one else may use the server during the run. The exit status is 1 if a
check fails.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
from common.report import command_line, save

KINDS = {"stream": 20, "hang up": 3, "too long": 2, "no JSON": 2, "wrong key": 2, "no key": 1}
"""What clients do, and how often."""
REFUSALS = {"too long": 400, "no JSON": 400, "wrong key": 401, "no key": 401}
MAX_TOKENS = 48
LONGEST = 512
"""More tokens than any prompt and answer have together."""
COUNTED = (
    "2xx", "4xx", "vllm:request_success_total", "vllm:generation_tokens_total", "vllm:num_preemptions_total",
    "sage_attended_tokens_total",
)  # fmt: skip
"""Counters of the server that go into the report."""
REQUEST_SECONDS = 300
IDLE_SECONDS = 60
"""How long the server may take to become idle after the last request."""


class Client:
    """Sends one request after another until `deadline` (of time.monotonic), and counts into `seen`."""

    def __init__(self, session: aiohttp.ClientSession, arguments: argparse.Namespace, seen: Counter[str], index: int) -> None:
        self._session, self._arguments, self._seen = session, arguments, seen
        self._rng, self._index = Random(index), index

    async def run(self, deadline: float) -> None:
        sent = 0
        while time.monotonic() < deadline:
            kind = self._rng.choices(list(KINDS), list(KINDS.values()))[0]
            try:
                outcome = await self._request(kind, f"# {self._index} {sent}\n")
            except (aiohttp.ClientError, TimeoutError) as error:
                outcome = f"{kind}: {type(error).__name__} {error}"
            self._seen[outcome] += 1
            sent += 1

    async def _request(self, kind: str, unique: str) -> str:
        """Send a request. Returns its kind if it ended as it should, else what went wrong. The prompt begins with `unique`, so
        that none of it is in the prefix cache."""
        lines = 1200 if kind == "too long" else self._rng.randrange(1, 24)
        body = {
            "model": self._arguments.model,
            "prompt": unique + "value = compute(value)\n" * lines,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text = json.dumps(body)
        headers = {"Content-Type": "application/json"}
        if kind != "no key":
            headers["Authorization"] = f"Bearer {self._arguments.key}{'x' if kind == 'wrong key' else ''}"
        if kind == "no JSON":
            text = text[: len(text) // 2]
        url = f"{self._arguments.url}/v1/completions"
        async with self._session.post(url, data=text, headers=headers) as response:
            if kind in REFUSALS:
                return kind if response.status == REFUSALS[kind] else f"{kind}: status {response.status}"
            if response.status != 200:
                return f"{kind}: status {response.status}"
            self._seen["accepted"] += 1
            pieces, usage, done = 0, None, False
            hang_up_after = self._rng.randrange(1, MAX_TOKENS // 2) if kind == "hang up" else None
            async for line in response.content:
                event = line.decode().strip().removeprefix("data: ")
                if event == "[DONE]":
                    done = True
                elif event:
                    pieces, usage = pieces + 1, json.loads(event).get("usage")
                if pieces == hang_up_after:
                    response.close()
                    return kind
            if not (done and usage and usage["completion_tokens"] == MAX_TOKENS):
                return f"{kind}: cut short after {pieces} pieces"
            self._seen["prompt tokens"] += usage["prompt_tokens"]
            self._seen["completion tokens"] += usage["completion_tokens"]
            return kind


async def scrape(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """The server's metrics, summed over labels. HTTP requests for completions are also summed by class of status, as "2xx"."""
    async with session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    values: dict[str, float] = {}
    for line in lines:
        if line.startswith("#"):
            continue
        series, _, value = line.rpartition(" ")
        names = [series.partition("{")[0]]
        if names == ["http_requests_total"] and 'handler="/v1/completions"' in series:
            names.append(series.partition('status="')[2][:3])
        for name in names:
            values[name] = values.get(name, 0.0) + float(value)
    return values


async def idle(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """The server's metrics once it is idle, or after IDLE_SECONDS."""
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        values = await scrape(session, url)
        busy = values["vllm:num_requests_running"] + values["vllm:num_requests_waiting"] + values["sage_kv_pages_in_use"]
        if not busy or time.monotonic() > deadline:
            return values
        await asyncio.sleep(0.5)


def judge(seen: Counter[str], grown: dict[str, float], after: dict[str, float], health: int) -> dict[str, bool]:
    """The checks, and whether each holds. grown: how much counters have grown during the run.

    When a client hangs up, the server may have sent the whole answer or nothing. Counters may differ by that much.
    """
    gone, preempted = seen["hang up"], grown["vllm:num_preemptions_total"]
    prompts, completions = seen["prompt tokens"], seen["completion tokens"]
    attended = prompts + completions - seen["stream"]  # the last token of each answer is not attended to
    return {
        "every request ended as it should": set(seen) <= {*KINDS, "accepted", "prompt tokens", "completion tokens"},
        "healthy": health == 200,
        "idle": after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0,
        "all pages returned": after["sage_kv_pages_in_use"] == after["vllm:kv_cache_usage_perc"] == 0,
        "HTTP counts the accepted": grown["2xx"] == seen["accepted"],
        # vLLM refuses requests without the key before it counts them.
        "HTTP counts the refused": grown["4xx"] == sum(seen[kind] for kind, status in REFUSALS.items() if status != 401),
        "no errors of the server": grown.get("5xx", 0) == 0,
        "requests add up": seen["stream"] <= grown["vllm:request_success_total"] <= seen["stream"] + gone,
        "output tokens add up": 0 <= grown["vllm:generation_tokens_total"] - completions <= gone * MAX_TOKENS,
        "attended tokens add up": 0 <= grown["sage_attended_tokens_total"] - attended <= (gone + preempted) * LONGEST,
    }


async def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    seen: Counter[str] = Counter()
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        before = await idle(session, arguments.url)
        began = time.monotonic()
        clients = [Client(session, arguments, seen, index) for index in range(arguments.clients)]
        await asyncio.gather(*(client.run(began + arguments.seconds) for client in clients))
        seconds = time.monotonic() - began
        after = await idle(session, arguments.url)
        async with session.get(f"{arguments.url}/health") as response:
            health = response.status
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {
        "seconds": round(seconds, 1),
        "seen": dict(sorted(seen.items())),
        "counted": {name: grown[name] for name in COUNTED},
        "verdicts": judge(seen, grown, after, health),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Load a running server with clients, and check it.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="sage-demo", help="its served name")
    parser.add_argument("--key", required=True, help="the server's API key (VLLM_API_KEY)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    report = asyncio.run(soak(arguments))
    print(json.dumps(report, indent=1))
    if arguments.out:
        made = {
            "command": command_line("benchmarks/soak.py", argv).replace(arguments.key, "KEY"),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "clients": arguments.clients,
        }
        save({**made, **report}, arguments.out)
    return int(not all(report["verdicts"].values()))


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Compare attention backends on a text: `sage eval CPU_ATTN SAGE SAGE:k_bits=4`.

Each run starts vLLM with its backend, as a user would, and has it predict every token of windows of the text from those
before it. Each window starts with the special tokens that the tokenizer puts before a text, such as a beginning-of-text token;
they are not scored. Since prompts are prefilled through KV pages, the pages' precision is part of what is measured. With
--passkey, pass keys are recalled by greedy decoding.

The first run is the baseline that the others are compared with. If it fails, the command ends. Another run that fails is marked
in the report, and those after it are made.

Compression plugins (the option variator) change how a prompt is computed. To measure their effect on the tokens behind it,
`--prompt` sets how many tokens of each window are the prompt: only the rest is scored, and only the prompt is compressed.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.demo.passkey import PassKeys
from sage_backend.options import MIN_TAIL
from sage_backend.tools import plots
from sage_backend.tools.command import check_out, run_command
from sage_backend.tools.engines import (
    Failure,
    Run,
    attempts,
    check_failures,
    check_runs,
    circumstances,
    engine,
    stretched,
)
from sage_backend.tools.models import check_model
from sage_backend.tools.passkeys import ANSWER_TOKENS, recalls
from sage_backend.tools.tables import table
from sage_backend.tools.text import opening, read_text, windows
from sage_backend.variator.admission import TAIL

TOP = 20
"""An engine reports this many most likely tokens of each position."""
KL_TOP = 10
"""The KL divergence is taken over this many of the baseline's most likely tokens."""
FIRST_BUCKET = 128
"""Figures by position are given for tokens behind fewer tokens than this, twice this, four times this, and so on."""
PASSKEY_DEPTHS = 10
"""Depths at which pass keys are hidden, from the start of the text to its end."""


@dataclass(frozen=True)
class Scores:
    """Scores of one run. true: float64 [positions], the log-probability of each token; tokens, logprobs: [positions, TOP], the
    most likely tokens, best first; passkey: the fraction of keys recalled by length of prompt, at each of PASSKEY_DEPTHS;
    kv_tokens: the capacity of the KV cache in tokens; before: int64 [positions], how many tokens of its window each token was
    predicted from."""

    true: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    passkey: dict[int, list[float]]
    kv_tokens: int
    before: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(-self.true.mean())

    def by_position(self, values: np.ndarray) -> dict[str, float]:
        """Means of values, [positions], by position in a window: over tokens predicted from fewer tokens than FIRST_BUCKET,
        over others predicted from fewer than twice as many, and so on. Numbers that no token belongs to are left out."""
        ends = FIRST_BUCKET << np.arange(int(self.before.max()).bit_length())
        bucket = np.searchsorted(ends, self.before, side="right")
        return {str(ends[i]): float(values[bucket == i].mean()) for i in np.unique(bucket)}

    def against(self, baseline: "Scores") -> dict[str, Any]:
        """The figures of this run, by name."""
        moved = np.abs(self.true - baseline.true)
        return {
            "loss": self.loss,
            "loss_change": self.loss - baseline.loss,
            "loss_by_position": self.by_position(-self.true),
            "mean_abs_logprob_change": float(moved.mean()),
            "abs_logprob_change_by_position": self.by_position(moved),
            "top1_agreement": float((self.tokens[:, 0] == baseline.tokens[:, 0]).mean()),
            "kl": float(_kl(baseline, self).mean()),
            "kv_capacity": self.kv_tokens / baseline.kv_tokens,
            "passkey": {str(length): float(np.mean(shares)) for length, shares in self.passkey.items()},
            "passkey_by_depth": {str(length): shares for length, shares in self.passkey.items()},
        }


def _kl(baseline: Scores, other: Scores) -> np.ndarray:
    """KL(baseline || other) of each position over the baseline's KL_TOP likeliest tokens, renormalized over these.

    A token that is not among the TOP of `other` gets the log-probability of the last of them. Its own is lower, so the result
    is a little too small.
    """
    tokens = baseline.tokens[:, :KL_TOP]
    same = tokens[:, :, None] == other.tokens[:, None, :]
    found = np.take_along_axis(other.logprobs, same.argmax(2), 1)
    q = _renormalized(np.where(same.any(2), found, other.logprobs[:, -1:]))
    p = _renormalized(baseline.logprobs[:, :KL_TOP])
    return (np.exp(p) * (p - q)).sum(1)


def _renormalized(logprobs: np.ndarray) -> np.ndarray:
    return logprobs - np.log(np.exp(logprobs).sum(1, keepdims=True))


def _scoring_engine(model: str, context: int) -> dict[str, Any]:
    """Arguments of an engine that scores windows of a text."""
    from vllm.platforms import current_platform  # see `measure`

    cache_limits: dict[str, Any] = {"gpu_memory_utilization": 0.8}  # the rest is for the logits of whole prompts
    if current_platform.is_cpu():
        cache_limits = {"kv_cache_memory_bytes": 1 << 30}
    # Log-probabilities of cached tokens would not be computed again.
    fixed: dict[str, Any] = {"enable_prefix_caching": False, "enforce_eager": True, "max_num_batched_tokens": 2048}
    fixed |= {"disable_log_stats": True}  # vLLM's own default for LLM, which `Run.check` needs, too
    return {"max_model_len": context, "max_logprobs": TOP, **cache_limits, **fixed, **stretched(model, context)}


def measure(
    run: Run, model: str, text: str, tokens: int, passkey: Sequence[int] = (), keys: int = 1, prompt: int = 0, **arguments: Any
) -> Scores:
    """Run an engine with these arguments over the first `tokens` tokens of `text` and over pass-key prompts of the given
    lengths, `keys` a depth.

    The text is cut into windows that leave room in the context for one more token; each predicts all of its tokens but the
    first, the tokenizer's special ones and those of the prompt, which includes these. Raises ValueError for a text or prompt
    that does not fit.
    """
    from vllm import SamplingParams  # not at the top: vLLM reads VLLM_LOGGING_LEVEL, which `main` sets, when it is imported

    context = arguments["max_model_len"]
    with engine(run, model, **arguments) as llm:
        tokenizer = llm.get_tokenizer()
        # The scored part has to be long enough to stay uncompressed.
        special = len(opening(tokenizer))
        least = prompt + MIN_TAIL if prompt else max(special, 1) + 1
        read = [window for window in windows(tokenizer, text, tokens, context) if len(window) >= least]
        if not read:
            raise ValueError(f"the text has nothing behind a prompt of {prompt} tokens" if prompt else "the text is empty")
        scoring = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": TOP, "flat_logprobs": True, "detokenize": False}
        outputs = llm.generate(
            [{"prompt_token_ids": window} for window in read],
            [SamplingParams(**scoring, extra_args={TAIL: len(window) - prompt} if prompt else None) for window in read],
        )
        flat = [output.prompt_logprobs for output in outputs]
        # Each position but the first holds its own token and then the TOP likeliest.
        shape, skipped = (-1, TOP + 1), max(prompt, special - 1)
        logprobs = np.concatenate([np.array(each.logprobs).reshape(shape)[skipped:] for each in flat])
        token_ids = np.concatenate([np.array(each.token_ids).reshape(shape)[skipped:] for each in flat])
        before = np.concatenate([np.arange(1, len(window))[skipped:] for window in read])

        recalled, passkeys = {}, PassKeys(tokenizer)
        for length in passkey:
            right = recalls(llm, passkeys, length, np.tile(np.linspace(0, 1, PASSKEY_DEPTHS), keys))
            recalled[length] = np.reshape(right, (keys, PASSKEY_DEPTHS)).mean(0).tolist()
        kv_tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    return Scores(logprobs[:, 0], token_ids[:, 1:], logprobs[:, 1:], recalled, kv_tokens, before)


def _rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of the table, headings first."""
    lengths = list(results[0]["passkey"])  # the baseline's, which has not failed
    head = ["run", "tokens", "loss", "change", "|d logp|", f"top-{KL_TOP} KL", "top-1 %"]
    rows = [[*head, *(f"key@{length} %" for length in lengths)]]
    for run in results:
        if "error" in run:
            rows.append([run["run"], f"failed: {run['error']}"])
            continue
        losses = [f"{run['loss']:.4f}", f"{run['loss_change']:+.4f}", f"{run['mean_abs_logprob_change']:.4f}"]
        losses.append(f"{run['kl']:.5f}")
        shares = [run["top1_agreement"], *(run["passkey"][length] for length in lengths)]
        rows.append([run["run"], f"{run['kv_capacity']:.2f}x", *losses, *(f"{100 * share:.2f}" for share in shares)])
    return rows


def _by_depth(results: list[dict[str, Any]]) -> list[list[str]]:
    """Pass keys by depth, one row a run and length."""
    depths = [f"{depth:.0%}" for depth in np.linspace(0, 1, PASSKEY_DEPTHS)]
    rows = [["keys recalled, %, by depth", "tokens", *depths]]
    for run in results:
        for length, shares in run.get("passkey_by_depth", {}).items():
            rows.append([run["run"], length, *(f"{100 * share:.0f}" for share in shares)])
    return rows


def _by_position(results: list[dict[str, Any]], figure: str, heading: str) -> list[list[str]]:
    """A figure by position in a window, one row a run."""
    rows = [[f"{heading} from fewer tokens than", *results[0][figure]]]
    for run in results:
        if "error" not in run:
            rows.append([run["run"], *(f"{value:.4f}" for value in run[figure].values())])
    return rows


def _parser() -> argparse.ArgumentParser:
    description = "Compare attention backends with the first of them."
    parser = argparse.ArgumentParser(prog="sage eval", description=description)
    forms = "BACKEND, BACKEND/kv_cache_dtype, SAGE:k_bits=4 or SAGE:variator.plugins=FILE,variator.ratio=2"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=forms)
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder or name (default: the embedded small model)")
    parser.add_argument("--text", type=Path, default=HELDOUT, help="file to predict (default: the embedded held-out text)")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="how many of its tokens (default: %(default)s)")
    window = "tokens of a window, with a beginning-of-text token first if the tokenizer adds one"
    parser.add_argument("--context", type=int, default=2048, help=f"{window} (default: %(default)s)")
    parser.add_argument("--passkey", default="", metavar="LENGTHS", help="recall pass keys from, for example, 500,1500 tokens")
    parser.add_argument("--passkey-keys", type=int, default=1, metavar="N", help="at each depth (default: %(default)s)")
    parser.add_argument(
        "--prompt", type=int, default=0, help="tokens of each window that are a prompt and not scored (default: %(default)s)"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures to this file, as JSON")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots (PNG) and a page with everything (HTML) there")
    return parser


def _compare(arguments: argparse.Namespace, command: str) -> None:
    text = read_text(arguments.text)
    if arguments.tokens < 2 or arguments.context < 2 * ANSWER_TOKENS:
        raise ValueError(f"--tokens must be at least 2 and --context at least {2 * ANSWER_TOKENS}")
    check_out(arguments.out)
    check_model(arguments.model)
    lengths = arguments.passkey.split(",") if arguments.passkey else []
    if not all(length.isdecimal() for length in lengths):
        raise ValueError(f"--passkey takes lengths such as 500,1500, not {arguments.passkey!r}")
    passkey = [int(each) for each in lengths]
    if passkey and max(passkey) + ANSWER_TOKENS > arguments.context:
        raise ValueError(f"pass-key prompts of {max(passkey)} tokens do not fit a context of {arguments.context}")
    if arguments.passkey_keys < 1:
        raise ValueError("--passkey-keys must be at least 1")
    if arguments.plots:
        plots.check()
    if not 0 <= arguments.prompt < arguments.context - 1:
        raise ValueError(f"--prompt must be below {arguments.context - 1}")
    runs = [Run.parse(run) for run in arguments.runs]
    if not arguments.prompt and any("variator" in run.options for run in runs):
        raise ValueError(f"only what follows a prompt can be scored; add, for example, --prompt {arguments.context // 2}")

    engine_arguments = _scoring_engine(arguments.model, arguments.context)
    engine_arguments["tensor_parallel_size"] = arguments.tensor_parallel_size
    refused = check_runs(runs, arguments.model, **engine_arguments)
    asked = arguments.model, text, arguments.tokens, passkey, arguments.passkey_keys, arguments.prompt
    report: dict[str, Any] = {}
    try:
        for run, scores in attempts(runs, refused, lambda run: measure(run, *asked, **engine_arguments)):
            if not report:
                if isinstance(scores, Failure):
                    raise RuntimeError(f"{run.name}, the baseline, failed: {scores.reason}")
                baseline, report = scores, _report(scores, arguments, command)
            if isinstance(scores, Failure):
                report["runs"].append(scores.result())
            else:
                report["runs"].append({"run": run.name, **scores.against(baseline)})
            if arguments.out:  # after each run, for the next one may be cut short
                arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    finally:
        if report:
            _print_report(report, arguments)
    check_failures(report["runs"])


def _report(baseline: Scores, arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """A report without runs yet."""
    return {
        **circumstances(command, arguments.model),
        "text": arguments.text.name,
        "predicted_tokens": baseline.true.size,
        "context": arguments.context,
        "prompt": arguments.prompt,
        "runs": [],
    }


def _print_report(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print a report, and write its plots with --plots."""
    results, predicted = report["runs"], report["predicted_tokens"]
    baseline = results[0]["run"]
    print(f"{predicted} tokens predicted; loss in nats per token; changes, KL and agreement against {baseline}")
    rows = _rows(results)
    print(table(rows))
    print("\n" + table(_by_position(results, "loss_by_position", "loss")))
    print("\n" + table(_by_position(results, "abs_logprob_change_by_position", "|d logp|")))
    if results[0]["passkey"]:
        print("\n" + table(_by_depth(results)))
    if arguments.plots:
        print(*plots.write(report, rows, arguments.plots), sep="\n")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status. Errors in the input go to stderr, in one line."""
    argv = sys.argv[2:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Asking torch for a GPU instead would keep vLLM from forking.
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # One process instead of three, each of which would spend half a minute on importing vLLM.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    command = shlex.join(["sage", "eval", *argv])
    return run_command(lambda: _compare(arguments, command))

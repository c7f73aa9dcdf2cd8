# SPDX-License-Identifier: Apache-2.0
"""The metrics of an engine: names, help texts, labels and buckets. docs/operator/metrics.md is the user's side."""

from dataclasses import dataclass, field

from sage_backend.observability.canary import LARGEST
from sage_backend.options import RATIOS as PLUGIN_RATIOS

PREFILL, DECODE = PHASES = ("prefill", "decode")
SAMPLE_EVERY = {"prefill": 4, "decode": 16}
"""One step of a phase in this many is timed. Prefills are fewer and longer."""

FALLBACKS = ("gluon_missing", "page_format", "smooth_q")
"""See `sage_kernels.KernelChoice.fallback_reason`."""

RATIOS = ("1", *map(str, PLUGIN_RATIOS))
"""Ratios of compression plugins, and 1 for none."""

COMMON_LABELS = ("model_name", "engine")
"""Labels of every metric, as in vLLM: the served model's name, and the engine's data parallel rank."""


@dataclass(frozen=True, eq=False)
class Metric:
    """name, text: as Prometheus takes them. labels: those besides COMMON_LABELS, each with its possible values, or none if it
    is free text. buckets: the upper bounds of a histogram's buckets, the last of which no value exceeds."""

    name: str
    text: str
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        if self.buckets:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"


BUILD = Metric(
    "sage_build_info",
    "Always 1; the labels identify the software and the page format.",
    dict.fromkeys(("version", "vllm_version", "page_format", "kernels", "architecture"), ()),
)
TOKENS = Metric("sage_attended_tokens_total", "Query tokens that attention was computed for.", {"phase": PHASES})
STEPS = Metric("sage_attention_steps_total", "Engine steps with tokens of the phase.", {"phase": PHASES})
FALLBACK_STEPS = Metric(
    "sage_fallback_steps_total", "Steps whose prefill did not take the kernel made for the GPU.", {"reason": FALLBACKS}
)
SAMPLES = Metric("sage_attention_samples_total", "Calls of one attention layer that were timed.", {"phase": PHASES})
SECONDS = Metric("sage_attention_sampled_seconds_total", "Seconds that these calls took.", {"phase": PHASES})
OPERATIONS = Metric("sage_attention_sampled_operations_total", "Operations of Q K^T and P V in these calls.", {"phase": PHASES})
BYTES = Metric("sage_attention_sampled_bytes_total", "Bytes of KV pages that these calls had to read.", {"phase": PHASES})
TOKEN_BYTES = Metric("sage_kv_bytes_per_token", "Bytes of KV cache of one worker that a token takes, in all layers.")
COMPRESSION = Metric("sage_kv_compression_ratio", "Bytes of a token's keys and values in BF16, over sage_kv_bytes_per_token.")
CONTEXT = Metric(
    "sage_memory_context_tokens_total", "Tokens of context before the end of blocks of queries.", {"phase": PHASES}
)
READ = Metric("sage_memory_read_tokens_total", "Tokens of that context that each KV head reads.", {"phase": PHASES})
SCORED = Metric("sage_memory_scored_pages_total", "Pages that each KV head scores for blocks of queries.", {"phase": PHASES})
RECALLED = Metric("sage_memory_recalled_pages_total", "Scored pages that it recalls.", {"phase": PHASES})
COVERED = Metric(
    "sage_memory_attention_mass_covered",
    "Fraction of exact attention on the pages that were read, in sampled calls that did not read all.",
    {"phase": PHASES},
    buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0),
)
HOST_PAGES = Metric("sage_memory_host_pages", "Pages in host memory, of one KV head of a layer; 0 if they are on the GPU.")
DEVICE_PAGES = Metric("sage_memory_device_pages", "Those of them that the GPU can hold at a time.")
FETCHED = Metric("sage_memory_fetched_pages_total", "Pages of one KV head of a layer that the GPU fetched from host memory.")
FETCHED_BYTES = Metric("sage_memory_fetched_bytes_total", "Bytes of these pages.")
FETCH_SECONDS = Metric("sage_memory_fetch_seconds_total", "Seconds that layers waited for pages that were fetched.")
CANARY_ERROR = Metric(
    "sage_canary_relative_error",
    "Relative L2 error of attention over quantized pages, in checks of one KV head.",
    buckets=(0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, LARGEST),
)
REQUESTS = Metric(
    "sage_variator_requests_total", "Requests whose prompts were read in groups of this many tokens.", {"ratio": RATIOS}
)
COMPRESSED = Metric(
    "sage_variator_compressed_tokens_total", "Prompt tokens that FFNs computed in groups.", {"ratio": RATIOS[1:]}
)
SAVED = Metric("sage_variator_saved_operations_total", "Operations of FFNs that groups saved.")
PAGES = Metric("sage_kv_pages", "Pages of the KV cache.")
PAGES_IN_USE = Metric("sage_kv_pages_in_use", "Pages that requests hold.")

METRICS = (
    BUILD, TOKENS, STEPS, FALLBACK_STEPS, SAMPLES, SECONDS, OPERATIONS, BYTES, TOKEN_BYTES, COMPRESSION,
    CONTEXT, READ, SCORED, RECALLED, COVERED, HOST_PAGES, DEVICE_PAGES, FETCHED, FETCHED_BYTES, FETCH_SECONDS,
    CANARY_ERROR, REQUESTS, COMPRESSED, SAVED, PAGES, PAGES_IN_USE,
)  # fmt: skip

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The source of dashboard.json:  python deploy/grafana/dashboard.py > deploy/grafana/dashboard.json

Edit this and not the JSON; a test compares the two.
"""

from collections.abc import Sequence

from grafana_foundation_sdk.builders.common import StackingConfig, VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
SELECT = 'model_name=~"$model_name", instance=~"$instance"'
WIDTH, HEIGHT = 8, 8  # of a panel; a dashboard is 24 wide


def rate(metric: str, by: str = "instance", more: str = "", over: str = "$__rate_interval") -> str:
    """Growth of a counter per second, summed by labels."""
    return f"sum by ({by}) (rate({metric}{{{SELECT}{more}}}[{over}]))"


def total(metric: str) -> str:
    return f"sum by (instance) ({metric}{{{SELECT}}})"


def quantile(q: float, histogram: str, over: str = "$__rate_interval") -> str:
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', 'instance, le', over=over)})"


def quantiles(histogram: str, *qs: float, over: str = "$__rate_interval") -> Sequence[tuple[str, str]]:
    """Queries and legends, as `panel` takes them."""
    return [(quantile(q, histogram, over), f"{{{{instance}}}} p{round(100 * q)}") for q in qs]


def panel(title: str, unit: str, description: str, *queries: tuple[str, str], stacked: bool = False) -> Panel:
    """unit: as Grafana names it. queries: (PromQL, legend)."""
    result = (
        Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .min(0)
        .datasource(SOURCE)
        .span(WIDTH)
        .height(HEIGHT)
        .legend(VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True))
    )
    for name, (query, legend) in zip("ABCD", queries, strict=False):
        result.with_target(Dataquery().ref_id(name).expr(query).legend_format(legend).datasource(SOURCE))
    return result.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(20) if stacked else result


def latencies(title: str, histogram: str, description: str) -> Panel:
    return panel(title, "s", description, *quantiles(histogram, 0.5, 0.95))


SAMPLED = "sage_attention_sampled_{}_total"
PHASE, REPLICA = "{{instance}} {{phase}}", "{{instance}}"
BY_PHASE = "instance, phase"

ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Throughput, per replica",
        (
            panel(
                "Tokens computed", "short", "Query tokens a second that attention was computed for.",
                (rate("sage_attended_tokens_total", BY_PHASE), PHASE), stacked=True,
            ),
            panel(
                "Tokens generated", "short", "Output tokens a second.",
                (rate("vllm:generation_tokens_total"), REPLICA),
            ),
            panel(
                "Requests", "short", "Requests in execution and in the queue.",
                (total("vllm:num_requests_running"), "{{instance}} running"),
                (total("vllm:num_requests_waiting"), "{{instance}} waiting"),
            ),
        ),
    ),
    (
        "Latency, per replica",
        (
            latencies("Time to first token", "vllm:time_to_first_token_seconds", "From a request's arrival."),
            latencies("Time between tokens", "vllm:inter_token_latency_seconds", "From one output token to the next."),
            latencies("Whole request", "vllm:e2e_request_latency_seconds", "From arrival to the last token."),
        ),
    ),
    (
        "KV cache",
        (
            panel(
                "Pages in use", "percentunit", "Share of the KV cache's pages that requests hold.",
                (f"{total('sage_kv_pages_in_use')} / {total('sage_kv_pages')}", REPLICA),
            ),
            panel(
                "Bytes per token", "bytes", "What a token takes in one worker's KV cache, and its keys and values in BF16.",
                (f"max by (instance) (sage_kv_bytes_per_token{{{SELECT}}})", "{{instance}} quantized"),
                (
                    f"max by (instance) (sage_kv_bytes_per_token{{{SELECT}}} * sage_kv_compression_ratio{{{SELECT}}})",
                    "{{instance}} BF16",
                ),
            ),
            panel(
                "Prompt tokens from the prefix cache", "percentunit", "Share of the prompt tokens that were looked up.",
                (f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", REPLICA),
            ),
        ),
    ),
    (
        "Prefill and decode",
        (
            panel(
                "Attention, operations", "ops", "Operations a second of Q K^T and P V while attention runs, in sampled calls.",
                (f"{rate(SAMPLED.format('operations'), BY_PHASE)} / {rate(SAMPLED.format('seconds'), BY_PHASE)}", PHASE),
            ),
            panel(
                "Attention, bytes", "Bps", "Bytes a second of KV pages that attention reads while it runs, in sampled calls.",
                (f"{rate(SAMPLED.format('bytes'), BY_PHASE)} / {rate(SAMPLED.format('seconds'), BY_PHASE)}", PHASE),
            ),
            panel(
                "Attention, time of a layer", "s", "Mean time of a sampled call, which is one layer in one step.",
                (f"{rate(SAMPLED.format('seconds'), BY_PHASE)} / {rate('sage_attention_samples_total', BY_PHASE)}", PHASE),
            ),
            panel(
                "Steps", "short", "Engine steps a second with tokens of the phase; a mixed step counts for both.",
                (rate("sage_attention_steps_total", BY_PHASE), PHASE),
            ),
            panel(
                "Tokens a step", "short", "Tokens of the phase in a step that has some.",
                (f"{rate('sage_attended_tokens_total', BY_PHASE)} / {rate('sage_attention_steps_total', BY_PHASE)}", PHASE),
            ),
            panel(
                "Fallbacks", "percentunit", "Share of steps with prefills that did not take the kernel made for the GPU.",
                (
                    f"{rate('sage_fallback_steps_total', 'instance, reason')} / on (instance) group_left "
                    + rate("sage_attention_steps_total", more=', phase="prefill"'),
                    "{{instance}} {{reason}}",
                ),
            ),
        ),
    ),
    (
        "Accuracy",
        (
            # Checks and samples are rare: there may be none within $__rate_interval.
            panel(
                "Quantization error", "percentunit",
                "Relative L2 error of attention's output, in checks of the last 30 minutes. Needs the option canary.",
                *quantiles("sage_canary_relative_error", 0.5, 0.95, over="30m"),
            ),
            panel(
                "Attention that memory reads", "percentunit",
                "Share of exact attention on the pages that were read, in calls of the last 30 minutes that were sampled and "
                "read a part. Needs the option memory.",
                *quantiles("sage_memory_attention_mass_covered", 0.05, 0.5, over="30m"),
            ),
        ),
    ),
    (
        "Pages in host memory",
        (
            panel(
                "Pages by tier", "short", "Pages of one KV head of a layer: in host memory, and those that the GPU can hold.",
                (total("sage_memory_host_pages"), "{{instance}} host"),
                (total("sage_memory_device_pages"), "{{instance}} GPU"),
            ),
            panel(
                "Fetched", "Bps", "Bytes a second of pages that the first worker fetched from host memory. Needs host_gib.",
                (rate("sage_memory_fetched_bytes_total"), REPLICA),
            ),
            panel(
                "Fetched in a step", "bytes", "Bytes that the first worker fetched, over steps; a mixed step counts twice.",
                (f"{rate('sage_memory_fetched_bytes_total')} / {rate('sage_attention_steps_total')}", REPLICA),
            ),
            panel(
                "Waiting for pages", "percentunit", "Share of time in which a layer of the first worker waits for its pages.",
                (rate("sage_memory_fetch_seconds_total"), REPLICA),
            ),
        ),
    ),
    (
        "Servers",
        (
            panel(
                "Builds", "short", "Engines by version, page format, kernels and architecture.",
                (
                    f"count by (instance, version, page_format, kernels, architecture) (sage_build_info{{{SELECT}}})",
                    "{{instance}} {{version}} {{page_format}} {{kernels}} {{architecture}}",
                ),
            ),
            panel(
                "Targets that answer", "short", "1 while Prometheus can scrape a replica.",
                ('up{job="sage", instance=~"$instance"}', REPLICA),
            ),
        ),
    ),
)  # fmt: skip


def choice(name: str, label: str) -> QueryVariable:
    """A variable for a label of sage_build_info. Any number of its values can be chosen."""
    return (
        QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values(sage_build_info, {name})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def dashboard() -> Dashboard:
    result = (
        Dashboard("sage-backend")
        .uid("sage-backend")
        .tags(["sage", "vllm"])
        .time("now-1h", "now")
        .refresh("30s")
        .readonly()
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(choice("model_name", "Model"))
        .with_variable(choice("instance", "Replica"))
    )
    for title, panels in ROWS:
        result.with_row(Row(title))
        for each in panels:
            result.with_panel(each)
    return result


def to_json() -> str:
    return JSONEncoder(indent=2, sort_keys=True).encode(dashboard().build()) + "\n"


if __name__ == "__main__":
    print(to_json(), end="")

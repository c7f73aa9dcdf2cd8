# SPDX-License-Identifier: Apache-2.0
"""Plots of the results of `sage eval` and `sage needle`: PNG files, and an HTML page with them and the figures."""

import base64
import html
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sage_backend.tools.engines import assignments
from sage_backend.tools.tasks import PASSKEY, has_depths, scores_by_task

_LOOKS = {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3, "axes.axisbelow": True, "font.size": 10}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .35rem .8rem; text-align: right }
th { border-bottom: 2px solid #222; font-weight: 600 } td { border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
th:first-child, td:first-child, td.failed { text-align: left }
img { max-width: 100% } p { color: #555 } code { font-size: 13px }
"""


def check() -> None:
    """Raises ValueError, in one line, if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("--plots needs matplotlib (pip install matplotlib, or this package's extra `bench`)") from None


def write(report: dict[str, Any], rows: list[list[str]], folder: Path) -> list[Path]:
    """Write the plots of a report of `sage eval` and the page. rows: its table, headings first. Returns the files."""
    facts = (
        f"{report['predicted_tokens']} tokens of {report['text']} in windows of {report['context']}; {report['device']}; "
        f"vLLM {report['versions']['vllm']}; {report['date'][:10]}. Changes, KL divergence and agreement are against "
        f"{report['runs'][0]['run']}."
    )
    runs = [run for run in report["runs"] if "error" not in run]  # the table has the reasons of those that failed
    figures = {"quality": partial(_quality, runs=runs)}
    if runs[0]["passkey"]:
        recalled = {run["run"]: run["passkey_by_depth"] for run in runs}
        figures["passkey"] = partial(_heat_maps, recalled=recalled)
    return _write(folder, "quality", f"Quality of {report['model']}", facts, rows, figures, report["command"])


def write_needle(report: dict[str, Any], rows: list[list[str]], folder: Path) -> list[Path]:
    """As `write`, for a report of `sage needle`: a figure by depth for each task that has depths, and with more tasks than pass
    keys one of all tasks."""
    found = {run["run"]: scores_by_task(run) for run in report["runs"] if "error" not in run}
    tasks = list(next(iter(found.values()), {}))
    named = bool(set(tasks) - {PASSKEY})
    figures = {}
    for task in filter(has_depths, tasks):
        by_depth = {run: scores[task] for run, scores in found.items()}
        figures["needle" if task == PASSKEY else f"needle-{task}"] = partial(_heat_maps, recalled=by_depth)
    if named:
        by_task = {run: _means(scores) for run, scores in found.items()}
        figures["needle-tasks"] = partial(_heat_maps, recalled=by_task, labels=tasks, each="task", share="mean score, %")
    what = "Mean scores of tasks" if named else "Keys recalled"
    facts = (
        f"{what}, {report['depths']} {'prompts' if named else 'depths'} of each length in tokens; {report['device']}; "
        f"vLLM {report['versions']['vllm']}; {report['date'][:10]}."
    )
    title = f"What {report['model']} finds in long contexts" if named else f"Pass keys that {report['model']} recalls"
    return _write(folder, "needle", title, facts, rows, figures, report["command"])


def _means(scores: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """The mean scores of tasks, in their order, by length."""
    lengths = next(iter(scores.values()))
    return {length: [sum(each[length]) / len(each[length]) for each in scores.values()] for length in lengths}


def _write(
    folder: Path,
    page: str,
    title: str,
    facts: str,
    rows: list[list[str]],
    figures: Mapping[str, Callable[..., Any]],
    command: str,
) -> list[Path]:
    import matplotlib  # an optional package

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files, images = [], []
    for name, draw in figures.items():
        with plt.rc_context(_LOOKS):
            figure = draw(plt)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=160)
            plt.close(figure)
        files.append(folder / f"{name}.png")
        files[-1].write_bytes(buffer.getvalue())
        images.append(f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">')
    files.append(folder / f"{page}.html")
    files[-1].write_text(_page(title, facts, rows, images, command), encoding="utf-8")
    return files


def _short(run: str) -> str:
    """The name of a run, in which paths of files are shortened to their names."""
    head, colon, options = run.partition(":")
    return head + colon + ",".join(option.rpartition("=")[0] + "=" + Path(option.rpartition("=")[2]).name
                                   for option in assignments(options))  # fmt: skip


def _quality(plt: Any, runs: list[dict[str, Any]]) -> Any:
    """Loss and agreement against the capacity of the KV cache."""
    figure, (loss, agreement) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for i, run in enumerate(runs):
        looks = {"marker": "D" if i == 0 else "o", "color": f"C{i}", "s": 80, "alpha": 0.7, "zorder": 3}
        loss.scatter(run["kv_capacity"], run["loss_change"], label=_short(run["run"]), **looks)
        agreement.scatter(run["kv_capacity"], 100 * run["top1_agreement"], **looks)
    loss.axhline(0, color="#555555", linewidth=0.8)
    loss.set(title="Loss change (lower is better)", ylabel="nats per token")
    agreement.set(title="Same likeliest token (higher is better)", ylabel="% of tokens")
    for axes in (loss, agreement):
        axes.set_xlabel(f"tokens that fit, times those of {_short(runs[0]['run'])}")
        axes.grid(True)
        axes.margins(0.12, 0.15)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _heat_maps(
    plt: Any,
    recalled: dict[str, dict[str, list[float]]],
    labels: Sequence[str] = (),
    each: str = "depth of the key",
    share: str = "% of keys recalled",
) -> Any:
    """A heat map for each run. recalled: shares by run, by length of the prompt and then by row; labels: of the rows, which are
    depths without them; each: what a row is; share: what a share is."""
    lengths = list(next(iter(recalled.values())))
    columns = min(len(recalled), 3)
    lines = -(-len(recalled) // columns)
    width = 1.2 + max(2.6, 0.8 * len(lengths))
    figure, grid = plt.subplots(
        lines, columns, figsize=(1.2 + columns * width, 0.6 + 3.6 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(recalled) :]:
        axes.set_visible(False)
    for axes, (run, by_length) in zip(grid.flat, recalled.items(), strict=False):
        shares = [[100 * cell for cell in row] for row in zip(*by_length.values(), strict=True)]
        image = axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=100, edgecolor="white")
        axes.invert_yaxis()
        axes.set_xticks([i + 0.5 for i in range(len(lengths))], lengths)
        axes.tick_params(length=0)
        depths = len(shares)
        labeled = range(depths) if labels else range(0, depths, -(-depths // 10))
        axes.set_yticks([i + 0.5 for i in labeled], labels or [f"{100 * i / (depths - 1):.0f}%" for i in labeled])
        axes.set_title("\n".join(textwrap.wrap(_short(run).replace(",", ", "), 44)), fontsize=9)
        axes.set_xlabel("tokens of the prompt")
        axes.spines[:].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(each)
    figure.colorbar(image, ax=grid, label=share, shrink=0.8)
    return figure


def _page(title: str, facts: str, rows: list[list[str]], images: list[str], command: str) -> str:
    def line(cells: list[str], tag: str) -> str:
        parts = [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells]
        if missing := len(rows[0]) - len(cells):  # the reason of a failed run
            parts[-1] = f'<{tag} colspan="{missing + 1}" class="failed">{html.escape(cells[-1])}</{tag}>'
        return f"<tr>{''.join(parts)}</tr>"

    title = html.escape(title)
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>',
        f"<h1>{title}</h1>", f"<p>{html.escape(facts)}</p>",
        "<table>", line(rows[0], "th"), *(line(row, "td") for row in rows[1:]), "</table>", *images,
        f"<p>Made by <code>{html.escape(command)}</code></p>", "</html>", "",
    ])  # fmt: skip

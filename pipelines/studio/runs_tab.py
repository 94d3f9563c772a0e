"""The tab of training runs: curves, samples over the epochs, the state of a run, and a comparison of two."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ..tools.cli import UserError
from .bounds import plainly
from .runs import COUNTERS, Run, find_runs, open_sample

NONE = "no second run"
REFRESH_SECONDS = 5
DEFAULT_METRICS = ("val_loss", "loss")
STYLES = (("#0072b2", "-"), ("#d55e00", "--"))  # two runs differ without colours as well


class RunsTab:
    """The controls of the tab; while the tab is open, curves and state follow runs that are training."""

    def __init__(self, folder: Path):
        self.folder = folder
        names = [run.name for run in find_runs(folder)]
        metrics = self._metric_names(names[:1])
        first = names[0] if names else None
        with gr.Row():
            run = gr.Dropdown(names, value=first, label="Run", filterable=True)
            other = gr.Dropdown([NONE, *names], value=NONE, label="Compare with", filterable=True)
            metric = gr.Dropdown(metrics, value=_preferred(metrics), label="Metric", allow_custom_value=False)
            logarithmic = gr.Checkbox(False, label="Logarithmic axis")
            refresh = gr.Button("Refresh the list of runs")
        chosen = [run, other]
        state = gr.Markdown("", elem_classes="status")
        curves = gr.Plot(label="Curves")
        last = gr.Dataframe(headers=["metric", "run", "other run"], label="Last values", interactive=False)
        place = gr.Slider(0, 1, 1, step=0.01, label="Samples: from the beginning (0) to the end (1) of the run")
        with gr.Row():
            samples = [
                gr.Image(
                    label=label,
                    interactive=False,
                    format="png",
                    buttons=["download", "fullscreen"],
                    elem_classes="below-label",
                )
                for label in ("Samples of the run", "Samples of the other run")
            ]
        drawing = ([*chosen, metric, logarithmic], [state, curves, last])
        looking = ([*chosen, place], samples)
        draw, look = plainly(self._draw), plainly(self._look)
        refresh.click(plainly(self._refreshed), chosen, chosen, api_visibility="private")
        for one in chosen:
            one.change(plainly(self._metrics_of), [*chosen, metric], metric, api_visibility="private")
            one.change(draw, *drawing, api_visibility="private")
            one.change(look, *looking, api_visibility="private")
        for one in (metric, logarithmic):
            one.change(draw, *drawing, api_visibility="private")
        place.release(look, *looking, api_visibility="private")
        place.change(look, *looking, api_visibility="private", trigger_mode="always_last", show_progress="hidden")
        # Only a run that is training changes; `_followed` leaves the others alone.
        timer = gr.Timer(REFRESH_SECONDS)
        timer.tick(self._followed, *drawing, api_visibility="private", show_progress="hidden")
        self.load = [(draw, *drawing), (look, *looking)]

    def _run(self, name: str | None) -> Run | None:
        if name in (None, NONE, ""):
            return None
        for run in find_runs(self.folder):
            if run.name == name:
                return run
        raise UserError(f"the run {name} is no longer there; refresh the list of runs")

    def _metric_names(self, names: Sequence[str | None]) -> list[str]:
        columns: dict[str, None] = {}
        for run in filter(None, map(self._run, names)):
            columns |= dict.fromkeys(map(str, run.metrics().columns))
        return [name for name in columns if name not in COUNTERS]

    def _metrics_of(self, run: str | None, other: str | None, metric: str | None) -> Any:
        names = self._metric_names([run, other])
        return gr.update(choices=names, value=metric if metric in names else _preferred(names))

    def _refreshed(self, run: str | None, other: str | None) -> tuple[Any, Any]:
        names = [one.name for one in find_runs(self.folder)]
        first = run if run in names else (names[0] if names else None)
        return (
            gr.update(choices=names, value=first),
            gr.update(choices=[NONE, *names], value=other if other in names else NONE),
        )

    def _draw(self, run: str | None, other: str | None, metric: str | None, logarithmic: bool) -> tuple[Any, Any, Any]:
        runs = [one for one in (self._run(run), self._run(other)) if one is not None]
        if not runs:
            return "The folder contains no run yet. A run appears with its first row of metrics.", None, []
        tables = [one.metrics() for one in runs]
        state = "\n\n".join(one.state() for one in runs)
        return state, curves_of(runs, tables, metric, bool(logarithmic)), last_values(tables)

    def _followed(self, run: str | None, other: str | None, metric: str | None, logarithmic: bool) -> tuple[Any, ...]:
        """Draw again if one of the runs is training. A run that was deleted is reported when somebody asks for it."""
        with contextlib.suppress(UserError):
            if any(one is not None and one.is_locked() for one in (self._run(run), self._run(other))):
                return self._draw(run, other, metric, logarithmic)
        return gr.skip(), gr.skip(), gr.skip()

    def _look(self, run: str | None, other: str | None, place: float) -> list[Any]:
        shown = []
        for one in (self._run(run), self._run(other)):
            files = one.samples() if one is not None else []
            if not files:
                shown.append(gr.update(value=None))
                continue
            file = files[round(min(max(float(place or 0), 0), 1) * (len(files) - 1))]
            label = f"{one.name if one else ''}: {file.stem.replace('_', ' ')}"
            shown.append(gr.update(value=open_sample(file), label=label))
        return shown


def _preferred(names: list[str]) -> str | None:
    return next((name for name in DEFAULT_METRICS if name in names), names[0] if names else None)


def curves_of(runs: list[Run], tables: list[pd.DataFrame], metric: str | None, logarithmic: bool) -> Any:
    """Draw one metric of one or two runs over their steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for run, table, style in zip(runs, tables, STYLES):
        if metric in table:
            rows = table[["step", metric]].dropna()
            marker = "o" if len(rows) < 30 else None
            color, line = style
            axes.plot(rows["step"], rows[metric], line, label=run.name, marker=marker, markersize=4, color=color)
    axes.set_xlabel("step")
    axes.set_ylabel(metric or "")
    axes.grid(alpha=0.3)
    if logarithmic:
        axes.set_yscale("log")
    if axes.lines:
        axes.legend()
    return figure


def last_values(tables: list[pd.DataFrame]) -> list[list[str]]:
    """Return the last value of each metric in each run, as rows of a table."""
    columns = list(dict.fromkeys(name for table in tables for name in table.columns))
    return [
        [str(name), *(_last(table, name) for table in (*tables, *[pd.DataFrame()] * (2 - len(tables))))]
        for name in columns
    ]


def _last(table: pd.DataFrame, name: str) -> str:
    values = table[name].dropna().tolist() if name in table else []
    return f"{values[-1]:.6g}" if values else ""

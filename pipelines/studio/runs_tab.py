"""The tab of training runs: curves, samples over the epochs, the state of a run, and a comparison of two."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from ..tools.cli import UserError
from .bounds import plainly
from .runs import COUNTERS, Place, Run, find_runs, open_sample

NONE = "no second run"
REFRESH_SECONDS = 5
DEFAULT_METRICS = ("val_loss", "loss")
STYLES = (("#0072b2", "-"), ("#d55e00", "--"))  # two runs differ without colours as well


class RunsTab:
    """The controls of the tab; while the tab is open, everything in it follows runs that change."""

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
        state = gr.Markdown("", elem_classes="status")
        curves = gr.Plot(label="Curves")
        last = gr.Dataframe(headers=["metric", "run", "other run"], label="Last values", interactive=False)
        place = gr.Slider(label="Samples", **self._slider(self._places([first]), None))
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
        self._connect(refresh, [run, other], [metric, logarithmic], [state, curves, last], [place, *samples])

    def _connect(
        self, refresh: gr.Button, chosen: list[Any], how: list[Any], drawn: list[Any], shown: list[Any]
    ) -> None:
        """Connect the controls with what they change.

        Args:
            chosen: run and other run.
            how: metric and whether the axis is logarithmic.
            drawn: state, curves and last values.
            shown: the slider of the samples, and the samples.
        """
        seen, (metric, place) = gr.State(None), (how[0], shown[0])
        drawing, looking, arranging = ([*chosen, *how], drawn), ([*chosen, place], shown), (chosen, shown)
        draw, look, arrange = plainly(self._draw), plainly(self._look), plainly(self._arrange)
        refresh.click(plainly(self._refreshed), chosen, chosen, api_visibility="private")
        for one in chosen:
            one.change(plainly(self._metrics_of), [*chosen, metric], metric, api_visibility="private")
            one.change(draw, *drawing, api_visibility="private")
            one.change(arrange, *arranging, api_visibility="private")
        for one in how:
            one.change(draw, *drawing, api_visibility="private")
        place.release(look, *looking, api_visibility="private")
        place.change(look, *looking, api_visibility="private", trigger_mode="always_last", show_progress="hidden")
        timer = gr.Timer(REFRESH_SECONDS)
        timer.tick(
            self._followed, [*chosen, *how, place, seen], [*drawn, *shown, seen],
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        self.load = [(draw, *drawing), (arrange, *arranging)]

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

    def _followed(
        self, run: str | None, other: str | None, metric: str | None, logarithmic: bool, place: Any, seen: Any
    ) -> tuple[Any, ...]:
        """Show what has changed in the runs since `seen`. A run that was deleted is reported when somebody asks for it.

        Args:
            seen: versions of the runs, and the number of places of the slider, at the last call; None before it.

        Returns:
            Values for state, curves, last values, slider, both samples, and the next `seen`.
        """
        nothing = (gr.skip(),) * 6
        with contextlib.suppress(UserError):
            runs = [one for one in (self._run(run), self._run(other)) if one is not None]
            places = self._places([run, other])
            now = ([one.version() for one in runs], len(places))
            if seen is None or seen[0] != now[0]:
                # A slider at its end stays there, so that it shows new samples.
                same = seen is not None and [own[0] for own in seen[0]] == [own[0] for own in now[0]]
                at_end = same and number_of(place, places) >= seen[1]
                shown = self._look(run, other, None if at_end else place)
                return (*self._draw(run, other, metric, logarithmic), *shown, now)
            if any(one.is_training() for one in runs):  # its state says how long ago it has written something
                return ("\n\n".join(one.state() for one in runs), *nothing[1:], now)
        return (*nothing, seen)

    def _places(self, names: Sequence[str | None]) -> list[Place]:
        """Return when one of the runs has written samples, in order."""
        return sorted({place for run in filter(None, map(self._run, names)) for place in run.samples()})

    def _slider(self, places: Sequence[Place], place: Any) -> dict[str, Any]:
        """Return the settings of the slider of the samples, at a place that is counted from 1.

        None is the last place. Another one is not set, because the slider may have been moved in the meantime.
        """
        number = number_of(place, places)
        info = f"{places[number - 1]} ({number} of {len(places)})".capitalize() if places else "There are none yet"
        value = {} if place == number else {"value": max(number, 1)}
        # A slider needs two values.
        return {
            "minimum": 1,
            "maximum": max(len(places), 2),
            "step": 1,
            "info": info,
            "visible": len(places) > 1,
        } | value

    def _arrange(self, run: str | None, other: str | None) -> list[Any]:
        """Show the last samples of the runs, and the slider at its end."""
        return self._look(run, other, None)

    def _look(self, run: str | None, other: str | None, place: Any) -> list[Any]:
        """Show the samples of both runs at a place of the slider: of each run the last ones until then."""
        places = self._places([run, other])
        shown: list[Any] = [gr.update(**self._slider(places, place))]
        for one in (self._run(run), self._run(other)):
            files = one.samples() if one is not None else {}
            if one is None or not files:
                shown.append(gr.update(value=None))
                continue
            until = [own for own in files if own <= places[number_of(place, places) - 1]] or list(files)[:1]
            shown.append(gr.update(value=open_sample(files[until[-1]]), label=f"{one.name}: {until[-1]}"))
        return shown


def number_of(place: Any, places: Sequence[Place]) -> int:
    """Return a place of the slider as a whole number from 1; 0 without places.

    None, and anything else that a browser may send, is the last one.
    """
    if isinstance(place, (int, float)) and math.isfinite(place):
        return min(max(round(place), 1), len(places))
    return len(places)


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

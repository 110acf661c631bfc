"""Charts as SVG texts: no script, no network, readable in any browser and in print."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from evals.results import Result, percent

_WIDTH, _HEIGHT = 320, 150
_CURVES = {
    "loss": "loss (nats)",
    "nll": "NLL of the chosen (nats a token)",
    "odds_ratio": "odds-ratio loss (nats)",
    "preference": "preference loss",
    "kl": "token-level KL to the teacher (nats)",
    "margin": "margin, chosen - rejected",
    "teacher_term": "the teacher's part of the margin",
    "accuracy": "pairs told apart (share)",
    "chosen_logp": "log-probability, chosen (nats a token)",
    "rejected_logp": "log-probability, rejected (nats a token)",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
}


def training_curves(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line over steps for each known figure that `steps` has, epochs in colour."""
    import altair as alt

    charts = []
    for name, title in _CURVES.items():
        values = [
            {"step": step["step"], "epoch": step["epoch"], name: step[name]}
            for step in steps
            if isinstance(step.get(name), int | float)
        ]
        if values:
            chart = alt.Chart(alt.Data(values=values), width=_WIDTH, height=_HEIGHT, title=title)
            line = chart.mark_line(point=len(values) < 30).encode(
                x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1)),
                y=alt.Y(f"{name}:Q", title=None, scale=alt.Scale(zero=False)),
                color=alt.Color("epoch:O", title="epoch"),
            )
            charts.append(_svg(line))
    return charts


def accuracy_chart(results: Sequence[Result]) -> str:
    """A bar a model with its 95 % interval."""
    import altair as alt

    values = [
        {
            "model": result.model_id,
            "accuracy": 100 * result.test["accuracy"],
            "low": 100 * result.test["interval_95"][0],
            "high": 100 * result.test["interval_95"][1],
        }
        for result in results
    ]
    order = [result.model_id for result in results]
    base = alt.Chart(
        alt.Data(values=values), width=2 * _WIDTH, title="accuracy on test, %, with 95 % interval"
    ).encode(y=alt.Y("model:N", sort=order, title=None))
    bars = base.mark_bar(height=14).encode(
        x=alt.X("accuracy:Q", title=None, scale=alt.Scale(domain=[0, 100]))
    )
    whiskers = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    return _svg(bars + whiskers)


def _svg(chart: Any) -> str:
    stream = io.StringIO()
    chart.save(stream, format="svg")
    return stream.getvalue()


def share(part: int, whole: int) -> str:
    """A share in percent; a dash of nothing."""
    return percent(part / whole if whole else None)

"""Samples become graded traces, and of these the usable and diverse ones are kept."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from pipeline.answers import extract_answer
from pipeline.diversity import keep_diverse
from pipeline.rows import Prompt, Sample, Trace, Verdict
from pipeline.verdicts.exact import Grader, grade_exactly

# Where nothing has a verdict, the teacher's traces are better than the student's: that is all that
# daDPO asks for (arXiv:2506.15717).
POSITIVE: frozenset[Verdict] = frozenset({"right", "ungraded"})
NEGATIVES: dict[str, frozenset[Verdict]] = {
    "wrong": frozenset({"wrong", "ungraded"}),
    "wrong_or_unparsed": frozenset({"wrong", "unparsed", "ungraded"}),
}


def grade_samples(
    samples: Iterable[Sample],
    prompts: Sequence[Prompt],
    epoch: int,
    usable: frozenset[Verdict],
    max_rouge_l: float,
    grader: Grader = grade_exactly,
) -> list[Trace]:
    """Traces in order of prompt and sample index, with the verdicts of `grader`.

    `kept` marks the traces of a prompt whose verdict is `usable`, less near-duplicates of kept
    ones before them. A positive must have words; a negative need not.
    """
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    ordered = sorted(samples, key=lambda sample: (sample.prompt_id, sample.sample_index))
    verdicts = grader([(by_id[sample.prompt_id], sample.text) for sample in ordered])
    traces = [
        _trace(sample, by_id[sample.prompt_id], epoch, verdict)
        for sample, verdict in zip(ordered, verdicts, strict=True)
    ]
    return keep_anew(traces, usable, max_rouge_l)


def _trace(sample: Sample, prompt: Prompt, epoch: int, verdict: Verdict) -> Trace:
    answer = extract_answer(sample.text, prompt.kind, prompt.choices)
    return Trace(**vars(sample), epoch=epoch, answer=answer, verdict=verdict, kept=False)


def keep_anew(
    traces: Iterable[Trace], usable: frozenset[Verdict], max_rouge_l: float
) -> list[Trace]:
    """The same traces in the same order, `kept` as if only those verdicts were usable."""
    kept_anew: list[Trace] = []
    for _, group in groupby(traces, key=lambda trace: trace.prompt_id):
        kept_anew += _mark_kept(list(group), usable, max_rouge_l)
    return kept_anew


def _mark_kept(traces: list[Trace], usable: frozenset[Verdict], max_rouge_l: float) -> list[Trace]:
    """The traces of one prompt, those that are usable and diverse marked."""
    teaches = "right" in usable
    candidates = [
        trace
        for trace in traces
        if trace.error is None and trace.verdict in usable and (trace.text.strip() or not teaches)
    ]
    diverse = keep_diverse([trace.text for trace in candidates], max_rouge_l)
    kept = {candidates[index].sample_index for index in diverse}
    return [replace(trace, kept=trace.sample_index in kept) for trace in traces]


def describe_traces(traces: Sequence[Trace]) -> dict[str, float]:
    """Counts and shares of a stage's traces, for the record."""
    total = max(1, len(traces))
    return {
        "traces": len(traces),
        "right": sum(trace.verdict == "right" for trace in traces) / total,
        "wrong": sum(trace.verdict == "wrong" for trace in traces) / total,
        "unparsed": sum(trace.verdict == "unparsed" for trace in traces) / total,
        "ungraded": sum(trace.verdict == "ungraded" for trace in traces) / total,
        "cut": sum(trace.finish_reason == "length" for trace in traces) / total,
        "kept": sum(trace.kept for trace in traces),
        "errors": sum(trace.error is not None for trace in traces),
        "tokens": sum(trace.tokens for trace in traces),
    }


def summary(figures: Mapping[str, float]) -> str:
    """The figures of describe_traces in one line."""
    verdicts = [f"{figures[name]:.1%} {name}" for name in ("right", "wrong", "unparsed")]
    parts = [
        f"{figures['traces']:.0f} traces",
        *(["ungraded"] if figures["ungraded"] else verdicts),
        f"{figures['kept']:.0f} kept",
        f"{figures['errors']:.0f} errors",
    ]
    return ", ".join(parts)

"""Samples become graded traces, and of these the usable and diverse ones are kept."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from pipeline.answers import extract_answer, grade
from pipeline.diversity import keep_diverse
from pipeline.rows import Prompt, Sample, Trace, Verdict

POSITIVE: frozenset[Verdict] = frozenset({"right"})
NEGATIVES: dict[str, frozenset[Verdict]] = {
    "wrong": frozenset({"wrong"}),
    "wrong_or_unparsed": frozenset({"wrong", "unparsed"}),
}


def grade_samples(
    samples: Iterable[Sample],
    prompts: Sequence[Prompt],
    epoch: int,
    usable: frozenset[Verdict],
    max_rouge_l: float,
) -> list[Trace]:
    """Traces in order of prompt and sample index.

    `kept` marks the traces of a prompt whose verdict is `usable`, less near-duplicates of kept
    ones before them.
    """
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    ordered = sorted(samples, key=lambda sample: (sample.prompt_id, sample.sample_index))
    traces = []
    for prompt_id, group in groupby(ordered, key=lambda sample: sample.prompt_id):
        traces += _grade_prompt(list(group), by_id[prompt_id], epoch, usable, max_rouge_l)
    return traces


def _grade_prompt(
    samples: list[Sample],
    prompt: Prompt,
    epoch: int,
    usable: frozenset[Verdict],
    max_rouge_l: float,
) -> list[Trace]:
    traces = [
        Trace(
            **vars(sample),
            epoch=epoch,
            answer=extract_answer(sample.text, prompt.kind, prompt.choices),
            verdict=grade(sample.text, prompt.kind, prompt.gold, prompt.choices),
            kept=False,
        )
        for sample in samples
    ]
    return keep_anew(traces, usable, max_rouge_l)


def keep_anew(
    traces: Iterable[Trace], usable: frozenset[Verdict], max_rouge_l: float
) -> list[Trace]:
    """The same traces in the same order, `kept` as if only those verdicts were usable."""
    kept_anew = []
    for _, group in groupby(traces, key=lambda trace: trace.prompt_id):
        of_prompt = list(group)
        candidates = [trace for trace in of_prompt if not trace.error and trace.verdict in usable]
        diverse = keep_diverse([trace.text for trace in candidates], max_rouge_l)
        kept = {candidates[index].key for index in diverse}
        kept_anew += [replace(trace, kept=trace.key in kept) for trace in of_prompt]
    return kept_anew


def describe_traces(traces: Sequence[Trace]) -> dict[str, float]:
    """Counts and shares of a stage's traces, for the record."""
    total = max(1, len(traces))
    return {
        "traces": len(traces),
        "right": sum(trace.verdict == "right" for trace in traces) / total,
        "wrong": sum(trace.verdict == "wrong" for trace in traces) / total,
        "unparsed": sum(trace.verdict == "unparsed" for trace in traces) / total,
        "cut": sum(trace.finish_reason == "length" for trace in traces) / total,
        "kept": sum(trace.kept for trace in traces),
        "errors": sum(trace.error is not None for trace in traces),
        "tokens": sum(trace.tokens for trace in traces),
    }

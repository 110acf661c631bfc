"""Samples become graded traces, and of these the usable and diverse ones are kept."""

from collections.abc import Iterable, Sequence
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
    verdicts = [grade(sample.text, prompt.kind, prompt.gold, prompt.choices) for sample in samples]
    candidates = [
        position
        for position, sample in enumerate(samples)
        if sample.error is None and verdicts[position] in usable
    ]
    diverse = keep_diverse([samples[position].text for position in candidates], max_rouge_l)
    kept = {candidates[index] for index in diverse}
    return [
        Trace(
            **vars(sample),
            epoch=epoch,
            answer=extract_answer(sample.text, prompt.kind, prompt.choices),
            verdict=verdicts[position],
            kept=position in kept,
        )
        for position, sample in enumerate(samples)
    ]


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

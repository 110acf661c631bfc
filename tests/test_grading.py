"""Grading: verdicts, and which traces a pool keeps."""

from pipeline.grading import NEGATIVES, POSITIVE, describe_traces, grade_samples, summary
from pipeline.rows import Prompt, Sample
from pipeline.verdicts.exact import grade_exactly

PROMPTS = [
    Prompt("p1", "1 + 1?", "number", "2"),
    Prompt("p2", "Which?", "choice", "B", {"A": "red", "B": "blue"}),
]


def sample(prompt_id: str, index: int, text: str, error: str | None = None) -> Sample:
    reason = None if error else "stop"
    return Sample(f"{prompt_id}{index}", prompt_id, index, "m", text, reason, 5, error)


SAMPLES = [
    sample("p2", 0, r"Surely \boxed{A}"),
    sample("p1", 3, ""),
    sample("p1", 1, r"one and one make two \boxed{2}"),
    sample("p1", 0, r"one and one make two: \boxed{2}."),
    sample("p1", 2, r"it is \boxed{3}"),
    sample("p1", 4, r"\boxed{2}", error="the engine refused"),
    sample("p2", 1, r"The sea says \boxed{blue}"),
]


def graded(usable):
    return grade_samples(SAMPLES, PROMPTS, epoch=2, usable=usable, max_rouge_l=0.8)


def kept(traces):
    return [(trace.prompt_id, trace.sample_index) for trace in traces if trace.kept]


def test_verdicts_are_in_order_of_prompt_and_sample():
    assert [(t.prompt_id, t.sample_index, t.verdict) for t in graded(POSITIVE)] == [
        ("p1", 0, "right"),
        ("p1", 1, "right"),
        ("p1", 2, "wrong"),
        ("p1", 3, "unparsed"),
        ("p1", 4, "right"),
        ("p2", 0, "wrong"),
        ("p2", 1, "right"),
    ]


def test_positives_are_right_whole_and_diverse():
    assert kept(graded(POSITIVE)) == [("p1", 0), ("p2", 1)]


def test_unparsed_traces_are_no_negatives_by_default():
    assert kept(graded(NEGATIVES["wrong"])) == [("p1", 2), ("p2", 0)]
    assert kept(graded(NEGATIVES["wrong_or_unparsed"])) == [("p1", 2), ("p1", 3), ("p2", 0)]


OPEN = [Prompt("p1", "Write a poem.", "open", None)]


def open_sample(index: int, text: str, reason: str = "stop", error: str | None = None) -> Sample:
    return Sample(f"o{index}", "p1", index, "m", text, None if error else reason, 5, error)


POEMS = [
    open_sample(0, "Roses are red, violets are blue"),
    open_sample(1, "Roses are red, violets are blue."),
    open_sample(2, " "),
    open_sample(3, "Shall I compare thee to a summer's", "length"),
    open_sample(4, "A poem that came too late", error="the engine refused"),
]


def kept_poems(usable, grader=grade_exactly):
    traces = grade_samples(POEMS, OPEN, 0, usable, 0.8, grader)
    return [trace.sample_index for trace in traces if trace.kept]


def test_without_a_verdict_the_teacher_is_preferred_and_near_copies_go():
    traces = grade_samples(POEMS, OPEN, 0, POSITIVE, 0.8)
    assert {(trace.verdict, trace.answer) for trace in traces} == {("ungraded", None)}
    assert kept_poems(POSITIVE) == [0, 3]
    assert kept_poems(NEGATIVES["wrong"]) == [0, 2, 3]  # to say nothing may well be a mistake
    assert summary(describe_traces(traces)) == "5 traces, ungraded, 2 kept, 1 errors"


def test_a_verdict_parts_open_traces_as_it_parts_others():
    def long_is_right(answered):
        return ["right" if len(text) > 32 else "wrong" for _, text in answered]

    assert kept_poems(POSITIVE, long_is_right) == [3]
    assert kept_poems(NEGATIVES["wrong"], long_is_right) == [0, 2]


def test_answers_and_provenance_are_kept():
    last = graded(POSITIVE)[-1]
    assert (last.answer, last.epoch, last.model) == ("B", 2, "m")


def test_figures_count_all_traces():
    figures = describe_traces(graded(POSITIVE))
    assert (figures["traces"], figures["kept"], figures["errors"]) == (7, 2, 1)
    assert figures["right"] == 4 / 7
    assert (
        summary(figures) == "7 traces, 57.1% right, 28.6% wrong, 14.3% unparsed, 2 kept, 1 errors"
    )

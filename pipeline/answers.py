r"""Reading and grading final answers: boxed, of three kinds, with "unparsed" apart from "wrong".

The rules are those of ORPO-Distill's Reason-then-Answer prompt (arXiv:2509.25100): only the last
closed `\boxed{}` counts, never a number or letter that happens to stand in the text.
"""

import re
from collections.abc import Callable, Mapping
from typing import get_args

from pipeline.boxed import last_box, peel
from pipeline.numbers import parse_number
from pipeline.rows import Kind, Verdict

# The labels of a multiple-choice item whose options are not at hand.
_USUAL_LABELS = dict.fromkeys("ABCDE12345", "")
_OPTION = re.compile(r"option\s+", re.IGNORECASE)
_LABEL = re.compile(r"\(?(\w)\)?")
_LABEL_AND_TEXT = re.compile(r"\(?(\w)(?:\)[.:]?\s*|:\s*|\.\s+)(?=\S)(.*)", re.DOTALL)
# A letter that stands alone. In lower case it may be a word or a part of one: "a dog", "I'd",
# "e.g.", "b-cell".
_STANDING = re.compile(
    r"(?<!\w)(?:[A-Z0-9](?!\w)|(?<!['’])(?<!i\.)(?!e\.g)"
    r"(?!a\s+(?!(?:or|and|nor|is|are|but)\b)\w)[a-z](?!\w|['’]|-\w\w))"
)
_YES = re.compile(r"(?<![\w-])(?:yes|true)(?![\w-])", re.IGNORECASE)
_NO = re.compile(r"(?<![\w-])(?:no|false)(?![\w-])", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[.,;:!?]")
_NEGATION = re.compile(
    r"(?<![\w-])(?:not|cannot|never|neither|nor|hardly|barely|scarcely|rarely|seldom"
    r"|unlikely|impossible|doubtful|far\s+from|anything\s+but|lnot|neg"
    r"|[a-z]+n['’]t|(?:is|are|was|were|does|do|did|ca|could|wo|would|should)nt)(?!\w)|¬",
    re.IGNORECASE,
)
# A degenerate model fills its box without end; an answer is an option's text and little more.
_MOST_CHARACTERS = 300


def extract_answer(text: str, kind: Kind, choices: Mapping[str, str] | None = None) -> str | None:
    r"""The answer in the last closed box of `text`, canonical; None where it is unparsed.

    `choices` maps the labels of this very item to their texts. Canonical answers are a label as
    the item writes it ("B"), a fraction in lowest terms ("18", "3/4", "-7"), "yes" or "no".
    """
    content = last_box(text)
    return None if content is None else canonical_answer(content, kind, choices)


def grade(text: str, kind: Kind, gold: str, choices: Mapping[str, str] | None = None) -> Verdict:
    """Whether `text` ends in the `gold` answer; ValueError where `gold` is no text of that kind."""
    if not isinstance(gold, str):
        raise ValueError(
            f"the gold answer is {gold!r} ({type(gold).__name__}), expected the text of a {kind}: "
            "leave out rows without a gold answer, and write a number as a text"
        )
    expected = canonical_answer(gold, kind, choices)
    if expected is None:
        raise ValueError(f"the gold answer {gold!r} is not a {kind} of this item: {choices}")
    answer = extract_answer(text, kind, choices)
    if answer is None:
        return "unparsed"
    return "right" if answer == expected else "wrong"


def canonical_answer(
    content: str, kind: Kind, choices: Mapping[str, str] | None = None
) -> str | None:
    """A box's content, or a gold answer, in the one form of its kind; None if it is not of it.

    Open answers have no such form, so theirs is None. So is that of a content much longer than
    any option.
    """
    longest = max(map(len, (choices or {}).values()), default=0)
    if kind in get_args(Kind) and len(content) > _MOST_CHARACTERS + longest:
        return None
    match kind:
        case "number":
            number = parse_number(content)
            return None if number is None else str(number)
        case "choice":
            return _read_choice(content, choices or _USUAL_LABELS)
        case "boolean":
            return _read_boolean(content)
        case "open":
            return None
    raise ValueError(f'kind is {kind!r}, expected "number", "choice" or "boolean"')


def _read_choice(content: str, choices: Mapping[str, str]) -> str | None:
    """A bare label, a label with its own text, a text, a label with free text: in this order.

    The text comes before the last, because "C. difficile" names an organism before it names C.
    All is tried with its `$` first, because "$5" is an amount before it is the label 5.
    """
    for peeled, compared in _READINGS:
        label, text = _label_and_text(peeled(content), choices)
        if label is not None and (not text or _folded(text) == _folded(choices[label])):
            return label
        if matching := _labels_of_text(compared(content), choices, compared):
            return matching[0] if len(matching) == 1 else None
    return None if label is None or _names_another(text, label, choices) else label


def _with_dollars(content: str) -> str:
    return peel(content, keep_dollar=True)


# How a content is peeled to find a label, and how it and the options' texts are to be compared.
_READINGS: tuple[tuple[Callable[[str], str], Callable[[str], str]], ...] = (
    (_with_dollars, str.strip),
    (_with_dollars, _with_dollars),
    (peel, peel),
)


def _label_and_text(bare: str, choices: Mapping[str, str]) -> tuple[str | None, str]:
    """The label that `bare` is or begins with, and the text after it: "" where it is the whole."""
    labels = {label.casefold(): label for label in choices}
    unnamed = peel(_OPTION.sub("", bare, count=1)) if _OPTION.match(bare) else bare
    found = _LABEL.fullmatch(unnamed) or _LABEL_AND_TEXT.fullmatch(unnamed)
    if found is None:
        return None, ""
    text = found[2] if found.re is _LABEL_AND_TEXT else ""
    return labels.get(found[1].casefold()), text


def _labels_of_text(
    text: str, choices: Mapping[str, str], compared: Callable[[str], str]
) -> list[str]:
    """The labels whose text is `text`, which is `compared` already, but for case and spaces."""
    folded = _fold(text)
    return [label for label, own in choices.items() if folded and _fold(compared(own)) == folded]


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _folded(text: str) -> str:
    return _fold(peel(text))


def _names_another(text: str, label: str, choices: Mapping[str, str]) -> bool:
    """Whether free text after `label` names a second option, by its label or by its text.

    The label's own text may hold another's, and if all of the text is another's the label counts.
    """
    own, whole = _folded(choices[label]), _folded(text)
    rest = _words(own).sub(" ", text) if own else text
    others = {other.casefold(): _folded(choices[other]) for other in choices if other != label}
    if others.keys() & {whole, *(found[0].casefold() for found in _STANDING.finditer(rest))}:
        return True
    return whole not in others.values() and any(
        _words(option).search(rest if _words(option).search(own) else text)
        for option in others.values()
        if option
    )


def _words(folded: str) -> re.Pattern[str]:
    """A pattern for a text as whole words, with any spaces between them; "5" is not in "1.5"."""
    spaced = r"\s+".join(map(re.escape, folded.split()))
    return re.compile(rf"(?<!\w)(?<![0-9][.,]){spaced}(?!\w)(?![.,][0-9])", re.IGNORECASE)


def _read_boolean(content: str) -> str | None:
    words = peel(content)
    yes, no = _YES.search(words), _NO.search(words)
    if bool(yes) == bool(no) or any(map(_is_negated, _CLAUSE_END.split(words))):
        return None
    return "yes" if yes else "no"


def _is_negated(clause: str) -> bool:
    """Whether a "not" stands before the answer: "No, it is not" is a no all the same."""
    negation = _NEGATION.search(clause)
    return negation is not None and any(
        answer.search(clause, negation.end()) for answer in (_YES, _NO)
    )

r"""Reading and grading final answers: boxed, of three kinds, with "unparsed" apart from "wrong".

The rules are those of ORPO-Distill's Reason-then-Answer prompt (arXiv:2509.25100): only the last
closed `\boxed{}` counts, never a number or letter that happens to stand in the text.
"""

import re
from collections.abc import Mapping

from pipeline.boxed import last_box, peel
from pipeline.numbers import parse_number
from pipeline.rows import Kind, Verdict

# The labels of a multiple-choice item whose options are not at hand.
_USUAL_LABELS = dict.fromkeys("ABCDE12345", "")
_OPTION = re.compile(r"option\s+", re.IGNORECASE)
_LABEL = re.compile(r"\(?(\w)\)?")
_LABEL_AND_TEXT = re.compile(r"\(?(\w)(?:\)[.:]?\s*|:\s*|\.\s+)(?=\S)(.*)", re.DOTALL)
_YES = re.compile(r"(?<![\w-])(?:yes|true)(?![\w-])", re.IGNORECASE)
_NO = re.compile(r"(?<![\w-])(?:no|false)(?![\w-])", re.IGNORECASE)
_NEGATED = re.compile(r"(?<![\w-])not\s+(?:yes|true|no|false)(?![\w-])", re.IGNORECASE)


def extract_answer(text: str, kind: Kind, choices: Mapping[str, str] | None = None) -> str | None:
    r"""The answer in the last closed box of `text`, canonical; None where it is unparsed.

    `choices` maps the labels of this very item to their texts. Canonical answers are a label as
    the item writes it ("B"), a fraction in lowest terms ("18", "3/4", "-7"), "yes" or "no".
    """
    content = last_box(text)
    return None if content is None else canonical_answer(content, kind, choices)


def grade(text: str, kind: Kind, gold: str, choices: Mapping[str, str] | None = None) -> Verdict:
    """Whether `text` ends in the `gold` answer; ValueError where `gold` is not of that kind."""
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

    Open answers have no such form, so theirs is None.
    """
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
    """
    labels = {label.casefold(): label for label in choices}
    bare = peel(content)
    unnamed = peel(_OPTION.sub("", bare, count=1)) if _OPTION.match(bare) else bare
    if (single := _LABEL.fullmatch(unnamed)) and single[1].casefold() in labels:
        return labels[single[1].casefold()]
    labelled = _LABEL_AND_TEXT.fullmatch(unnamed)
    label = labels.get(labelled[1].casefold()) if labelled else None
    text = labelled[2] if labelled else ""
    if label is not None and _folded(text) == _folded(choices[label]):
        return label
    matching = _labels_of_text(content, choices)
    if matching:
        return matching[0] if len(matching) == 1 else None
    return None if label is None or _names_another(text, label, labels) else label


def _labels_of_text(content: str, choices: Mapping[str, str]) -> list[str]:
    """The labels whose text is `content`: as it stands, or else with both of them peeled."""
    plain = content.strip().casefold()
    verbatim = [label for label, text in choices.items() if text.strip().casefold() == plain]
    folded = _folded(content)
    return verbatim or [
        label for label, text in choices.items() if folded and _folded(text) == folded
    ]


def _folded(text: str) -> str:
    return " ".join(peel(text).casefold().split())


def _names_another(text: str, label: str, labels: Mapping[str, str]) -> bool:
    """Whether a second label is in `text`; a lower-case letter is a word there, as in "a dog"."""
    whole = labels.get(peel(text).casefold())
    standing = re.findall(r"(?<!\w)(?:([A-Z0-9])(?!\w)|([a-z])\))", text)
    named = {labels.get((upper or lower).casefold()) for upper, lower in standing}
    return bool((named | {whole}) - {label, None})


def _read_boolean(content: str) -> str | None:
    words = peel(content)
    yes, no = _YES.search(words), _NO.search(words)
    if bool(yes) == bool(no) or _NEGATED.search(words):
        return None
    return "yes" if yes else "no"

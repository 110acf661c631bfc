r"""The rules of reading a final answer, case by case; `None` stands for unparsed."""

import pytest
from hypothesis import example, given, settings, strategies

from pipeline.answers import canonical_answer, extract_answer, grade

ITEM = {"A": "dry palms", "B": "Wet palms.", "C": "5 mg", "D": "C. difficile", "E": "50%"}

CHOICES = [
    ("B", "B"),
    ("b", "B"),
    ("(B)", "B"),
    ("(b)", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("[B]", "B"),
    ("**B**", "B"),
    (r"\text{(B)}", "B"),
    (r"$\textbf{B}$", "B"),
    ("B) text", "B"),
    ("B) wet palms", "B"),
    ("(B) wet palms", "B"),
    ("B. wet palms", "B"),
    ("B: wet palms", "B"),
    (r"\text{B) } \text{wet palms}", "B"),
    ("option B", "B"),
    ("Option (b)", "B"),
    ("Option B: wet palms", "B"),
    ("A) wet palms", "A"),  # a label beats a text
    ("A) a dog", "A"),
    ("wet palms", "B"),
    ("WET  PALMS", "B"),
    (r"\text{Wet palms}", "B"),
    (r"50\%", "E"),
    ("C. difficile", "D"),  # an organism, not the label C
    ("D. C. difficile", "D"),
    ("palms", None),
    ("dry", None),
    ("A and B", None),
    ("A, B", None),
    ("A or B", None),
    ("A) or B)", None),
    ("A) b)", None),
    ("A) B", None),
    ("AB", None),
    ("I think B", None),
    ("the answer is B", None),
    ("B because it is wet", None),
    ("F", None),
    ("2", None),
    ("", None),
    (".", None),
]


@pytest.mark.parametrize(("content", "answer"), CHOICES)
def test_choices(content, answer):
    assert extract_answer(f"\\boxed{{{content}}}", "choice", ITEM) == answer


@pytest.mark.parametrize(
    ("content", "choices", "answer"),
    [
        ("D", {"A": "x", "B": "y", "C": "z"}, None),
        ("e", dict.fromkeys("ABCDE", "x"), "E"),
        ("3", {"1": "x", "2": "y", "3": "z", "4": "w"}, "3"),
        ("(3)", {"1": "x", "2": "y", "3": "z", "4": "w"}, "3"),
        ("C", {"1": "x", "2": "y", "3": "z", "4": "w"}, None),
        ("5", {"1": "x", "2": "y", "3": "z", "4": "5"}, "4"),
        ("2) 3 apples", {"1": "x", "2": "3 apples", "3": "y"}, "2"),
        ("2) 3 pens", {"1": "x", "2": "3 apples", "3": "y"}, None),
        ("A", {"A": "B", "B": "A"}, "A"),  # a label beats a text
        ("WW or Ww", {"A": "WW or ww", "B": "WW or Ww", "C": "WW"}, None),  # alike when folded
        ("[x]", {"A": "[x]", "B": "x"}, "A"),
        ("sky", {"A": "sky", "B": "roots", "C": "sky"}, None),
        ("B", None, "B"),
        ("4", None, "4"),
        ("wet palms", None, None),
    ],
)
def test_the_labels_are_those_of_the_item(content, choices, answer):
    assert extract_answer(f"\\boxed{{{content}}}", "choice", choices) == answer


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        (r"\text{TRUE}", "yes"),
        ("false", "no"),
        ("Yes, they could", "yes"),
        ("yes and no", None),
        ("true or false", None),
        ("not true", None),
        ("nothing", None),
        ("yesterday", None),
        ("no-one", None),
        ("maybe", None),
        ("", None),
    ],
)
def test_yes_and_no(content, answer):
    assert extract_answer(f"\\boxed{{{content}}}", "boolean") == answer


@pytest.mark.parametrize(
    ("text", "kind", "gold", "verdict"),
    [
        (r"\boxed{18.0}", "number", "18", "right"),
        (r"\boxed{1,234}", "number", "1234", "right"),
        (r"\boxed{0.75}", "number", "3/4", "right"),
        (r"\boxed{19}", "number", "18", "wrong"),
        (r"the answer is 18", "number", "18", "unparsed"),
        (r"\boxed{1,5}", "number", "15", "unparsed"),
        (r"\boxed{18} or \boxed{?}", "number", "18", "unparsed"),
        (r"\boxed{wet palms}", "choice", "B", "right"),
        (r"\boxed{A}", "choice", "B", "wrong"),
        (r"\boxed{A, B}", "choice", "B", "unparsed"),
        (r"\boxed{True}", "boolean", "yes", "right"),
        (r"\boxed{False}", "boolean", "yes", "wrong"),
        (r"yes", "boolean", "yes", "unparsed"),
    ],
)
def test_grading(text, kind, gold, verdict):
    assert grade(text, kind, gold, ITEM if kind == "choice" else None) == verdict


def test_what_no_answer_can_equal_is_refused():
    with pytest.raises(ValueError, match="gold answer 'F' is not a choice"):
        grade(r"\boxed{B}", "choice", "F", ITEM)
    with pytest.raises(ValueError, match='expected "number", "choice" or "boolean"'):
        extract_answer(r"\boxed{B}", "letter")


PIECES = strategies.sampled_from(
    [*"AB12 {}()[]$.,;:-+/=^_\\*%\n", "\\boxed", "\\text{", "\\frac", "10^", "e9", "\u2028", "é"]
)


@settings(deadline=None)
@given(strategies.lists(PIECES, max_size=40).map("".join) | strategies.text())
@example("\\boxed{\\frac{\\frac11}{2}}")
@example("\\text{" * 500)
def test_no_text_breaks_the_reading(text):
    for wrapped in (text, f"\\boxed{{{text}}}"):
        for kind in ("number", "choice", "boolean"):
            answer = extract_answer(wrapped, kind, ITEM)
            assert answer is None or canonical_answer(answer, kind, ITEM) == answer

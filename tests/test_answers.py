r"""The rules of reading a final answer, case by case; `None` stands for unparsed."""

import re

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


CITIES = {"A": "London", "B": "Paris", "C": "West Paris", "D": "hepatitis B", "E": "I'd go"}
NUMBERED = {"1": "3 apples", "2": "3", "3": "apples", "4": "1.5", "5": "15"}
TWO_OPTIONS = (
    """
a) or b; a. or b.; A: not b; b) or a; b) not a or c; b. a is wrong; a. london, b. paris
A. London or Paris; A. London, not WEST  PARIS; A) x and hepatitis B; C) West Paris or Paris
""".strip()
    .replace("\n", "; ")
    .split("; ")
)
ONE_OPTION = (
    """
B; (B); B.; option B; B) text; B) a text; B) a letter, e.g. this, i.e. it; B) a d-dimer, I'd say
A) Parisian; C) West Paris; C) West Paris, of course; D) hepatitis B; D) Hepatitis B infection
""".strip()
    .replace("\n", "; ")
    .split("; ")
)


@pytest.mark.parametrize("content", TWO_OPTIONS)
def test_a_label_with_another_label_or_option_is_unparsed(content):
    assert extract_answer(f"\\boxed{{{content}}}", "choice", CITIES) is None


@pytest.mark.parametrize("content", ONE_OPTION)
def test_a_label_may_have_its_own_text_or_words_that_name_no_option(content):
    answer = content.removeprefix("option ").strip("(")[0]
    assert extract_answer(f"\\boxed{{{content}}}", "choice", CITIES) == answer


@pytest.mark.parametrize(
    ("answer", "contents"),
    [
        ("1", "1) 3 apples; (1) 3 apples."),
        ("4", "4: 1.5; 4) 1.5 m"),
        (None, "2) 3 or 1.5; 5) 15 apples; 1) 3 apples or 3"),
    ],
)
def test_a_label_that_is_a_digit_with_a_text(answer, contents):
    for content in contents.split("; "):
        assert extract_answer(f"\\boxed{{{content}}}", "choice", NUMBERED) == answer


@pytest.mark.parametrize(
    ("answer", "contents"),
    [
        ("2", r"$5; \$5; $\$5$; \text{\$5}.; 2) $5; 2"),
        ("5", r"\$2; 5; (5); $5$; $\text{(5)}$"),  # a label beats a text
        ("4", "$1$; 4"),
    ],
)
def test_an_amount_is_a_text_before_it_is_a_label(answer, contents):
    choices = {"1": "$10", "2": "$5", "3": "5 dollars", "4": "$1$", "5": "$2"}
    for content in contents.split("; "):
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
        ("No, it is not", "no"),
        ("Yes, they could not", "yes"),
        ("not supported, so false", "no"),
        ("nothing", None),
        ("yesterday", None),
        ("no-one", None),
        ("maybe", None),
        ("", None),
    ],
)
def test_yes_and_no(content, answer):
    assert extract_answer(f"\\boxed{{{content}}}", "boolean") == answer


NEGATED = "isn't, isn\u2019t, isnt, never, cannot be, not really, hardly, not a, far from, \\neg"


@pytest.mark.parametrize("negation", NEGATED.split(", "))
@pytest.mark.parametrize("answer", ["yes", "true", r"\text{ false}."])
def test_an_answer_that_is_negated_is_unparsed(negation, answer):
    assert extract_answer(f"\\boxed{{It {negation} {answer}}}", "boolean") is None


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
    for text in (r"\boxed{B}", "no box"):
        for gold, got in ((None, "None (NoneType)"), (18, "18 (int)"), (True, "True (bool)")):
            expected = f"the gold answer is {got}, expected the text of a number: "
            with pytest.raises(ValueError, match=re.escape(expected)):
                grade(text, "number", gold)
    with pytest.raises(ValueError, match='expected "number", "choice" or "boolean"'):
        extract_answer(r"\boxed{B}", "letter")


@pytest.mark.parametrize("kind", ["number", "choice", "boolean"])
@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 140_000,
        "\\boxed{" + "(" * 500_000 + ")" * 500_000 + "}",
        "\\boxed{" + "\\text{" * 140_000 + "B" + "}" * 140_001,
        "\\boxed{x" + ".$" * 500_000 + "}",
        "\\boxed{" + "not " * 250_000 + "}",
        "\\boxed " + "1 " * 500_000,
    ],
    ids=range(6),
)
def test_a_megabyte_of_noise_is_unparsed_in_linear_time(text, kind):
    assert extract_answer(text, kind, ITEM) is None


def test_the_longest_content_depends_on_the_options():
    choices = {"A": "palms " * 500, "B": "C"}
    assert extract_answer(f"\\boxed{{A) {choices['A']}}}", "choice", choices) == "A"
    assert extract_answer(f"\\boxed{{A) {'palms ' * 600}}}", "choice", choices) is None


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

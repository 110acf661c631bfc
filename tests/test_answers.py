r"""The rules of reading a final answer, case by case; `None` stands for unparsed."""

from fractions import Fraction

import pytest
from hypothesis import example, given, strategies

from pipeline.answers import canonical_answer, extract_answer, grade
from pipeline.boxed import last_box, peel

BOXES = [
    (r"so \boxed{18}.", "18"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{1} then \boxed{2", "1"),  # cut by the length limit
    (r"\boxed{2", None),
    (r"the answer is 18", None),
    (r"\fbox{18}", "18"),
    (r"\boxed B", "B"),
    (r"\boxed 18 apples", "18"),
    (r"\boxed \text{B} is right", r"\text{B}"),
    (r"$\boxed B$", "B"),
    (r"\boxed {B}", "B"),
    (r"\boxedB", None),
    (r"\boxed", None),
    (r"\boxed ", None),
    (r"\boxed(B)", None),
    (r"\boxed{}", ""),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{ 3 }", r"\{ 3 "),
    (r"\boxed{3 \}}", r"3 \}"),
    (r"\boxed{3 \}", None),
    (r"\boxed{a \\} b", r"a \\"),
    (r"\boxed{x = \boxed{18}}", "18"),
    (r"\boxed{ \boxed{18}", "18"),
    ("\\boxed{1\n8}", "1\n8"),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_the_last_closed_box(text, content):
    assert last_box(text) == content


@pytest.mark.parametrize(
    ("content", "peeled"),
    [
        ("  B ", "B"),
        ("$B$", "B"),
        ("$$B$$", "B"),
        (r"\(B\)", "B"),
        (r"\[B\]", "B"),
        (r"\text{B}", "B"),
        (r"\textbf{B}", "B"),
        (r"\mathrm{B}", "B"),
        (r"\text{\textbf{(B)}}", "B"),
        (r"\text{CO$_{2}$}", "CO$_{2}"),
        ("{B}", "B"),
        ("[B]", "B"),
        ("{{(B)}}", "B"),
        ("**B**", "B"),
        ("B.", "B"),
        ("B,;:.", "B"),
        (r"**$\mathrm{(B)}$.**", "B"),
        ("(a)(b)", "(a)(b)"),
        ("**", "**"),
        ("", ""),
        (r"\$5", "5"),
        (r"5\%", "5%"),
        (r"wet~palms\quad{}now", "wet palms {}now"),
    ],
)
def test_peeling(content, peeled):
    assert peel(content) == peeled


NUMBERS = [
    ("18", "18"),
    ("18.00", "18"),
    ("007", "7"),
    (".5", "1/2"),
    ("5.", "5"),
    ("-7", "-7"),
    ("\u22127", "-7"),
    ("\u2212 7", "-7"),
    ("+7", "7"),
    ("--7", None),
    ("-0", "0"),
    ("1,234", "1234"),
    ("1,234,567.50", "2469135/2"),
    ("1{,}234", "1234"),
    (r"1\,234\,567", "1234567"),
    (r"1,\!234", "1234"),
    (r"1,\,234", "1234"),
    ("1\u202f234", "1234"),
    ("1,5", None),
    (r"1\,5", None),
    ("12,34", None),
    ("1,2345", None),
    ("1234,567", None),
    ("1,234,56", None),
    ("0,123", None),
    ("1.234,56", None),
    ("1 234", None),
    ("$5", "5"),
    (r"\$5", "5"),
    (r"$\$5$", "5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("\u2212€5", "-5"),
    ("€\u22125", "-5"),
    ("5€", "5"),
    ("£ 1,000", "1000"),
    ("50%", "50"),
    (r"50\%", "50"),
    ("18 apples", "18"),
    ("18 red apples.", "18"),
    (r"18\text{ dollars}", "18"),
    (r"18\,\text{km}", "18"),
    (r"\text{18 dollars}", "18"),
    ("$18 per hour", "18"),
    ("$18/hour", "18"),
    ("5 km/h", "5"),
    ("5 m^2", "5"),
    (r"5\text{ cm}^{2}", "5"),
    ("5 m²", "5"),
    (r"90^\circ", "90"),
    ("18 (apples)", "18"),
    ("x = 3", "3"),
    ("x=-3", "-3"),
    ("$x_{1} = 3$", "3"),
    (r"\text{Total cost} = \$1,200", "1200"),
    ("= 3", "3"),
    ("3 + 5 = 8", None),
    ("5 = x", None),
    ("3/4", "3/4"),
    ("-6/8", "-3/4"),
    ("0.75", "3/4"),
    ("1.5 / 2", "3/4"),
    ("3/4 cup", "3/4"),
    ("3/0", None),
    ("10/12/2020", None),
    (r"\frac{3}{4}", "3/4"),
    (r"-\dfrac{6}{8}", "-3/4"),
    (r"\frac{-3}{4}", "-3/4"),
    (r"\frac34", "3/4"),
    (r"\tfrac{1,000}{3}", "1000/3"),
    (r"\frac{3}{0}", None),
    (r"\frac{a}{b}", None),
    (r"2\frac{1}{2}", None),
    ("1.5e3", "1500"),
    ("2E-2", "1/50"),
    (r"1.5 \times 10^{3}", "1500"),
    (r"-2 \cdot 10^{-3}", "-1/500"),
    ("2×10^3", "2000"),
    ("2 x 10^3", "2000"),
    ("10^3", None),
    ("10²", None),
    ("1e999999999", None),
    ("9" * 5000, None),
    ("18 or 20", None),
    ("18, 20", None),
    ("(3, 4)", None),
    ("18-20", None),
    ("5:30", None),
    ("5½", None),
    ("5 and a half", None),
    ("2 million", None),
    ("3x", None),
    (r"3\pi", None),
    (r"2\sqrt{3}", None),
    ("about 18", None),
    ("eighteen", None),
    ("\u0663", None),
    ("", None),
]


@pytest.mark.parametrize(("content", "answer"), NUMBERS)
def test_numbers(content, answer):
    assert extract_answer(f"so \\boxed{{{content}}}", "number") == answer


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


BALANCED = strategies.builds(
    lambda text, depth: "x{" * depth + text + "}y" * depth,
    strategies.text("ab1$ ().,", max_size=5),
    strategies.integers(0, 4),
)


@given(strategies.lists(BALANCED, min_size=1, max_size=3), strategies.text("ab {\\"))
def test_a_balanced_content_comes_back_whole(contents, before):
    text = before + " ".join(f"\\boxed{{{content}}}" for content in contents)
    assert last_box(f"{text} and \\boxed{{ cut") == contents[-1]


@given(strategies.fractions(max_denominator=10**6))
def test_every_fraction_is_read_back(value):
    written = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    for content in (str(value), written, f"x = {value}", f"${value}$ km"):
        answer = canonical_answer(content, "number")
        assert answer is not None
        assert Fraction(answer) == value


@given(strategies.integers(-(10**12), 10**12), strategies.integers(0, 3))
def test_every_grouped_decimal_is_read_back(value, places):
    answer = canonical_answer(f"{value:,}.{'0' * places}", "number")
    assert answer == str(value)


PIECES = strategies.sampled_from(
    [*"AB12 {}()[]$.,;:-+/=^_\\*%\n", "\\boxed", "\\text{", "\\frac", "10^", "e9", "\u2028", "é"]
)


@given(strategies.lists(PIECES, max_size=40).map("".join) | strategies.text())
@example("\\boxed{\\frac{\\frac11}{2}}")
@example("\\text{" * 500)
def test_no_text_breaks_the_reading(text):
    for wrapped in (text, f"\\boxed{{{text}}}"):
        for kind in ("number", "choice", "boolean"):
            answer = extract_answer(wrapped, kind, ITEM)
            assert answer is None or canonical_answer(answer, kind, ITEM) == answer

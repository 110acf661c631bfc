from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies

from pipeline.answers import canonical_answer, extract_answer

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


# What follows a number and changes it, or makes it another.
CHANGES = (
    """
hundreds, thousands, thousand, millions, billions, trillion, dozen, dozens, score, tens, bn, mn
lakh, lakhs, crore, thirds, fourths, fifths, sixth, sevenths, eighths, ninths, tenths, twelfths
twentieths, hundredths, thousandths, millionths, quarter, quarters, half, halves, doubled
squared, cubed, plus, minus, times, times as many, plus tax, to twenty, apples or six
people minus two, point five, over four, million dollars, tenths of a mile, K people
M, B, MM, k, n, a, x
""".strip()
    .replace("\n", ", ")
    .split(", ")
)


@pytest.mark.parametrize("words", CHANGES)
def test_a_word_that_changes_a_number_is_no_unit(words):
    for content in (f"18 {words}", f"18\\text{{ {words}}}", f"-$18 {words}", f"3/4 {words}."):
        assert extract_answer(f"so \\boxed{{{content}}}", "number") is None


LETTERS = (
    r"5M, 5B, 5k, 2n, 3a, 5j, 3x, 3xy, 2n^2, 5bn, 5mn, 5\text{M}, 5K people, "
    r"$5m, \$5m, $\$5m$, £3m, $50K, $5 m, €5 M"
)


@pytest.mark.parametrize("content", LETTERS.split(", "))
def test_a_letter_that_may_be_an_unknown_or_a_magnitude_is_no_unit(content):
    assert extract_answer(f"\\boxed{{{content}}}", "number") is None


UNITS = (
    """
apples, km, hours, %, °C, seconds, minutes, months, quarts, points, degrees, percent, J, T, kg, m/s
m^2, cm squared, tenants, teenagers, pens and pencils, pairs of socks, a day, cents per pound
""".strip()
    .replace("\n", ", ")
    .split(", ")
)


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_left_out(unit):
    assert extract_answer(f"\\boxed{{12 {unit}}}", "number") == "12"


@pytest.mark.parametrize("unit", [*"mgshlLAVWNCF%", "km", "kg", "mL", "m/s", "m^2", r"\text{ m}"])
def test_units_may_touch_the_digits(unit):
    assert extract_answer(f"\\boxed{{5{unit}}}", "number") == "5"


@pytest.mark.parametrize("content", ["$5m$", "$5 a day", "$5/h", "$5 per h"])
def test_a_letter_need_not_be_a_magnitude(content):
    assert extract_answer(f"\\boxed{{{content}}}", "number") == "5"


@settings(deadline=None)
@given(strategies.fractions(max_denominator=10**6))
def test_every_fraction_is_read_back(value):
    written = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    for content in (str(value), written, f"x = {value}", f"${value}$ km"):
        answer = canonical_answer(content, "number")
        assert answer is not None
        assert Fraction(answer) == value


@settings(deadline=None)
@given(strategies.integers(-(10**12), 10**12), strategies.integers(0, 3))
def test_every_grouped_decimal_is_read_back(value, places):
    answer = canonical_answer(f"{value:,}.{'0' * places}", "number")
    assert answer == str(value)

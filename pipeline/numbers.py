"""Reading a number as an exact fraction, in the ways that models and data sets write it."""

import re
from fractions import Fraction

from pipeline.boxed import QUANTITY, peel

# A degenerate model fills a box with digits; beyond these it is noise, and exact arithmetic on it
# would take forever.
_MOST_CHARACTERS = 300
_LARGEST_EXPONENT = 300

_THIN_SPACE = re.compile(r"(?<=[0-9])(?:\\,|[\u00a0\u2009\u202f])(?=[0-9])")
_NAME = re.compile(r"(?:[^\W\d_][\w{} ]*)?=\s*")
_CURRENCIES = "$¢£¥€₩₪₫₱₴₹₺₽₿"
_SIGN = re.compile(rf"[{_CURRENCIES}]?\s*([+-]?)\s*[{_CURRENCIES}]?\s*")
_DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_LATEX_FRACTION = re.compile(
    r"\\[dt]?frac\s*(?:\{\s*(?P<top>[^{}]+)\}|(?P<top_digit>[0-9]))"
    r"\s*(?:\{\s*(?P<bottom>[^{}]+)\}|(?P<bottom_digit>[0-9]))"
)
_FRACTION = re.compile(rf"(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})")
_POWER = r"10\s*\^\s*(?:\{\s*(?P<braced>[+-]?[0-9]+)\s*\}|(?P<plain>[+-]?[0-9]+))"
_SCIENTIFIC = re.compile(
    rf"(?P<mantissa>{_DECIMAL})"
    rf"(?:[eE](?P<exponent>[+-]?[0-9]+)|\s*(?:\\times|\\cdot|[x×*])\s*{_POWER})"
)
_PLAIN = re.compile(_DECIMAL)
_UNIT_SIGNS = frozenset(" %°'\"()./-" + _CURRENCIES)
_UNIT_EXPONENT = re.compile(r"(?<=[^\W\d_])\^\s*\{?[23]\}?")
# What changes the value, or stands for an unknown, is no unit.
_NO_UNIT = re.compile(
    rf"^\s*(?:-|to\b|squared\b|cubed\b|[xyzπ]+\b)|\b(?:{QUANTITY}|pi|or|and an?)\b",
    re.IGNORECASE,
)
# One letter at the digits is a unit or an unknown ("2n", "3a"); apart from them, or with more words
# after it, it may count thousands ("5 M", "50K people").
_NO_UNIT_LETTER = re.compile(
    r"[^\W\d_mgshlLAVWNCF](?![^\W\d_])|\s*(?:[knMB]|MM|a$|K(?=\s*\w))(?!\w)"
)
_MONEY_LETTER = re.compile(r"\s*[^\W\d_aA](?!\w)")  # "$5m", but "$5 a day"


def parse_number(content: str) -> Fraction | None:
    """The one number that is the whole of `content`, units aside; None if there is no such number.

    "1,234", "-$5", "18 apples", "x = 3/4", "1.5e3" are numbers; "1,5" and "18 or 20" are not.
    """
    if len(content) > _MOST_CHARACTERS:
        return None
    text = peel(_normalise(content))
    if name := _NAME.match(text):
        text = peel(text[name.end() :])
    sign = _SIGN.match(text)
    assert sign is not None  # every part of it may be empty
    found = _leading_value(text[sign.end() :])
    if found is None or not _is_unit(found[1]):
        return None
    if _is_money(content) and _MONEY_LETTER.match(found[1]):
        return None
    return -found[0] if sign[1] == "-" else found[0]


def _normalise(text: str) -> str:
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace(",\\,", ",")
    text = _THIN_SPACE.sub(",", text).replace("\\,", " ").replace("²", "^2").replace("³", "^3")
    return re.sub(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°", text)


def _leading_value(text: str) -> tuple[Fraction, str] | None:
    """The number that `text` begins with, and what follows it."""
    if match := _LATEX_FRACTION.match(text):
        top = parse_number(match["top"] or match["top_digit"])
        bottom = parse_number(match["bottom"] or match["bottom_digit"])
        return (top / bottom, text[match.end() :]) if top is not None and bottom else None
    if match := _FRACTION.match(text):
        below = _decimal(match["bottom"])
        return (_decimal(match["top"]) / below, text[match.end() :]) if below else None
    if match := _SCIENTIFIC.match(text):
        exponent = int(match["exponent"] or match["braced"] or match["plain"])
        if abs(exponent) > _LARGEST_EXPONENT:
            return None
        return _decimal(match["mantissa"]) * Fraction(10) ** exponent, text[match.end() :]
    if match := _PLAIN.match(text):
        return _decimal(match[0]), text[match.end() :]
    return None


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").rstrip("."))


def _is_unit(rest: str) -> bool:
    """Whether what follows a number only names what is counted: any digit in it says no."""
    letters = _UNIT_EXPONENT.sub("", rest)
    named = all(sign in _UNIT_SIGNS or sign.isalpha() for sign in letters)
    return named and not _NO_UNIT.search(letters) and not _NO_UNIT_LETTER.match(letters)


def _is_money(content: str) -> bool:
    """Whether a currency is in `content`: a `$` that has no partner, or any other sign of one."""
    return content.count("$") % 2 == 1 or any(sign in content for sign in _CURRENCIES[1:])

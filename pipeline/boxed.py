"""Finding the final answer of a text: the content of its last box, without what dresses it up."""

import re
from collections.abc import Mapping

# Words that change the number before them, or begin another ("18 to twenty").
QUANTITY = (
    r"(?:hundred|thousand|(?:[mbz]|tr|quadr|quint)illion|ten|dozen|score|lakh|crore|quarter|third"
    r"|fourth|fifth|sixth|seventh|eighth|ninth|eleventh|twelfth)(?:th)?s?"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen(?:ths?)?"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)t(?:y|ieths?)"
    r"|zero|two|three|four|five|six|seven|eight|nine|eleven|twelve"
    r"|half|halves|halved|doubled|tripled|[bmt]n|[bm]ln|mil|mio"
    r"|plus|minus|times|divided|multiplied|factorial"
)

# TeX lets a box take its content over spaces and one line's end.
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])([ \t]*(?:\r?\n)?[ \t]*)")
# `\boxed B` takes one word, of such pieces and of groups in braces. A `\)` or `\\` ends it.
_PIECE = re.compile(
    r"\\(?!(?:boxed|fbox|end)(?![A-Za-z]))(?:[A-Za-z]+(?:[ \t]+(?=\{))?|[,;:!%$&#_{} ])"
    r"|[^\s${}\\]+"
)
_WITHOUT_SPACE = re.compile(r"[\\0-9+\u2212-]")
# Where the next word belongs to the answer, taking the first alone would cut "3 / 4" or "A or B".
_GOES_ON = re.compile(
    r"[ \t]+(?:(?:or|and|to)[ \t]+|(?=[0-9+/^=×·]|[-\u2212*][ \t]*[0-9.\\]"
    r"|\\(?:times|cdot|div|pm|pi|sqrt|[dt]?frac|text|math)|[A-Enxyz](?![\w'])"
    rf"|(?:{QUANTITY})(?!\w)))"
)
_FONT_NAME = r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox)\s*"
_FONT_OR_BRACE = re.compile(_FONT_NAME + r"\{|\\.|[{}]", re.DOTALL)
_SPACE = re.compile(r"\\(?:[;: ]|q?quad(?![A-Za-z]))|~")
_ESCAPED = re.compile(r"\\([%$&#_])")
_BARE_DOLLAR = re.compile(r"(?<!\\)\$")
_PAIRS = (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"))
_CLOSING = {"{": "}", "(": ")", "[": "]"}
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_BRACKETS = re.compile(r"\\.|[{}()\[\]]", re.DOTALL)


def last_box(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}`, `\fbox{...}` or `\boxed B`; None without one.

    A box that is never closed, as in a trace cut by the length limit, does not count. One that
    stands last but cannot be read, as `\boxed(B)`, gives None: an earlier one was not the answer.
    """
    boxes = list(_BOX.finditer(text))
    closes = _closings(text, _BRACES, boxes[0].start()) if boxes else {}
    for box in reversed(boxes):
        start = box.end()
        if text[start : start + 1] == "{":
            if start in closes:
                return text[start + 1 : closes[start]]
        elif (bare := _bare(text, start, bool(box[1]), closes)) is not None:
            return bare or None
    return None


def _closings(text: str, brackets: re.Pattern[str], start: int = 0) -> dict[int, int]:
    r"""Where each bracket that is opened from `start` on closes. `\{` and `\}` do not count."""
    waiting: dict[str, list[int]] = {closing: [] for closing in _CLOSING.values()}
    closes = {}
    for token in brackets.finditer(text, start):
        if closing := _CLOSING.get(token[0]):
            waiting[closing].append(token.start())
        elif opened := waiting.get(token[0]):
            closes[opened.pop()] = token.start()
    return closes


def _bare(text: str, start: int, spaced: bool, closes: Mapping[int, int]) -> str | None:
    r"""What a box without braces takes; "" where that cannot be read, None where it has nothing.

    A text that mentions the command, as "the `\boxed` format", has no answer there.
    """
    if not spaced and not _WITHOUT_SPACE.match(text, start):
        return "" if text[start : start + 1] in ("(", "[") else None
    first = start + (text[start : start + 1] == "$")
    end = _word_end(text, first, closes)
    if end == first:
        return None
    while end is not None and text[end - 1] not in ".;:!?":
        more = _GOES_ON.match(text, end)
        if more is None:
            break
        end = _word_end(text, more.end(), closes)
    return None if end is None else text[start:end]


def _word_end(text: str, start: int, closes: Mapping[int, int]) -> int | None:
    """Where the word at `start` ends; None where it has a brace that is never closed."""
    position: int | None = start
    while position is not None:
        if piece := _PIECE.match(text, position):
            position = piece.end()
        elif text[position : position + 1] == "{":
            position = closes[position] + 1 if position in closes else None
        else:
            break
    return position


def peel(content: str, keep_dollar: bool = False) -> str:
    r"""`content` without mathematics signs, fonts, outer brackets, `**` and trailing `. , ; :`.

    With `keep_dollar` no sign of a currency is lost: `$` stays, unless a `\$` tells them apart.
    """
    if keep_dollar and "\\$" in content:
        content = _BARE_DOLLAR.sub("", content)
    content = _without_fonts(_ESCAPED.sub(r"\1", _SPACE.sub(" ", content)))
    dollar = "" if keep_dollar else "$"
    closes = _closings(content, _BRACKETS)
    before, span = None, (0, len(content))
    while span != before:  # only the ends move: each layer copied anew would take quadratic time
        before = span
        span = _without_pair(content, *_trimmed(content, *span, dollar), closes)
    return content[slice(*span)]


def _without_fonts(content: str) -> str:
    r"""Every closed `\text{...}` and its like replaced by what is in it, at any depth."""
    pieces: list[str] = []
    opened: list[int] = []  # places in `pieces`
    position = 0
    for token in _FONT_OR_BRACE.finditer(content):
        pieces += content[position : token.start()], token[0]
        position = token.end()
        if token[0].endswith("{") and token[0] != "\\{":
            opened.append(len(pieces) - 1)
        elif token[0] == "}" and opened:
            font = opened.pop()
            if pieces[font] != "{":
                pieces[font] = pieces[-1] = ""
    return "".join(pieces) + content[position:]


def _trimmed(content: str, start: int, end: int, dollar: str) -> tuple[int, int]:
    while start < end and (content[start].isspace() or content[start] in dollar):
        start += 1
    while start < end and (content[end - 1].isspace() or content[end - 1] in ".,;:" + dollar):
        end -= 1
    return start, end


def _without_pair(content: str, start: int, end: int, closes: Mapping[int, int]) -> tuple[int, int]:
    if start < end and closes.get(start) == end - 1:
        return start + 1, end - 1
    for opening, closing in _PAIRS:
        long_enough = end - start >= len(opening) + len(closing)
        opens, shuts = (
            content.startswith(opening, start, end),
            content.endswith(closing, start, end),
        )
        if long_enough and opens and shuts:
            return start + len(opening), end - len(closing)
    return start, end

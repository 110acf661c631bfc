"""Finding the final answer of a text: the content of its last box, without what dresses it up."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])([ \t]*)")
# What `\boxed B` takes without braces: one command with its arguments, or one word.
_BARE = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})*|[^\s${}\\]+")
_FONT_NAME = r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox)\s*"
_FONT = re.compile(_FONT_NAME + r"\{([^{}]*)\}")
_OUTER_FONT = re.compile(_FONT_NAME + r"(?=\{)")
_SPACE = re.compile(r"\\(?:[;: ]|q?quad(?![A-Za-z]))|~")
_ESCAPED = re.compile(r"\\([%$&#_])")
_PAIRS = (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"))
_CLOSING = {"{": "}", "(": ")", "[": "]"}


def last_box(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}`, `\fbox{...}` or `\boxed B`; None without one.

    A box that is never closed, as in a trace cut by the length limit, does not count.
    """
    for match in reversed(list(_BOX.finditer(text))):
        start = match.end()
        if text[start : start + 1] == "{":
            end = closing_bracket(text, start)
            if end is not None:
                return text[start + 1 : end]
        elif match[1] and (bare := _BARE.match(text, start)):
            return bare[0]
    return None


def closing_bracket(text: str, start: int) -> int | None:
    r"""Where the bracket opened at `start` closes, or None. `\{` and `\}` do not count."""
    opening, closing = text[start], _CLOSING[text[start]]
    depth, position = 0, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == opening:
            depth += 1
        elif character == closing:
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def peel(content: str) -> str:
    r"""`content` without mathematics signs, fonts, outer brackets, `**` and trailing `. , ; :`."""
    content = _ESCAPED.sub(r"\1", _SPACE.sub(" ", content))
    before = None
    while content != before:
        before = content
        content = _FONT.sub(r"\1", content)
        content = content.strip().strip("$").rstrip(".,;:").strip()
        content = _without_pair(_without_brackets(content))
    return content


def _without_brackets(content: str) -> str:
    font = _OUTER_FONT.match(content)
    start = font.end() if font else 0
    if content[start : start + 1] not in _CLOSING:
        return content
    whole = closing_bracket(content, start) == len(content) - 1
    return content[start + 1 : -1] if whole else content


def _without_pair(content: str) -> str:
    for opening, closing in _PAIRS:
        long_enough = len(content) >= len(opening) + len(closing)
        if long_enough and content.startswith(opening) and content.endswith(closing):
            return content[len(opening) : -len(closing)]
    return content

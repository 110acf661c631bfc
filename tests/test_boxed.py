import pytest
from hypothesis import given, settings, strategies

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

# Each after an earlier box, which must not be taken in its place: the word is read whole.
WITHOUT_BRACES = [
    (r"\boxed 1{,}234", "1{,}234"),
    (r"\boxed 1\,234", r"1\,234"),
    (r"\boxed -\frac{3}{4}", r"-\frac{3}{4}"),
    (r"\boxed \frac34", r"\frac34"),
    (r"\boxed \frac 3 4", r"\frac 3 4"),
    (r"\boxed\text{18}", r"\text{18}"),
    (r"\boxed \text {18}", r"\text {18}"),
    (r"\boxed \text{a {b}} c", r"\text{a {b}}"),
    (r"\boxed5", "5"),
    (r"\boxed-7", "-7"),
    (r"\boxed \$5", r"\$5"),
    (r"\boxed $5", "$5"),
    (r"$\boxed 5\%$", r"5\%"),
    ("\\boxed\n{B}", "B"),
    ("\\boxed\r\n  {B}", "B"),
    ("\\boxed\nB", "B"),
    (r"\boxed 3 / 4", "3 / 4"),
    (r"\boxed - 7", "- 7"),
    (r"\boxed x = 3", "x = 3"),
    (r"\boxed 1 234", "1 234"),
    (r"\boxed 18, 20", "18, 20"),
    (r"\boxed 18 or twenty apples", "18 or twenty"),
    (r"\boxed 2 million people", "2 million"),
    (r"\boxed 5 \times 10^3 is", r"5 \times 10^3"),
    (r"\boxed A or B", "A or B"),
    (r"\boxed A, B", "A, B"),
    (r"\boxed 18. 20 are left", "18."),
    (r"\boxed 18 - as said", "18"),
    (r"\(\boxed 18\)", "18"),
    (r"\boxed 18\end{align}", "18"),
    (r"\boxed notation", "notation"),
    (r"\boxed(B)", None),
    (r"\boxed[B]", None),
    (r"\boxed \frac{3}{4", "earlier"),  # cut
    (r"in the `\boxed` format", "earlier"),  # a mention
    (r"in $\boxed$", "earlier"),
    (r"in \boxed", "earlier"),
]


@pytest.mark.parametrize(("text", "content"), WITHOUT_BRACES)
def test_a_box_without_braces_is_read_whole_and_in_its_place(text, content):
    assert last_box(r"\boxed{earlier}, " + text) == content


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


@pytest.mark.parametrize(
    ("content", "peeled"),
    [
        ("$5", "$5"),
        (r"\$5", "$5"),
        (r"$\$5$", "$5"),
        (r"\text{(\$5).}", "$5"),
        ("$5$", "$5$"),
        ("(B).", "B"),
    ],
)
def test_a_dollar_is_kept_on_demand(content, peeled):
    assert peel(content, keep_dollar=True) == peeled


# A megabyte of each: in quadratic time these would take hours.
LONG = 1_000_000


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{" * (LONG // 7), None),
        ("\\boxed{" * (LONG // 7) + "}", ""),
        ("\\boxed a{" * (LONG // 9), None),
        ("\\boxed a or b{ " * (LONG // 14), None),
        ("\\boxed" * (LONG // 6) + "{", None),
        ("\\boxed" + " " * LONG, None),
        ("\\boxed x" + " " * LONG, "x"),
        ("\\boxed{" + "\\" * LONG, None),
        ("\\boxed{x" + "{" * (LONG // 2), None),
    ],
    ids=range(9),
)
def test_boxes_are_found_in_linear_time(text, content):
    assert last_box(text) == content


@pytest.mark.parametrize(
    "content",
    [
        "(" * (LONG // 2) + "B" + ")" * (LONG // 2),
        "[{" * (LONG // 4) + "B" + "}]" * (LONG // 4),
        "\\text{" * (LONG // 7) + "B" + "}" * (LONG // 7),
        "\\text{{" * (LONG // 9) + "B" + "}}" * (LONG // 9),
        "**" * (LONG // 4) + "B" + "**" * (LONG // 4),
        "B" + ".$" * (LONG // 2),
        " $" * (LONG // 2) + "B",
    ],
    ids=range(7),
)
def test_layers_are_peeled_in_linear_time(content):
    assert peel(content) == "B"


BALANCED = strategies.builds(
    lambda text, depth: "x{" * depth + text + "}y" * depth,
    strategies.text("ab1$ ().,", max_size=5),
    strategies.integers(0, 4),
)


@settings(deadline=None)
@given(strategies.lists(BALANCED, min_size=1, max_size=3), strategies.text("ab {\\"))
def test_a_balanced_content_comes_back_whole(contents, before):
    text = before + " ".join(f"\\boxed{{{content}}}" for content in contents)
    assert last_box(f"{text} and \\boxed{{ cut") == contents[-1]

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

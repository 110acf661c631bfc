"""Which nodes of a cluster a stage may use: labels of nodes, as users write them."""

import re

_CLAUSE = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9._/-]*)(!?=)([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
)


def label_selector(text: str | None) -> dict[str, str]:
    """What "stage=training,market!=spot" is to Ray: {"stage": "training", "market": "!spot"}.

    None is {}, any node. Raises ValueError where the text is not of that form.
    """
    selector: dict[str, str] = {}
    for clause in text.split(",") if text is not None else ():
        match = _CLAUSE.fullmatch(clause.strip())
        if match is None or match[1] in selector:
            raise ValueError(
                "is not a list of labels: expected label=value or label!=value, each label once, "
                "such as stage=training or market!=spot,zone=a"
            )
        label, comparison, value = match.groups()
        selector[label] = f"!{value}" if comparison == "!=" else value
    return selector


def check_labels(text: str) -> str:
    """The text itself. Raises ValueError where it does not select labels."""
    label_selector(text)
    return text

"""Which nodes of a cluster a stage may use: labels of nodes, as users write them."""

import re
from typing import Any

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


def labels_of(text: str | None) -> dict[str, str]:
    """The labels of a node, "stage=training,market=spot". Raises ValueError for another form."""
    labels = label_selector(text)
    if any(value.startswith("!") for value in labels.values()):
        raise ValueError("are labels that a node has: expected label=value, without a !")
    return labels


def check_own_labels(text: str) -> str:
    """The text itself. Raises ValueError where it is not what a node has."""
    labels_of(text)
    return text


def matches(selector: str | None, labels: str | None) -> bool:
    """Whether a node with these labels is one of those that are selected."""
    has = labels_of(labels)
    wanted = label_selector(selector)
    return all(
        has.get(label) != value[1:] if value.startswith("!") else has.get(label) == value
        for label, value in wanted.items()
    )


def beside_driver() -> dict[str, Any]:
    """Options of an actor that stays on this process's node, where else Ray takes any.

    For what a run cannot be without: no other node that is lost then takes it along.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}

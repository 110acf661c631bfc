"""Texts on which pruning weighs a model's parts and measures what it lost."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from upath import UPath

from cluster.errors import BadInputError
from cluster.shapes import read_shape
from cluster.storage import failures
from pipeline.chat import plain_ids
from pipeline.logprobs import ResponseLogProbs, Row, collate

# Written for this purpose, one of each kind of text that a student may meet.
CALIBRATION_TEXTS = (
    "The heart of a blue whale weighs as much as a small car and beats only a few times a "
    "minute while the animal dives. At the surface it speeds up again, because the blood has "
    "to take in oxygen before the next descent. Researchers measured this with a sensor held "
    "to the skin by four suction cups.",
    "Question: A baker sells 24 loaves in the morning and half as many in the afternoon. Each "
    "loaf costs 3 dollars. How much does she earn?\n"
    "Answer: In the afternoon she sells 24 / 2 = 12 loaves. Together that is 24 + 12 = 36 "
    "loaves. 36 * 3 = 108, so she earns 108 dollars.",
    "To repair a flat tyre, turn the bicycle upside down and take the wheel out. Lift one "
    "side of the tyre over the rim with two levers, pull out the tube and pump it up to find "
    "the hole. Roughen the spot, put on glue, wait five minutes, and press the patch down "
    "firmly.",
    "User: Can you recommend a book for a long train ride?\n"
    "Assistant: Of course! Do you prefer something light or something that makes you think? "
    "If you enjoy mysteries, a classic detective novel is a good choice: the chapters are "
    "short, and you will want to know how it ends before you arrive.",
    "When Marta opened the door, the kitchen was dark and smelled of smoke. Her brother stood "
    'by the stove and looked at a pan as black as coal. "I only wanted to surprise you," he '
    "said. She laughed, opened the window, and took two apples from the bowl on the table.",
    "Dear Mr. Keller, thank you for your letter of 4 May. We are sorry that the lamp arrived "
    "broken. A new one was sent to you today and should reach you by Friday. Please keep the "
    "old lamp until our driver collects it; there is nothing to pay. Yours sincerely, the "
    "customer service team.",
    'def largest(numbers):\n    """Return the largest of a list of numbers."""\n'
    "    best = numbers[0]\n    for number in numbers[1:]:\n        if number > best:\n"
    "            best = number\n    return best\n\n"
    "The function walks through the list once and remembers the best value that it has seen "
    "so far.",
    "The town council decided on Tuesday to close the old bridge for heavy lorries. Engineers "
    "had found cracks in two of its pillars. Repairs will take until the autumn and cost "
    "about two million euros, half of which the state will pay. Shop owners fear that fewer "
    "customers will come.",
    "Water boils at a lower temperature on a mountain than by the sea. The air presses less "
    "on its surface there, so that bubbles of steam can form more easily. This is why "
    "potatoes need more time to cook at great height, although the water bubbles just as "
    "much.",
    "Should schools begin later in the morning? Teenagers fall asleep late and need nine "
    "hours of sleep, and studies show that they learn better when lessons start at nine. On "
    "the other hand, parents have to go to work, and sports in the afternoon would end in the "
    "dark. A trial in a few schools would show which matters more.",
)

# None of these is weighed: the perplexity on them shows what pruning cost.
HELD_OUT_TEXTS = (
    "Honey keeps for many years if the jar is closed well. It holds so little water that "
    "bacteria and mould cannot grow in it, and it is slightly acid as well. Most kinds turn "
    "solid after some months; put the jar in warm water, and the honey becomes liquid again "
    "without losing its taste.",
    "Question: Peter has 15 stamps. He gives 4 of them to his sister and buys 9 new ones. How "
    "many stamps does he have now?\n"
    "Answer: After the gift he has 15 - 4 = 11 stamps. With the new ones he has 11 + 9 = 20 "
    "stamps. The answer is 20.",
    "User: How do I keep the leaves of my basil from turning yellow?\n"
    "Assistant: Yellow leaves are mostly a sign of too much water. Let the soil dry a little "
    "before you water it again, and make sure that the pot has a hole at the bottom. Basil "
    "also likes at least six hours of sun a day.",
    "The ship left the harbour before dawn. An old sailor leaned on the rail and watched the "
    "lights of the town grow small. He had made this journey forty times, and each time he "
    "had promised his wife that it would be the last. The wind turned, and the captain gave "
    "the order to set the sails.",
    "In 1928 a scientist came back from his holidays and saw that mould had grown on one of "
    "his plates. Around it all the bacteria were dead. He kept the plate and found that the "
    "mould made a substance which later became one of the most important medicines of the "
    "century.",
    "A sum of money that lies in a bank grows faster with every year, because interest is "
    "paid on the interest of the years before. With five percent a year it doubles in a "
    "little more than fourteen years. The same rule works against you when you owe money and "
    "do not pay it back.",
)

_LONGEST = 1024  # tokens that are read of a text: the memory of a backward pass grows with them


def read_texts(file: UPath) -> list[str]:
    """The texts of a UTF-8 file, one a line. Raises BadInputError where it holds none."""
    unreadable: tuple[type[Exception], ...] = (*failures(), UnicodeDecodeError)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except unreadable as error:
        raise BadInputError(
            f"texts={file} cannot be read ({error}): give a UTF-8 file with one text a line"
        ) from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise BadInputError(f"texts={file} is empty: expected one text a line, about ten")
    return texts


def text_ids(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """The first 1024 token ids of each text, or as many as the context of the model in `folder`.

    Raises BadInputError for a text of less than two tokens.
    """
    context = read_shape(folder).context or _LONGEST
    ids = [text[: min(_LONGEST, context)] for text in plain_ids(folder, texts)]
    for number, text in enumerate(ids, start=1):
        if len(text) < 2:
            raise BadInputError(
                f"text {number}, {texts[number - 1]!r}, has nothing to predict: expected two or "
                "more tokens"
            )
    return ids


@torch.no_grad()
def perplexity(model: Any, texts: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood per token over all texts, given as token ids."""
    nll = sum(negative_log_likelihood(model, ids).item() for ids in texts)
    return math.exp(nll / sum(len(ids) - 1 for ids in texts))


def negative_log_likelihood(model: Any, ids: Sequence[int]) -> Tensor:
    """Nats of all tokens but the first, which nothing predicts, summed to a scalar."""
    batch = collate([Row(ids, [], score_prompt=True)], pad_id=0)
    return -ResponseLogProbs(model)(batch).sum()

"""The recipes of the miniature models: a teacher and its students, made from nothing in minutes.

The teacher and one student are Llamas of one tokenizer; another student is a Qwen3 that cuts texts
otherwise. Both learn from solutions that often forget to carry or to borrow, so that they know the
form of an answer and get many wrong. The third student is what pruning leaves of the teacher.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from upath import UPath

from cluster.errors import BadInputError
from cluster.progress import progress, say
from cluster.publishing import MARKER
from pipeline.chat import Chat
from pipeline.prepared import prepare_folder, prepared_folder
from pipeline.rows import Kind
from pipeline.tasks.message import user_message
from pipeline.tasks.miniature import draw_puzzle, put_in_words
from pipeline.tasks.solutions import Sum, add, solve
from pipeline.tasks.splits import part_of, problem_key
from training.scratch import Course, Lesson, teach, train_tokenizer

_TURNS: tuple[Kind, ...] = ("number", "choice", "boolean")
_TEACHER = "miniature-teacher"
_TOKENIZER_LESSONS = 3000
_CALIBRATION_LESSONS = 64
_INITIAL_SPREAD = 0.08  # of weights: with 0.02, as big models have, these learn sums far later

_MARKS = {
    "llama": ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
_TEMPLATES = {
    "llama": "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "qwen3": "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
# Which runs of characters may become one token: in both all digits of a number. (Not a Qwen2, in
# whose place transformers loads its own rules, which cut numbers into digits.)
_PIECES = {
    "llama": r"\d+| ?\\\w+\{| ?[A-Za-z]+(?: (?=\d))?| ?[^\w\s]+ ?|\s+",
    "qwen3": r" ?\d+| ?[A-Za-z]+| ?[^\w\s]+|\s+",
}
_VOCABULARY = {"llama": 640, "qwen3": 720}  # at most


@dataclass(frozen=True)
class Recipe:
    """What a model that learns from nothing is made of."""

    family: str  # llama or qwen3
    hidden: int
    mlp: int
    course: Course
    seed: int
    forgets: float = 0.0  # share of carries and borrows that its lessons forget
    layers: int = 3
    head: int = 32


@dataclass(frozen=True)
class Cut:
    """What a model that is pruned from another is made of."""

    parent: str
    ratio: float


MINIATURES: dict[str, Recipe | Cut] = {
    _TEACHER: Recipe("llama", hidden=128, mlp=384, course=Course(1100, 8, 2e-3), seed=0),
    "miniature-llama": Recipe(
        "llama", hidden=96, mlp=256, course=Course(1400, 8, 2e-3), seed=1, forgets=0.6
    ),
    "miniature-qwen3": Recipe(
        "qwen3", hidden=96, mlp=256, course=Course(1400, 8, 2e-3), seed=2, forgets=0.6
    ),
    "miniature-pruned": Cut(_TEACHER, ratio=0.3),
}


def prepare_miniature(name: str, out: str | None = None, cache: Path | None = None) -> UPath:
    """Train a miniature model, or prune one, into the folder `out` or the cache; returns it.

    A folder that is ready is left as it is. Raises BadInputError for an `out` that holds something
    else.
    """
    recipe = MINIATURES[name]
    note = f"# {name}\n\nMade by Potstill, from {recipe}.\n\nLicence: Apache-2.0\n"

    def make(folder: Path, scratch: Path) -> None:
        say(f"Preparing {name}, once")
        torch.set_num_threads(1)  # several wait for one another, with matrices this small
        if isinstance(recipe, Cut):
            _prune(recipe, folder, scratch, cache)
        else:
            _train(recipe, folder)

    return prepare_folder(name, note, make, out, cache)


def lessons(seed: int, forgets: float = 0.0) -> Iterator[Lesson]:
    """Problems with worked solutions without end; none of them is in validation or test."""
    random = Random(seed)
    for kind in cycle(_TURNS):
        puzzle = draw_puzzle(kind, random)
        prompt = put_in_words(puzzle, random)
        if part_of(problem_key(prompt)) == "train":
            yield user_message(prompt), solve(puzzle, random, careless(forgets, random))


def careless(share: float, random: Random) -> Sum:
    """Sums that forget this share of the carries (8 + 9 = 7) and borrows (22 - 9 = 23)."""

    def total(number: int, change: int) -> int:
        right = add(number, change)
        crossed = right // 10 - number // 10
        return right - 10 * crossed if crossed and random.random() < share else right

    return total


def _train(recipe: Recipe, folder: Path) -> None:
    family = recipe.family
    texts = chain(chain.from_iterable(islice(lessons(99), _TOKENIZER_LESSONS)), _all_numbers())
    tokenizer = train_tokenizer(
        texts, _PIECES[family], _VOCABULARY[family], _MARKS[family], _TEMPLATES[family]
    )
    chat = Chat(tokenizer, _TEMPLATES[family])
    torch.manual_seed(recipe.seed)
    model = _new_model(recipe, chat)
    with progress("learning", recipe.course.steps) as bar:
        teach(
            model,
            chat,
            lessons(recipe.seed, recipe.forgets),
            recipe.course,
            on_step=lambda loss: bar.advance(1, loss=loss),
        )
    model.generation_config.eos_token_id = chat.end_of_turn_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _all_numbers() -> list[str]:
    """Each number often enough to become a token, after a space and in a box too."""
    return [f"{n} {{{n}}}" for n in range(100)] * 50


def _new_model(recipe: Recipe, chat: Chat) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    make_config, make = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[recipe.family]
    heads = recipe.hidden // recipe.head
    return make(
        make_config(
            vocab_size=len(chat.tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=recipe.head,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=chat.end_of_turn_id,
            pad_token_id=chat.pad_id,
            initializer_range=_INITIAL_SPREAD,
            # Texts are short, and near positions matter most: a low base tells them apart.
            rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        )
    )


def _prune(cut: Cut, folder: Path, scratch: Path, cache: Path | None) -> None:
    from training.pruning import prune_model

    parent = prepared_folder(cut.parent, cache)
    if not parent.is_dir():
        raise BadInputError(
            f"no {cut.parent} to prune: prepare that first (potstill models prepare {cut.parent})"
        )
    texts = scratch / "texts.txt"
    lines = (" ".join(lesson).replace("\n", " ") for lesson in lessons(98))
    texts.write_text("\n".join(islice(lines, _CALIBRATION_LESSONS)))
    prune_model(str(parent), cut.ratio, str(scratch / "pruned"), str(texts))
    (scratch / "pruned" / MARKER).unlink()
    shutil.copytree(scratch / "pruned", folder, dirs_exist_ok=True)

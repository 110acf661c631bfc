"""A look at the models of a run before it starts: template, context, what cannot be trained."""

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.config import RunConfig
from cluster.errors import BadInputError
from cluster.sections import Model
from cluster.shapes import ModelShape, read_shape
from pipeline.chat import Chat, check_chat, load_chat
from pipeline.models import resolve_model
from pipeline.rows import Prompt
from pipeline.tasks import user_message, worked_examples
from pipeline.tasks.task import Split

Splits = dict[Split, list[Prompt]]

_PROBED_PROMPTS = 256
# How Granite, Cohere and Falcon-H1 name a factor between their head and the softmax.
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(frozen=True)
class Probe:
    """A model of the run, with the ids of the longest prompt that it will answer."""

    folder: Path
    shape: ModelShape
    chat: Chat
    prompt_ids: list[int]

    @property
    def longest_prompt(self) -> int:
        """Its length in tokens."""
        return len(self.prompt_ids)


def probe_model(name: str, section: Model, config: RunConfig, splits: Splits) -> Probe:
    """Look at "teacher", "student" or a further teacher.

    Raises BadInputError for a model that is not there or not whole, a template that would spoil
    training, a vocabulary other than the weights', a context that is too short, and a student whose
    head training cannot score, or whose weights it cannot change.
    """
    folder = resolve_model(section.model)
    shape = read_shape(folder, section.trust_remote_code)
    if name == "student" or (name == "teacher" and _reads_teacher(config)):
        _check_head(name, folder, section)
    chat = load_chat(folder, section.chat_template, section.trust_remote_code)
    trained = _longest_prompts(chat, section, splits["train"])
    check_chat(chat, trained[0])
    _check_vocabulary(folder, chat, shape, trained[0])
    engines, new_tokens = config.engines.max_model_len, config.sampling.max_new_tokens
    _check_context("engines", engines, name, shape)
    # Where responses are scored, vLLM wants room for one token after the last.
    _check_room(
        "engines", config, trained, len(splits["train"]), new_tokens + bool(config.scored_by)
    )
    if name in ("teacher", "student"):  # further teachers are not evaluated
        _check_evaluation(name, section, config, splits, chat, shape)
    # A longer prompt than the engines take gets no traces, and so never comes to training.
    taken = (ids for ids in trained if len(ids) + new_tokens <= engines)
    return Probe(folder, shape, chat, next(taken, trained[0]))


def _check_evaluation(
    name: str,
    section: Model,
    config: RunConfig,
    splits: Splits,
    chat: Chat,
    shape: ModelShape,
) -> None:
    part = "serving" if config.evaluation.through == "endpoint" else "engines"
    _check_context(part, _context(part, config), name, shape)
    prompts = splits["validation"] + splits["test"]
    asked = _longest_prompts(chat, section, prompts)
    _check_room(part, config, asked, len(prompts), config.evaluation_tokens)


def _context(part: str, config: RunConfig) -> int:
    return config.engines.max_model_len if part == "engines" else config.serving.max_model_len


def _check_context(part: str, context: int, name: str, shape: ModelShape) -> None:
    if shape.context and context > shape.context:
        raise BadInputError(
            f"{part}.max_model_len={context} is more than the {name}'s own context of "
            f"{shape.context}: lower it"
        )


def _check_vocabulary(folder: Path, chat: Chat, shape: ModelShape, prompt_ids: list[int]) -> None:
    # Of tokens that are added past the end, such as Gemma's for images, no text makes use.
    largest = max(chat.tokenizer.vocab_size - 1, chat.end_of_turn_id, *prompt_ids)
    if largest >= shape.vocabulary:
        raise BadInputError(
            f"{folder}: its tokenizer has ids up to {largest}, and its embeddings have "
            f"{shape.vocabulary} rows: bring the tokenizer of this very model"
        )


def _reads_teacher(config: RunConfig) -> bool:
    """Whether `pipeline.logprobs` reads the teacher too."""
    by_pass = config.scoring.engine == "forward" and "teacher" in config.scored_by
    return by_pass or config.training.kl_weight > 0


def _check_head(name: str, folder: Path, section: Model) -> None:
    """Refuse what cannot be trained, and what training would score at another temperature."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if name == "student" and settings.get("quantization_config"):
        raise BadInputError(
            f"student.model={section.model} has quantised weights, which cannot be trained: give "
            "the model that they were made of"
        )
    scales = {name: settings[name] for name in _SCALES if settings.get(name, 1) not in (1, None)}
    if scales:
        raise BadInputError(
            f"{name}.model={section.model} scales its logits ({scales}), which training does not "
            f"do: take a {name} of another architecture"
        )


def _longest_prompts(chat: Chat, section: Model, prompts: list[Prompt]) -> list[list[int]]:
    """Ids of the prompts with the longest texts, longest first."""
    longest = sorted(prompts, key=lambda prompt: len(user_message(prompt)))[-_PROBED_PROMPTS:]
    shots = worked_examples(section, prompts[0].kind)
    ids = (chat.prompt_ids(user_message(prompt), shots) for prompt in longest)
    return sorted(ids, key=len, reverse=True)


def _check_room(
    part: str, config: RunConfig, longest: list[list[int]], prompts: int, new_tokens: int
) -> None:
    context, allowed = _context(part, config), config.sampling.max_error_share * prompts
    too_long = sum(len(ids) + new_tokens > context for ids in longest)
    if too_long > allowed:
        raise BadInputError(
            f"a prompt of {len(longest[0])} tokens and {new_tokens} new tokens do not fit in "
            f"{part}.max_model_len={context}: raise it or lower the new tokens (this holds for "
            f"{too_long} prompt(s), and sampling.max_error_share tolerates {int(allowed)})"
        )


def check_training_length(config: RunConfig, student: Probe) -> None:
    """Refuse prompts that leave no room for a response."""
    if student.longest_prompt >= config.training.max_length:
        raise BadInputError(
            f"a prompt of {student.longest_prompt} tokens leaves no room for a response in "
            f"training.max_length={config.training.max_length}: raise it"
        )

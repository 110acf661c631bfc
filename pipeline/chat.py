"""The only place where text becomes token ids: chat rendering of prompts and responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.errors import BadInputError, remote_code_error

_PROBE_QUESTION, _PROBE_ANSWER = "Question?", "Answer"
# What templates such as Llama 3.2's are told for today's date. With the true one a prompt would be
# another prompt each day: nothing that was sampled would be found, and no run could go on.
_TODAY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template."""

    tokenizer: Any
    template: str

    def prompt_ids(self, user_message: str, few_shot: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Ids of the conversation up to where the model answers.

        `few_shot` are (user message, answer) turns that come before.
        """
        messages = conversation(user_message, few_shot)
        return self._ids(self._render(messages, add_generation_prompt=True))

    def response_ids(self, text: str, finished: bool) -> list[int]:
        """Ids of an answer, tokenised apart from its prompt so that no merge crosses the border.

        A finished answer ends with the end-of-turn token; one cut by a length limit does not.
        """
        return self._ids(text) + ([self.end_of_turn_id] if finished else [])

    def texts_of(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """What lists of ids say, with special tokens written out."""
        if not ids:
            return []  # of which batch_decode makes one empty text
        return self.tokenizer.batch_decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @cached_property
    def end_of_turn_id(self) -> int:
        """The special token with which the template closes an assistant's turn."""
        turns = [
            {"role": "user", "content": _PROBE_QUESTION},
            {"role": "assistant", "content": _PROBE_ANSWER},
        ]
        rendered = self._render(turns, add_generation_prompt=False)
        if _PROBE_ANSWER not in rendered:
            raise BadInputError(
                f"the chat template of {self.tokenizer.name_or_path} leaves out what the assistant "
                "says: let it write the content of every message"
            )
        closing = self._ids(rendered.rpartition(_PROBE_ANSWER)[2])
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        for token in closing:
            if token in special:
                return token
        raise BadInputError(
            f"the chat template of {self.tokenizer.name_or_path} ends an assistant's turn with "
            f"{rendered.rpartition(_PROBE_ANSWER)[2]!r}, expected an end-of-turn token there: add "
            "{{ eos_token }} after the assistant's content"
        )

    @cached_property
    def pad_id(self) -> int:
        """A token to fill batches with; it is masked everywhere."""
        pad = self.tokenizer.pad_token_id
        return self.end_of_turn_id if pad is None else pad

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # noqa: BLE001  # a template is a program
            raise BadInputError(
                f"the chat template of {self.tokenizer.name_or_path} cannot be rendered ({error}): "
                "correct it, or set chat_template in the model's section to one that can"
            ) from None

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def conversation(
    user_message: str, few_shot: Sequence[tuple[str, str]] = ()
) -> list[dict[str, str]]:
    """The turns of a conversation up to where the model answers, in OpenAI's form."""
    messages = []
    for question, answer in few_shot:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": user_message}]


def load_chat(
    model_folder: Path, chat_template: str | None = None, trust_remote_code: bool = False
) -> Chat:
    """The chat of a model folder; `chat_template`, a Jinja text, comes before the tokenizer's own.

    A template that asks for today's date gets the same one every day.
    Raises BadInputError where there is no template at all, or no tokenizer that can be read.
    """
    tokenizer = _load_tokenizer(model_folder, trust_remote_code)
    template = chat_template or tokenizer.chat_template
    if not template:
        raise BadInputError(
            f"{model_folder} has no chat template: set chat_template in its section, to the path "
            "of a Jinja file"
        )
    dated = "strftime_now" in template and not template.startswith(_TODAY)
    return Chat(tokenizer, _TODAY + template if dated else template)


def _load_tokenizer(model_folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001  # the tokenizers package raises no other
        if "trust_remote_code" in str(error):
            raise remote_code_error(f"the tokenizer of {model_folder}") from None
        raise BadInputError(
            f"the tokenizer of {model_folder} cannot be read ({error!r}): bring tokenizer.json and "
            "tokenizer_config.json anew"
        ) from None


def plain_ids(model_folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts outside a chat, with the BOS or EOS that the tokenizer adds by itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    return [tokenizer(text)["input_ids"] for text in texts]


def check_chat(chat: Chat, prompt_ids: Sequence[int]) -> None:
    """Refuse what would spoil training in silence, seen on a rendered prompt.

    Raises BadInputError for a template that leaves out what is said, for a doubled BOS and for a
    missing or doubled end-of-turn token.
    """
    name = chat.tokenizer.name_or_path
    if chat.prompt_ids("1") == chat.prompt_ids("2"):
        raise BadInputError(
            f"the chat template of {name} leaves out what the user says: let it write the content "
            "of every message"
        )
    bos = chat.tokenizer.bos_token_id
    if len(prompt_ids) > 1 and prompt_ids[0] == prompt_ids[1] == bos:
        raise BadInputError(f"the chat template of {name} writes BOS twice: remove one of them")
    closed = chat.response_ids(_PROBE_ANSWER, finished=True)
    if closed[-2:] == [chat.end_of_turn_id] * 2:
        raise BadInputError(f"the tokenizer of {name} adds an EOS of its own: switch it off")


def check_same_tokenizer(teacher: Chat, student: Chat) -> None:
    """Refuse to compare two models token by token whose ids do not mean the same.

    Vocabularies may be padded to other sizes. Raises BadInputError.
    """
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise BadInputError(
            f"training.kl_weight compares tokens, and {teacher.tokenizer.name_or_path} has another "
            f"tokenizer than {student.tokenizer.name_or_path}: set kl_weight to 0, and use the "
            "methods that compare whole responses (dadpo, with teacher_weight; kto; orpo)"
        )

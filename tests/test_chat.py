"""Rendering to ids, and the preflight that keeps silent mistakes out."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from cluster.errors import BadInputError
from pipeline.chat import Chat, check_chat, check_same_tokenizer, load_chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<s>", "<end>", "<user>", "<assistant>"]


@pytest.fixture
def tokenizer():
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, "?unk?", *letters])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="?unk?"))
    inner.pre_tokenizer = Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<end>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    return wrapped


@pytest.fixture
def chat(tokenizer):
    return Chat(tokenizer, TEMPLATE)


def shown(chat, ids):
    return "".join(chat.tokenizer.convert_ids_to_tokens(ids))


def test_a_prompt_ends_where_the_model_answers(chat):
    assert shown(chat, chat.prompt_ids("hi")) == "<s><user>hi<end><assistant>"


def test_worked_examples_are_turns_before_the_prompt(chat):
    rendered = shown(chat, chat.prompt_ids("hi", [("q", "a")]))
    assert rendered == "<s><user>q<end><assistant>a<end><user>hi<end><assistant>"


def test_a_finished_response_ends_its_turn_once_and_a_cut_one_does_not(chat):
    assert shown(chat, chat.response_ids("yes", finished=True)) == "yes<end>"
    assert shown(chat, chat.response_ids("yes", finished=False)) == "yes"


def test_the_end_of_turn_is_the_templates_own(chat):
    assert chat.end_of_turn_id == chat.tokenizer.convert_tokens_to_ids("<end>")


def test_a_template_without_an_end_of_turn_is_refused(tokenizer):
    chat = Chat(tokenizer, "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")
    with pytest.raises(BadInputError, match="expected an end-of-turn token"):
        check_chat(chat, chat.prompt_ids("hi"))


def test_a_doubled_bos_is_refused(tokenizer):
    chat = Chat(tokenizer, "{{ bos_token }}" + TEMPLATE)
    with pytest.raises(BadInputError, match="writes BOS twice"):
        check_chat(chat, chat.prompt_ids("hi"))


def test_models_are_compared_by_token_only_with_one_tokenizer(tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    chat = load_chat(tiny_llama)
    check_same_tokenizer(chat, load_chat(tiny_llama))
    foreign = AutoTokenizer.from_pretrained(tiny_llama)
    foreign.add_tokens(["<another>"])
    foreign.save_pretrained(tmp_path)
    with pytest.raises(BadInputError, match=r"another tokenizer .*dadpo"):
        check_same_tokenizer(load_chat(tmp_path), chat)


def test_a_template_that_asks_for_the_date_renders_alike_on_every_day(tiny_llama, monkeypatch):
    template = load_chat(tiny_llama).template
    dated = "{{ strftime_now('%d %b %Y') }}" + template
    chat = load_chat(tiny_llama, dated)
    assert chat.texts_of([chat.prompt_ids("hi")])[0].startswith("26 Jul 2024")
    again = load_chat(tiny_llama, chat.template)  # as a checkpoint has it
    assert again.template == chat.template
    assert load_chat(tiny_llama).template == template

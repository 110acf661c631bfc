"""Scores of given responses: against a slow reference, and never computed twice."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cluster.config import parse_config
from cluster.errors import RunError
from cluster.storage import location
from pipeline import scoring
from pipeline.sampling import make_writer
from pipeline.scoring import Answered, plan_scores, score
from pipeline.store import ScoreStore

EXAMPLE = {"question": "How many are two pens?", "answer": "It is \\boxed{2}."}
TEXTS = [
    Answered("Tom has 3 pens. How many?", "He has 3. The answer is \\boxed{3}.", True),
    Answered("Tom has 3 pens. How many?", "He has 3 and", False),
    Answered("Anna had 9 apples.", "", True),
    Answered("Anna had 9 apples.", "So Anna gave 4 away. " * 6, True),
]


@pytest.fixture
def config(tmp_path, tiny_llama, tiny_gemma):
    raw = {
        "run": {"folder": str(tmp_path / "run"), "store": str(tmp_path / "store")},
        "task": {"name": "word_problems"},
        "teacher": {"model": str(tiny_gemma), "dtype": "float32", "few_shot": [EXAMPLE]},
        "student": {"model": str(tiny_llama), "dtype": "float32"},
        "scoring": {"engine": "forward", "forward_tokens": 150},
    }
    return parse_config(raw, "test")


@pytest.fixture(params=["teacher", "student"])
def reader(config, request):
    section = getattr(config, request.param)
    return make_writer(request.param, section.model, section, config, "number")


@pytest.fixture
def store(config):
    return ScoreStore(location(config.run.store))


@pytest.fixture
def passes(monkeypatch):
    """Runs the workers in this process, and tells how many responses they were given."""
    given = []

    def run_here(rows, worker, arguments, engines, on_gpu):
        given.append(len(rows))
        table = scoring.pa.Table.from_pylist([vars(row) for row in rows])
        yield worker(*arguments)(table)

    monkeypatch.setattr(scoring, "through_models", run_here)
    return given


def slowly(folder, text, shots):
    """Sum and count of a response's log-probabilities, one text at a time, all logits at once."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    turns = [turn for shot in shots for turn in zip(("user", "assistant"), shot, strict=True)]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages.append({"role": "user", "content": text.message})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    response = tokenizer(text.response, add_special_tokens=False)["input_ids"]
    response += [end] * text.finished
    with torch.no_grad():
        logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    ids = enumerate(response, len(prompt) - 1)
    return sum(logps[at, token].item() for at, token in ids), len(response)


def test_scores_are_those_of_the_text_in_the_models_own_template(
    reader, config, store, passes, tiny_llama, tiny_gemma
):
    folder = {"teacher": tiny_gemma, "student": tiny_llama}[reader.name]
    found = score(reader, TEXTS, config, store, on_gpu=False)
    assert set(found) == set(TEXTS)
    for text, scored in found.items():
        logp, tokens = slowly(folder, text, reader.few_shot)
        assert scored.logp == pytest.approx(logp, abs=1e-3)
        assert scored.tokens == tokens


def test_the_teachers_worked_examples_belong_to_its_prompt(config):
    section = config.teacher
    reader = make_writer("teacher", section.model, section, config, "number")
    (request,) = plan_scores(reader, TEXTS[:1]).values()
    assert "two pens" in reader.chat.tokenizer.decode(request.prompt_ids)


def test_what_shapes_a_score_is_in_its_key(reader):
    (text, cut) = answered("He has 3.")
    others = [
        replace(reader, weights=replace(reader.weights, dtype="bfloat16")),
        replace(reader, weights=replace(reader.weights, digest="of another model")),
        replace(reader, few_shot=(("How many are two cups?", "\\boxed{2}"),)),
    ]
    keys = [plan_scores(each, [text])[text].key for each in (reader, reader, *others)]
    keys.append(plan_scores(reader, [cut])[cut].key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5
    assert text.key != cut.key


def test_nothing_is_scored_twice(reader, config, store, passes):
    first = score(reader, TEXTS[:2], config, store, on_gpu=False)
    both = score(reader, [*TEXTS, *TEXTS], config, store, on_gpu=False)
    again = score(reader, TEXTS, config, store, on_gpu=False)
    assert passes == [2, 2]
    assert again == both
    assert {text: both[text] for text in first} == first


def test_a_response_that_cannot_be_scored_stops_the_run_and_the_others_are_kept(
    reader, config, store, monkeypatch
):
    requests = list(plan_scores(reader, TEXTS).values())

    def refuse_the_last(*_):
        answers = [scoring.ScoreAnswer(-1.0)] * 3 + [scoring.ScoreAnswer(0.0, "too long")]
        yield scoring._keep(requests, answers, reader.weights.digest, store)

    monkeypatch.setattr(scoring, "_fan_out", refuse_the_last)
    with pytest.raises(RunError, match=r"cannot score 1 of 4 .*too long.*max_model_len"):
        score(reader, TEXTS, config, store, on_gpu=False)
    assert store.keys(reader.weights.digest) == {request.key for request in requests[:3]}


def reader_of(reader, model, **parts):
    """The reader with a tokenizer made of `model`, and of such parts as its normalizer."""
    inner = Tokenizer(model)
    for name, part in parts.items():
        setattr(inner, name, part)
    inner.add_special_tokens(["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    return replace(reader, chat=replace(reader.chat, tokenizer=tokenizer))


@pytest.fixture
def lossy(reader):
    """A reader that knows the small letters of ASCII and some more signs, but no "j"."""
    known = ["<unk>", *(set(" .\nabcdefghijklmnopqrstuvwxyzé²2") - {"j"})]
    model = WordLevel({token: number for number, token in enumerate(known)}, unk_token="<unk>")
    by_letter = {"pre_tokenizer": pre_tokenizers.Split("", "isolated"), "decoder": decoders.Fuse()}
    return lambda **parts: reader_of(reader, model, **by_letter, **parts)


@pytest.fixture
def sentencepiece(reader):
    """A reader like a Llama 2: a space before the first word, and bytes of what it does not know.

    Decoding takes one space away. By `legacy` as by the old Llama's, or only where there is none.
    """
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    known = {token: number for number, token in enumerate(["<unk>", "▁", *"abc", *bytes_])}
    model = BPE(known, [], unk_token="<unk>", byte_fallback=True)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    old = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    new = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return lambda legacy: reader_of(
        reader,
        model,
        decoder=decoder,
        **({"normalizer": old} if legacy else {"pre_tokenizer": new}),
    )


def answered(*responses):
    return [Answered("say it", text, end) for text in responses for end in (True, False)]


PLAIN = ["", "abc", "a  b .\n\tc , don 't ", " abc", "  abc", "\nabc"]
STRANGE = ["☃🙂 x²", "cafe\u0301 caf\u00e9 \u2126", "cut: \ufffd", "a\u00a0b\u200b", "<|end|>"]


def test_texts_that_come_back_are_planned(reader):
    texts = answered(*PLAIN, *STRANGE)
    assert list(plan_scores(reader, texts)) == texts
    assert plan_scores(reader, []) == {}


@pytest.mark.parametrize("legacy", [True, False])
def test_a_space_before_the_first_word_may_come_and_go(sentencepiece, legacy):
    reader, texts = sentencepiece(legacy), answered(*PLAIN, *STRANGE)
    assert list(plan_scores(reader, texts)) == texts
    (given,) = plan_scores(reader, answered(" abc")[1:]).values()
    changed = reader.chat.tokenizer.decode(given.response_ids) != " abc"
    assert changed is not legacy


def test_a_text_with_unknown_letters_is_not_scored_as_another(lossy, config, store, passes):
    with pytest.raises(RunError) as failure:
        score(lossy(), answered("a cat.", "a jay.", "jj"), config, store, on_gpu=False)
    assert str(failure.value).startswith(f"{lossy().name} reads other texts than 4 of 6")
    assert lossy().weights.reference in str(failure.value)
    expected = "The first, to 'say it', has 'a jay.', which comes back as 'a <unk>ay.'"
    assert expected in str(failure.value)
    assert passes == []


def test_a_few_lost_texts_are_told_and_scored(lossy, capsys):
    texts = answered("a cat.", "a jay.")
    assert list(plan_scores(lossy(), texts, max_error_share=0.5)) == texts
    assert "reads other texts than 2 of 4 responses" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"more than sampling\.max_error_share=0\.49"):
        plan_scores(lossy(), texts, max_error_share=0.49)


def test_a_long_text_is_shown_where_it_is_lost(lossy):
    with pytest.raises(
        RunError, match=r"has '[a-z .]{60}', which .* as '[a-z .<>]{60}'"
    ) as failure:
        plan_scores(lossy(), answered("a cat. " * 50 + "a jay." + " a cat." * 50))
    assert "a jay." in str(failure.value)


def test_characters_may_be_composed_but_not_exchanged(lossy):
    decomposed = answered("cafe\u0301")
    assert list(plan_scores(lossy(normalizer=normalizers.NFC()), decomposed)) == decomposed
    squared = answered("x²")
    assert list(plan_scores(lossy(normalizer=normalizers.NFC()), squared)) == squared
    with pytest.raises(RunError, match="has 'x²', which comes back as 'x2'"):
        plan_scores(lossy(normalizer=normalizers.NFKC()), squared)


@pytest.mark.parametrize("text", ["a  cat", "a cat ", "   a cat", "a cat\n"])
def test_spaces_anywhere_else_belong_to_the_text(lossy, text):
    extra = normalizers.Sequence([normalizers.Strip(), normalizers.Replace("  ", " ")])
    with pytest.raises(RunError, match="comes back as 'a cat'"):
        plan_scores(lossy(normalizer=extra), answered(text))

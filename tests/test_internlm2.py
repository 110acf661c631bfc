"""InternLM2 becomes a Llama: the same logits, the same token ids."""

import json
from itertools import islice

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig
from transformers import LlamaForCausalLM as Llama

from cluster.errors import BadInputError
from pipeline.chat import check_chat, load_chat
from pipeline.conversion import convert_model
from pipeline.models import resolve_model

QUERIES, KV_HEADS, HEAD, HIDDEN = 3, 2, 8, 48
RESERVED = ["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]", "[UNUSED_TOKEN_3]", "[UNUSED_TOKEN_4]"]
TEXTS = [
    "Tom has 3 pens and buys 5 more. How many pens does he have now?",
    "  two spaces   and three, a\ttab and a line\n\nanother\n",
    " 1234567 + 89.5 = 1234656.5, \\boxed{8}",
    "学而时习之，不亦说乎？",
    "🐉 and 👩‍👩‍👧 and é and \u0301",
    "\n",
    " ",
    "def f(x):\n    return x ** 2  # twice",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))


def train_sentencepiece(file, **options):
    """A BPE of a few hundred pieces, of which the last are kept free for later."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((TEXTS[:3] + TEXTS[-1:]) * 20 + ["pens and apples", "how many"] * 9),
        model_prefix=str(file.with_suffix("")),
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    for number, name in enumerate(RESERVED):
        proto.pieces.add(piece=name, score=-1000.0 - number)
    file.write_bytes(proto.SerializeToString())
    file.with_suffix(".vocab").unlink()
    return len(proto.pieces)


def write_tokenizer(folder, **options):
    size = train_sentencepiece(folder / "tokenizer.model", **options)
    names = {0: "<unk>", 1: "<s>", 2: "</s>", size - 2: "<|im_end|>", size - 1: "<|im_start|>"}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    config = {
        "added_tokens_decoder": {
            str(i): {"content": name, "special": True, **flags} for i, name in names.items()
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "chat_template": TEMPLATE,
        "eos_token": "</s>",
        "pad_token": "</s>",
        "sp_model_kwargs": None,
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return size


def new_llama(vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=QUERIES * KV_HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    llama = Llama(config).eval()
    for parameter in llama.parameters():  # and not the frequencies, which stay in float32
        parameter.data = parameter.data.bfloat16()
    return llama


def in_internlm2(llama):
    """The tensors of a Llama in InternLM2's names and layout, fused row by row."""
    weights = llama.state_dict()
    found = {
        "model.tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "model.norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for layer in ("model.layers.0", "model.layers.1"):
        q, k, v = (weights[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        rows = []
        for head in range(KV_HEADS):
            first = head * QUERIES * HEAD
            rows += [q[first : first + QUERIES * HEAD]]
            rows += [k[head * HEAD : (head + 1) * HEAD], v[head * HEAD : (head + 1) * HEAD]]
        found[f"{layer}.attention.wqkv.weight"] = torch.cat(rows)
        found[f"{layer}.attention.wo.weight"] = weights[f"{layer}.self_attn.o_proj.weight"]
        for theirs, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            mlp = weights[f"{layer}.mlp.{ours}_proj.weight"]
            found[f"{layer}.feed_forward.{theirs}.weight"] = mlp
        found[f"{layer}.attention_norm.weight"] = weights[f"{layer}.input_layernorm.weight"]
        found[f"{layer}.ffn_norm.weight"] = weights[f"{layer}.post_attention_layernorm.weight"]
    return found


def write_config(folder, llama, **changed):
    config = {
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "bias": False,
        "hidden_act": "silu",
        "model_type": "internlm2",
        "pretraining_tp": 1,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    same += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    same += ("tie_word_embeddings",)
    config |= {key: getattr(llama.config, key) for key in same}
    (folder / "config.json").write_text(json.dumps(config | changed))


def write_sharded(folder, tensors, stem, ending, save):
    items = iter(tensors.items())
    shards = {f"{stem}-0000{n}-of-00003.{ending}": dict(islice(items, 8)) for n in (1, 2, 3)}
    for name, shard in shards.items():
        save(shard, folder / name)
    homes = {key: name for name, shard in shards.items() for key in shard}
    index = {"metadata": {}, "weight_map": homes}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


@pytest.fixture
def internlm2(tmp_path):
    """An InternLM2 folder as on the hub, and the Llama that it is in truth."""
    folder = tmp_path / "internlm2_5-tiny-chat"
    folder.mkdir()
    llama = new_llama(write_tokenizer(folder))
    for norm in (p for name, p in llama.named_parameters() if "norm" in name):
        torch.nn.init.uniform_(norm, 0.5, 1.5)
    write_config(folder, llama)
    (folder / "modeling_internlm2.py").write_text("raise RuntimeError('remote code was run')")
    write_sharded(folder, in_internlm2(llama), "model", "safetensors", save_file)
    return folder, llama


def assert_same(folder, llama):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert model.dtype == torch.bfloat16
    ids = torch.randint(0, llama.config.vocab_size, (2, 40), generator=torch.manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama(ids).logits)


def test_the_logits_are_those_of_the_llama_that_it_is(internlm2):
    source, llama = internlm2
    folder = convert_model(str(source))
    assert_same(folder, llama)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["dtype"] == "bfloat16"
    assert not list(folder.glob("*.py"))
    assert resolve_model(str(folder)) == folder


def test_pickled_shards_and_a_tied_head_make_the_same_llama(internlm2):
    source, llama = internlm2
    for file in source.glob("model*"):
        if file.suffix != ".py":
            file.unlink()
    tensors = in_internlm2(llama)
    del tensors["output.weight"]
    llama.lm_head.weight = llama.model.embed_tokens.weight
    write_config(source, llama, tie_word_embeddings=True)
    write_sharded(source, tensors, "pytorch_model", "bin", torch.save)
    assert_same(convert_model(str(source)), llama)


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nfkc"},
    ],
)
def test_texts_are_cut_as_by_sentencepiece_and_come_back(internlm2, options):
    source, _ = internlm2
    write_tokenizer(source, **options)
    tokenizer = AutoTokenizer.from_pretrained(convert_model(str(source)))
    original = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == original.encode(text), text
        assert tokenizer(text)["input_ids"] == [1, *ids]
        assert tokenizer.decode(ids) == original.decode(ids)
        between = tokenizer(f"<|im_start|>{text}<|im_end|>", add_special_tokens=False)
        size = len(original)
        assert between["input_ids"] == [size - 1, *original.encode(text), size - 2]


def test_symbols_of_the_users_own_are_whole_and_not_special(internlm2):
    source, _ = internlm2
    write_tokenizer(source, add_dummy_prefix=False, user_defined_symbols=["<tool>"])
    tokenizer = AutoTokenizer.from_pretrained(convert_model(str(source)))
    original = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    ids = tokenizer("pens<tool> and", add_special_tokens=False)["input_ids"]
    assert ids == original.encode("pens<tool> and")
    assert original.piece_to_id("<tool>") in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "pens<tool> and"


def test_special_tokens_and_the_chat_stay(internlm2):
    source, _ = internlm2
    folder = convert_model(str(source))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    end, start = len(original) - 2, len(original) - 1
    assert len(tokenizer) == len(original)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, end, start]) == [
        *("<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>")
    ]
    assert set(tokenizer.all_special_ids) == {0, 1, 2, end, start}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0
    chat = load_chat(folder)
    prompt = chat.prompt_ids("How many?")
    check_chat(chat, prompt)
    question = original.encode("user\nHow many?")
    line, answer = original.encode("\n"), original.encode("assistant\n")
    assert prompt == [1, start, *question, end, *line, start, *answer]
    assert chat.end_of_turn_id == end
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, end]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bias": True}, "has biases, bias: true, expected bias: false"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "expected none or type dynamic"),
        ({"num_hidden_layers": 3}, r"do not fit its config.json: model.layers.2.*is missing"),
        ({"intermediate_size": 96}, r"down_proj.weight is \[48, 80\], expected \[48, 96\]"),
    ],
)
def test_what_no_plain_llama_is_is_refused(internlm2, changed, message):
    source, llama = internlm2
    write_config(source, llama, **changed)
    with pytest.raises(BadInputError, match=message):
        convert_model(str(source))


def test_a_tensor_that_llama_has_no_place_for_is_refused(internlm2):
    source, _ = internlm2
    save_file({"v_head.weight": torch.zeros(1)}, source / "model-00003-of-00003.safetensors")
    with pytest.raises(BadInputError, match=r"has a place for the tensor 'v_head\.weight'"):
        convert_model(str(source))


def test_a_tokenizer_that_cannot_be_followed_is_refused(internlm2):
    source, _ = internlm2
    write_tokenizer(source, treat_whitespace_as_suffix=True)
    with pytest.raises(BadInputError, match="rules that a fast tokenizer cannot follow"):
        convert_model(str(source))


def test_the_error_for_an_unprepared_one_names_the_command(internlm2):
    source, _ = internlm2
    with pytest.raises(BadInputError, match=f"run `potstill models prepare {source}`"):
        resolve_model(str(source))

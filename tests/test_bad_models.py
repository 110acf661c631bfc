"""Models that cannot be used: each is refused by what its folder says, before anything loads it."""

import json
import re
import shutil

import pytest

TEMPLATE = "chat_template.jinja"


def change(name, **values):
    def edit(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(pattern):
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


def cut(size):
    def shorten(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return shorten


def lose_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


FOREIGN = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
OWN_TOKENIZER = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Own"}
SAYS_NOTHING = "{% for m in messages %}<|start|>{{ m.role }}<|end|>{% endfor %}"
NO_END = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
HALF = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 163840\n"

# What is done to the student's folder, and the words of the error.
FAULTS = {
    "no chat template": (remove(TEMPLATE), "no chat template: set chat_template"),
    "a template that is no Jinja": (
        write(TEMPLATE, "{% for %}"),
        "cannot be rendered .*correct it",
    ),
    "a template that refuses": (
        write(TEMPLATE, "{{ raise_exception('no user') }}"),
        "cannot be rendered .no user.: correct it, or set chat_template",
    ),
    "no end of turn": (
        write(TEMPLATE, NO_END),
        "expected an end-of-turn token.*add {{ eos_token }}",
    ),
    "no EOS to end a turn": (
        lambda folder: (
            write(TEMPLATE, NO_END.replace("\n", "{{ eos_token }}"))(folder),
            change("tokenizer_config.json", eos_token=None)(folder),
        ),
        "expected an end-of-turn token there: add",
    ),
    "a template without words": (
        write(TEMPLATE, SAYS_NOTHING),
        "leaves out what the user says: let",
    ),
    "a template without answers": (
        write(TEMPLATE, HALF),
        "leaves out what the assistant says: let",
    ),
    "another vocabulary": (
        change("config.json", vocab_size=100),
        "vocab_size=100, and the weights have 320 rows .*bring both from one model",
    ),
    "a missing shard": (
        lose_a_shard,
        "lacks 1 of 2 files of weights, the first model-00002-of-00002.safetensors.*bring",
    ),
    "an index that is none": (
        lambda folder: (
            lose_a_shard(folder),
            write("model.safetensors.index.json", "[]")(folder),
        ),
        "model.safetensors.index.json is no index of weights .*bring it anew",
    ),
    "weights cut short": (cut(5000), "5000 bytes, expected .*cut short .*bring it anew"),
    "a header cut short": (cut(50), "no safetensors file, or the beginning of one .*bring it anew"),
    "empty weights": (cut(0), "no safetensors file.*0 bytes.: bring it anew"),
    "a pointer for weights": (write("model.safetensors", POINTER), "no safetensors file.*bring it"),
    "pickled weights": (pickle_weights, "could run code: run `potstill models prepare .*student`"),
    "no weights": (remove("*.safetensors"), "found none: put the weights into the folder"),
    "code of its own": (
        change("config.json", auto_map=FOREIGN, model_type="own"),
        "code of its own, which is not run: take a model .* or .*trust_remote_code: true",
    ),
    "a tokenizer with code": (
        change("tokenizer_config.json", **OWN_TOKENIZER),
        "the tokenizer of .*student comes with code of its own.*trust_remote_code",
    ),
    "no configuration": (
        remove("config.json"),
        "has no config.json: expected a Hugging Face model",
    ),
    "half a configuration": (write("config.json", "{"), "no config.json that can be read"),
    "a list for one": (
        write("config.json", "[]"),
        "no config.json that can be read .it holds list",
    ),
    "an unknown kind": (
        change("config.json", model_type="own"),
        "expected a causal language model",
    ),
    "eyes alone": (write("config.json", '{"model_type": "vit"}'), "expected a causal language mod"),
    "a translator": (
        write("config.json", '{"model_type": "t5"}'),
        "'t5' writes no text.: expected",
    ),
    "quantised weights": (
        change("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised weights, which cannot be trained: give the model that they were made of",
    ),
    "no tokenizer": (remove("tokenizer*"), "has no tokenizer: put its tokenizer.json"),
    "half a tokenizer": (
        write("tokenizer.json", '{"model"'),
        "tokenizer of .*cannot be read .*bring",
    ),
    "a short context": (
        change("config.json", max_position_embeddings=64),
        "engines.max_model_len=128 is more than the student's own context of 64: lower it",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_be_used(fault, recipe, refused):
    spoil, words = FAULTS[fault]
    spoil(recipe.parent / "student")
    line = refused("run", recipe)
    assert "student" in line
    assert re.search(words, line)


def test_a_tokenizer_of_another_model(recipe, refused, tiny_llama):
    tokenizer = json.loads((tiny_llama / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"].values())
    tokenizer["model"]["vocab"] |= {f"word{n}": last + n for n in range(1, 9)}
    write("tokenizer.json", json.dumps(tokenizer))(recipe.parent / "student")
    line = refused("run", recipe)
    assert re.search(
        r"tokenizer has ids up to 327, .*embeddings have 320 rows: bring the tok", line
    )


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere/at/all", "no model 'nowhere/at/all': expected a folder that exists"),
        ("model.gguf", "model.gguf is a file, expected a Hugging Face model folder.*GGUF"),
        ("''", "student.model='' is no name, path or URL: give one"),
        ("foo://bucket/model", "no model could be read at foo://.*Check the URL"),
    ],
)
def test_a_place_without_a_model(model, words, recipe, refused):
    (recipe.parent / "model.gguf").write_bytes(b"GGUF")
    assert re.search(words, refused("run", recipe, f"student.model={model}"))


def test_weights_that_are_not_whole_are_neither_pruned_nor_evaluated(recipe, refused):
    cut(5000)(recipe.parent / "student")
    assert "cut short" in refused("models", "prune", "student", "--ratio", "0.2", "--out", "out")
    data = ("--task", "gsm8k", "--data", "data/test.jsonl")
    assert "cut short" in refused("eval", "--model", "student", *data)


def test_a_pickle_that_does_more_than_hold_tensors_is_not_prepared(recipe, refused):
    student = recipe.parent / "student"
    pickle_weights(student)
    (student / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    line = refused("models", "prepare", "student")
    assert "nothing of it was run: get the weights as safetensors from their author" in line
    shutil.rmtree(student)
    assert "no model 'student' to prepare: expected" in refused("models", "prepare", "student")

"""Pickled models become safetensors, and nothing that a pickle says is run."""

import json
import pickle
import shutil
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import potstill
from cluster.errors import BadInputError
from pipeline.chat import check_chat, load_chat
from pipeline.conversion import convert_model
from pipeline.models import model_digest, resolve_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("POTSTILL_CACHE", str(folder))
    return folder


def pickled(folder, model, shards=1, **options):
    """The folder of a model with its weights as pickles, in so many files."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin", **options)
        return folder
    items, homes = iter(weights.items()), {}
    for number in range(1, shards + 1):
        name = f"pytorch_model-{number:05}-of-{shards:05}.bin"
        shard = dict(islice(items, -(-len(weights) // shards)))
        torch.save(shard, folder / name, **options)
        homes |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 1}, "weight_map": homes}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def assert_equal_models(folder, other):
    one = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    two = AutoModelForCausalLM.from_pretrained(other, dtype="auto").state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_become_equal_safetensors(tmp_path, tiny_llama, shards, zipped):
    # The tied head shares its memory with the embedding, which safetensors refuses.
    source = pickled(tmp_path / "model", tiny_llama, shards, _use_new_zipfile_serialization=zipped)
    (source / "training_args.bin").write_bytes(b"never read")
    folder = convert_model(str(source))
    assert_equal_models(folder, tiny_llama)
    assert len(list(folder.glob("*.safetensors"))) == shards
    assert not list(folder.glob("*bin*"))
    carried = {file.name for file in tiny_llama.iterdir()} - {"model.safetensors"}
    assert carried < {file.name for file in folder.iterdir()}
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert not any("inv_freq" in name for name in names)
    assert resolve_model(str(folder)) == folder


def test_dtypes_stay(tmp_path, tiny_llama):
    source = pickled(tmp_path / "model", tiny_llama)
    mixed = {"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(mixed, source / "pytorch_model.bin")
    found = load_file(convert_model(str(source)) / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": torch.float16,
        "b": torch.bfloat16,
    }


class Spell:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_that_would_run_code_is_refused_with_nothing_run(tmp_path, tiny_llama, cache):
    target = tmp_path / "run"
    source = pickled(tmp_path / "model", tiny_llama)
    torch.save({"weight": torch.ones(2), "spell": Spell(target)}, source / "pytorch_model.bin")
    with pytest.raises(BadInputError, match="holds more than tensors, and nothing of it was run"):
        convert_model(str(source))
    assert not target.exists()
    assert not [file for file in (cache / "models").iterdir() if file.is_dir()]
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert target.exists()  # so it was a real one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 cut", "cannot be read as PyTorch weights: bring it anew"),
        (b"", "cannot be read as PyTorch weights: bring it anew"),
        (pickle.dumps([1, 2], protocol=2), "cannot be read as|holds more than tensors"),
    ],
)
def test_what_is_no_weights_is_refused(tmp_path, tiny_llama, content, message):
    source = pickled(tmp_path / "model", tiny_llama)
    (source / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        convert_model(str(source))


def test_a_state_inside_something_else_is_refused(tmp_path, tiny_llama):
    source = pickled(tmp_path / "model", tiny_llama)
    torch.save({"model": {"a": torch.ones(1)}}, source / "pytorch_model.bin")
    with pytest.raises(BadInputError, match="is no plain mapping of names to tensors"):
        convert_model(str(source))


def test_a_part_that_is_missing_is_named(tmp_path, tiny_llama):
    source = pickled(tmp_path / "model", tiny_llama, shards=2)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(BadInputError, match=r"has no pytorch_model-00002-of-00002\.bin, which its"):
        convert_model(str(source))


def vicuna(folder, tiny_llama):
    """A pickled Llama with a sentencepiece tokenizer of no template, as Vicuna has."""
    pickled(folder, tiny_llama)
    for file in [*folder.glob("tokenizer*"), *folder.glob("chat_template*")]:
        file.unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["A chat between USER and ASSISTANT: hello assistant.", "Hi"] * 9),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": None}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_vicuna_gets_its_own_format(tmp_path, tiny_llama):
    pieces = vicuna(tmp_path / "Vicuna-tiny", tiny_llama)
    chat = load_chat(convert_model(str(tmp_path / "Vicuna-tiny")))
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    prompt = chat.prompt_ids("How many?")
    assert prompt == [1, *pieces.encode(f"{system} USER: How many? ASSISTANT:")]
    check_chat(chat, prompt)
    assert chat.response_ids("Two.", finished=True) == [*pieces.encode("Two."), 2]
    turns = [("Hi", "Hello")]
    text = chat.tokenizer.decode(chat.prompt_ids("Bye", turns))
    assert text.endswith("questions. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:")
    told = chat.tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        tokenize=False,
    )
    assert told == "<s> Be brief. USER: Hi "


def test_a_converted_model_may_be_put_where_all_nodes_see_it(tmp_path, tiny_llama, bucket, capsys):
    source = str(pickled(tmp_path / "mine", tiny_llama))
    place = convert_model(source, f"{bucket}/models/mine")
    assert str(place) == f"{bucket}/models/mine"
    assert model_digest(resolve_model(str(place), tmp_path)) == model_digest(convert_model(source))
    capsys.readouterr()
    assert convert_model(source, str(place)) == place
    assert capsys.readouterr().out == "", "it is ready"
    with pytest.raises(BadInputError, match="holds something other than"):
        convert_model(str(pickled(tmp_path / "other", tiny_llama)), str(place))


def test_a_template_that_is_there_stays_and_others_get_none(tmp_path, tiny_llama):
    kept = convert_model(str(pickled(tmp_path / "my-vicuna", tiny_llama)))
    assert load_chat(kept).template == load_chat(tiny_llama).template
    vicuna(tmp_path / "other", tiny_llama)
    with pytest.raises(BadInputError, match="has no chat template"):
        load_chat(convert_model(str(tmp_path / "other")))


def test_what_needs_no_preparing_says_so(tiny_llama):
    with pytest.raises(BadInputError, match="needs no preparing: it has safetensors"):
        convert_model(str(tiny_llama))


def test_other_remote_code_is_refused(tmp_path, tiny_llama):
    source = pickled(tmp_path / "model", tiny_llama)
    (source / "config.json").write_text('{"model_type": "baichuan", "auto_map": {}}')
    with pytest.raises(BadInputError, match="code of its own, for model_type 'baichuan'"):
        convert_model(str(source))


@pytest.mark.parametrize("reference", ["no-such-model", "/no/such/folder", "a/b/c"])
def test_what_is_no_reference_is_refused(reference):
    with pytest.raises(BadInputError, match="to prepare: expected a folder that exists, a Hugging"):
        convert_model(reference)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(BadInputError, match=r"has no config.json that can be read"):
        convert_model(str(tmp_path))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the folders of `tmp_path`/hub; returns what was fetched."""
    fetched = []

    def download(hub_id, allow_patterns):
        fetched.append([hub_id, *allow_patterns])
        snapshot = tmp_path / "snapshots" / hub_id / "c0ffee"
        for file in (tmp_path / "hub" / hub_id).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                snapshot.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, snapshot)
        return str(snapshot)

    def names(hub_id):
        return [file.name for file in (tmp_path / "hub" / hub_id).iterdir()]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", names)
    return fetched


def test_a_hub_id_is_found_prepared_before_the_hub_is_asked(tmp_path, tiny_llama, hub, cache):
    pickled(tmp_path / "hub/lmsys/vicuna-tiny", tiny_llama, shards=2)
    with pytest.raises(BadInputError, match="run `potstill models prepare lmsys/vicuna-tiny`"):
        resolve_model("lmsys/vicuna-tiny")
    folder = convert_model("lmsys/vicuna-tiny")
    assert folder == cache / "models" / "lmsys--vicuna-tiny"
    assert "lmsys/vicuna-tiny (commit c0ffee)" in (folder / "README.md").read_text()
    hub.clear()
    assert resolve_model("lmsys/vicuna-tiny") == folder
    assert hub == []
    assert_equal_models(folder, tiny_llama)


def test_weights_are_fetched_once_and_only_where_they_can_be_used(tmp_path, tiny_llama, hub):
    pickled(tmp_path / "hub/org/pickled", tiny_llama)
    convert_model("org/pickled")
    hub.clear()
    convert_model("org/pickled")
    shutil.copytree(tiny_llama, tmp_path / "hub/org/ready")
    with pytest.raises(BadInputError, match="org/ready needs no preparing"):
        convert_model("org/ready")
    code = tmp_path / "hub/org/internlm2"
    code.mkdir()
    (code / "config.json").write_text('{"model_type": "internlm2", "auto_map": {}}')
    save_file({"a": torch.ones(1)}, code / "model.safetensors")
    with pytest.raises(BadInputError, match="run `potstill models prepare org/internlm2` first"):
        resolve_model("org/internlm2")
    assert [call[0] for call in hub] == ["org/pickled", "org/ready", "org/internlm2"]
    assert not any("safetensors" in pattern or "bin" in pattern for call in hub for pattern in call)


def test_a_hub_model_that_is_ready_is_taken_as_it_is(tmp_path, tiny_llama, hub):
    shutil.copytree(tiny_llama, tmp_path / "hub/org/ready")
    assert_equal_models(resolve_model("org/ready"), tiny_llama)


def test_the_command_prepares_into_a_folder_of_choice(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(potstill, "hush", lambda _: None)
    source = pickled(tmp_path / "model", tiny_llama)
    command = ["models", "prepare", str(source), "--out", str(tmp_path / "made")]
    assert CliRunner().invoke(potstill.app, command).exit_code == 0
    assert_equal_models(tmp_path / "made", tiny_llama)
    miniature = ["models", "prepare", "miniature-teacher", "--out", str(source)]
    for full in ([*command[:-1], str(source)], miniature):
        error = CliRunner().invoke(potstill.app, full).exception
        assert isinstance(error, BadInputError)
        assert "holds something other than" in str(error)

"""A pruned folder is an ordinary one, made whole or not at all."""

import functools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers import LlamaForCausalLM as Llama

from cluster import publishing, storage
from cluster.errors import BadInputError
from cluster.publishing import is_published
from pipeline.chat import load_chat
from training import groups, pruning
from training.calibration import (
    CALIBRATION_TEXTS,
    HELD_OUT_TEXTS,
    perplexity,
    read_texts,
    text_ids,
)
from training.prunable import read_prunable
from training.pruning import prune_model
from training.widths import choose_widths

# Ratios of which heads must give their part, except in qwen2.
RATIOS = {
    "llama": 0.45,
    "llama_unshared": 0.4,
    "gemma": 0.45,
    "gemma2": 0.45,
    "gemma3": 0.45,
    "qwen2": 0.2,
}
IDS = torch.tensor([[5, 9, 17, 33, 4, 210, 6, 81, 12, 40]])


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POTSTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pruned(tiny_of, tmp_path_factory):
    """A function from a family's name to its pruned folder and the figures, made once."""

    @functools.cache
    def prune(family):
        out = tmp_path_factory.mktemp("pruned") / family
        return out, prune_model(str(tiny_of(family)), RATIOS[family], str(out))

    return prune


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("family", RATIOS)
def test_the_folder_is_what_pruning_in_memory_gives(family, tiny_of, pruned):
    folder, ratio = tiny_of(family), RATIOS[family]
    out, figures = pruned(family)
    prunable = read_prunable(folder, "x")
    kept, model = choose_widths(prunable, ratio), load(folder)
    worth = groups.weigh(model, text_ids(folder, CALIBRATION_TEXTS))
    for layer, head_worth in zip(groups.layers_of(model), worth, strict=True):
        groups.prune_layer(layer, kept, head_worth)
    reloaded = load(out)
    assert type(reloaded) is type(load(folder))
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=0, atol=0)

    before = sum(p.numel() for p in load(folder).parameters())
    after = sum(p.numel() for p in reloaded.parameters())
    assert (figures.parameters_before, figures.parameters_after) == (before, after)
    assert figures.ratio == 1 - after / before == pytest.approx(ratio, abs=0.01)
    fewer = figures.key_value_heads_after < figures.key_value_heads_before
    assert fewer == (family != "qwen2")


@pytest.mark.parametrize("family", RATIOS)
def test_the_configuration_tells_the_weights(family, tiny_of, pruned):
    out, _ = pruned(family)
    config = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    size, hidden = config.get("head_dim", 32), config["hidden_size"]
    for layer in ("model.layers.0", "model.layers.1"):
        shapes = {
            "self_attn.q_proj": (heads * size, hidden),
            "self_attn.k_proj": (shared * size, hidden),
            "self_attn.v_proj": (shared * size, hidden),
            "self_attn.o_proj": (hidden, heads * size),
            "mlp.gate_proj": (config["intermediate_size"], hidden),
            "mlp.up_proj": (config["intermediate_size"], hidden),
            "mlp.down_proj": (hidden, config["intermediate_size"]),
        }
        found = {name: tuple(weights[f"{layer}.{name}.weight"].shape) for name in shapes}
        assert found == shapes
    assert ("head_dim" in config) == (family != "qwen2")
    own = json.loads((tiny_of(family) / "config.json").read_text())
    changed = {key for key in own.keys() | config.keys() if own.get(key) != config.get(key)}
    heads_changed = {"num_attention_heads", "num_key_value_heads"} if family != "qwen2" else set()
    assert changed == {"intermediate_size"} | heads_changed


def test_a_head_size_that_is_the_default_is_written_too(tiny_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_of("llama"), folder)
    default = LlamaConfig().head_dim
    own = AutoConfig.from_pretrained(folder).to_dict() | {"head_dim": default}
    Llama(LlamaConfig(**own)).save_pretrained(folder)
    figures = prune_model(str(folder), 0.5, str(tmp_path / "out"))
    assert figures.heads_after < figures.heads_before
    assert json.loads((tmp_path / "out/config.json").read_text())["head_dim"] == default


def test_the_precision_of_the_weights_stays(tiny_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_of("llama"), folder)
    load(folder).to(torch.bfloat16).save_pretrained(folder)
    prune_model(str(folder), 0.2, str(tmp_path / "out"))
    pruned, whole = (load_file(f / "model.safetensors") for f in (tmp_path / "out", folder))
    assert {weight.dtype for weight in pruned.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    rows = {tuple(row.tolist()) for row in whole["model.layers.0.mlp.up_proj.weight"].float()}
    left = [tuple(row.tolist()) for row in pruned["model.layers.0.mlp.up_proj.weight"].float()]
    assert 0 < len(left) < len(rows)
    assert set(left) < rows


def test_tokenizer_template_and_generation_config_are_carried_over(tiny_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_of("llama"), folder)
    # As Vicuna's: transformers refuses to save it.
    published = '{"eos_token_id": [2, 7], "temperature": 0.9, "top_p": 0.6}'
    (folder / "generation_config.json").write_text(published)
    (folder / "LICENSE").write_text("Free.")
    prune_model(str(folder), 0.2, str(tmp_path / "out"))
    assert load_chat(tmp_path / "out").template == load_chat(folder).template
    assert load_chat(tmp_path / "out").prompt_ids("3 + 5?") == load_chat(folder).prompt_ids(
        "3 + 5?"
    )
    assert (tmp_path / "out/generation_config.json").read_text() == published
    assert (tmp_path / "out/LICENSE").read_text() == "Free."
    assert is_published(storage.location(str(tmp_path / "out")))


def test_the_same_call_gives_the_same_files_and_other_texts_others(tiny_of, pruned, tmp_path):
    (tmp_path / "own.txt").write_text("Tom has 3 pens.\n\nAnna had 9 apples and gave 4 away.\n")
    model, ratio = str(tiny_of("llama")), RATIOS["llama"]
    prune_model(model, ratio, str(tmp_path / "again"))
    prune_model(model, ratio, str(tmp_path / "own"), str(tmp_path / "own.txt"))
    one, again, own = map(files_of, (pruned("llama")[0], tmp_path / "again", tmp_path / "own"))
    assert one == again
    assert one["config.json"] == own["config.json"]
    assert one["model.safetensors"] != own["model.safetensors"]


def test_the_figures_are_in_the_folder_with_their_provenance(tiny_of, tmp_path, capsys):
    folder = tiny_of("llama")
    figures = prune_model(str(folder), 0.45, str(tmp_path / "out"))
    written = json.loads((tmp_path / "out/pruning.json").read_text())
    assert vars(figures).items() <= written.items()
    assert {"model", "model_digest", "texts_digest", "versions"} <= written.keys()
    held_out = text_ids(folder, HELD_OUT_TEXTS)
    assert figures.perplexity_before == pytest.approx(perplexity(load(folder), held_out))
    assert figures.perplexity_after == pytest.approx(perplexity(load(tmp_path / "out"), held_out))
    out = capsys.readouterr().out
    assert f"{figures.parameters_before:,} -> {figures.parameters_after:,}" in out
    assert f"{figures.perplexity_before:.2f} -> {figures.perplexity_after:.2f}" in out
    assert f"{figures.ratio:.2%} gone of 45.00% asked" in out


def test_perplexity_is_that_of_transformers_own_loss(tiny_of):
    model = load(tiny_of("gemma2"))
    texts = [[5, 9, 17, 33, 4, 210], [7, 300, 8]]
    with torch.no_grad():
        losses = [model(input_ids=torch.tensor([t]), labels=torch.tensor([t])).loss for t in texts]
    expected = math.exp((5 * losses[0] + 2 * losses[1]) / 7)
    assert perplexity(model, texts) == pytest.approx(expected, rel=1e-5)


def test_what_is_measured_is_not_what_was_weighed():
    sentences = [set(". ".join(texts).split(". ")) for texts in (CALIBRATION_TEXTS, HELD_OUT_TEXTS)]
    assert len(CALIBRATION_TEXTS) == 10
    assert sentences[0] & sentences[1] == set()


def test_a_long_text_is_cut_at_the_context(tiny_of):
    tokenizer = AutoTokenizer.from_pretrained(tiny_of("llama"))
    (ids,) = text_ids(tiny_of("llama"), ["pens " * 3000])
    assert ids == tokenizer("pens " * 3000)["input_ids"][:512]


def changed(folder, target, **config):
    shutil.copytree(folder, target)
    own = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(own | config))
    return target


CONFIGS = {
    "another architecture": ({"model_type": "gpt2"}, "model_type 'gpt2'.*llama, qwen2, gemma"),
    "InternLM2": (
        {"model_type": "internlm2", "auto_map": {"AutoConfig": "c.C"}},
        "run `potstill models prepare ",
    ),
    "its own code": (
        {"auto_map": {"AutoModelForCausalLM": "own_code.OwnModel"}},
        "code of its own.*llama, qwen2",
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised weights: prune the original"),
}


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def fail(_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(pruning, "_load", fail)


@pytest.mark.parametrize("what", CONFIGS)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_model_that_cannot_be_pruned_is_refused(what, tiny_of, tmp_path):
    config, message = CONFIGS[what]
    folder = changed(tiny_of("llama"), tmp_path / "model", **config)
    with pytest.raises(BadInputError, match=message):
        prune_model(str(folder), 0.2, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_model_whose_layers_have_other_names_is_refused(tiny_of, tmp_path):
    with pytest.raises(BadInputError, match="model_type 'gpt2'"):
        prune_model(str(tiny_of("gpt2")), 0.2, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("ratio", "message"),
    [(0, "above 0 and below 1"), (1.5, "above 0"), (0.9, r"ratio=0\.9 .* the largest is 0\.")],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_ratio_that_cannot_be_met_is_refused(ratio, message, tiny_of, tmp_path):
    with pytest.raises(BadInputError, match=message):
        prune_model(str(tiny_of("llama")), ratio, str(tmp_path / "out"))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_too_little_memory_is_told_before_the_model_is_loaded(tiny_of, tmp_path, monkeypatch):
    parameters = read_prunable(tiny_of("llama"), "it").parameters
    free = SimpleNamespace(available=8 * parameters - 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(BadInputError, match=r"takes 0\.0 GiB of memory, and this machine has"):
        prune_model(str(tiny_of("llama")), 0.2, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["folder", "file"])
def test_a_place_that_holds_something_is_refused_before_the_model_is_looked_for(content, tmp_path):
    place = tmp_path / "out"
    if content == "folder":
        (place / "notes").mkdir(parents=True)
    else:
        place.write_text("mine")
    with pytest.raises(BadInputError, match=r"out=.* already holds something"):
        prune_model("/no/such/model", 0.2, str(place))
    assert (place / "notes").exists() or place.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\n \n", "is empty"), (b"\xff\xfe", "cannot be read")],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_texts_that_cannot_be_used_are_refused(content, message, tiny_of, tmp_path):
    if content is not None:
        (tmp_path / "texts").write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        prune_model(str(tiny_of("llama")), 0.2, str(tmp_path / "out"), str(tmp_path / "texts"))


def test_a_text_with_nothing_to_predict_is_refused(tiny_of, tmp_path):
    (tmp_path / "texts").write_text("Tom has 3 pens.\nx\n")
    assert read_texts(storage.location(str(tmp_path / "texts"))) == ["Tom has 3 pens.", "x"]
    with pytest.raises(BadInputError, match=r"text 2, 'x'.* two or more tokens"):
        prune_model(str(tiny_of("llama")), 0.2, str(tmp_path / "out"), str(tmp_path / "texts"))


@pytest.mark.parametrize("step", ["prune_layer", "publish_folder"])
def test_an_interruption_leaves_nothing_behind(step, tiny_of, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    owner = groups if step == "prune_layer" else publishing
    monkeypatch.setattr(owner, step, stop)
    with pytest.raises(KeyboardInterrupt):
        prune_model(str(tiny_of("llama")), 0.2, str(tmp_path / "place/out"))
    assert list((tmp_path / "place").iterdir()) == []


def test_a_url_gets_the_same_folder_and_is_refused_once_it_holds_one(tiny_of, pruned):
    out = "memory://bucket/pruned"
    prune_model(str(tiny_of("llama")), RATIOS["llama"], out)
    assert files_of(storage.location(out)) == files_of(pruned("llama")[0])
    with pytest.raises(BadInputError, match="already holds something"):
        prune_model("/no/such/model", 0.2, out)


def test_what_another_process_wrote_meanwhile_stays(tiny_of, tmp_path, monkeypatch):
    def write_meanwhile(staging, *_):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").write_text("theirs")

    monkeypatch.setattr(pruning, "_write_figures", write_meanwhile)
    with pytest.raises(BadInputError, match="already holds something"):
        prune_model(str(tiny_of("llama")), 0.2, str(tmp_path / "out"))
    assert files_of(tmp_path / "out") == {"theirs": b"theirs"}


def test_texts_may_lie_in_a_bucket(bucket):
    file = storage.location(f"{bucket}/texts")
    file.write_text("Tom has 3 pens.\n")
    assert read_texts(file) == ["Tom has 3 pens."]
    with pytest.raises(BadInputError, match="s3://bucket/gone cannot be read"):
        read_texts(storage.location(f"{bucket}/gone"))

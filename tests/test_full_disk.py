"""What does not fit on the disk is one error, and takes nothing with it that was there."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.fault

# A limit on the size of a file in the place of a full disk: the same error, without a disk to fill.
LIMITED = """
import resource, sys
from pathlib import Path
import pyarrow as pa
from cluster.publishing import publishing
from cluster.errors import RunError
from cluster.run_folder import RunFolder
from cluster.storage import location, write_json, write_table
from pipeline.rows import Sample
from pipeline.store import SampleStore

root = location(sys.argv[1])
run, store = RunFolder(root / "run"), SampleStore(root / "store")
large = pa.table({"key": [str(number) for number in range(50_000)]})

def sample(text):
    return Sample("key", "p", 0, "model", text, "stop", 1, None)

def text():
    import random
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=50_000))

def checkpoint():
    with publishing(run.checkpoint(1)) as folder:
        import numpy
        from safetensors.numpy import save_file
        save_file({"weight": numpy.zeros(50_000)}, folder / "model.safetensors")

def pairs():
    with publishing(run.pairs(1)) as folder:
        write_table(large, location(str(folder / "pairs.parquet")))

write = {
    "samples": lambda: store.write([sample(text())]),
    "completions": lambda: write_table(large, run.completions("teacher")),
    "pairs": pairs,
    "checkpoint": checkpoint,
    "result": lambda: write_json(run.evaluation("base_test"), ["x" * 50_000]),
    "metrics": lambda: run.record(text="x" * 50_000),
}[sys.argv[2]]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
try:
    write()
except RunError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "what", ["samples", "completions", "pairs", "checkpoint", "result", "metrics"]
)
def test_what_cannot_be_written_is_one_error_and_leaves_nothing_half(what, tmp_path):
    for old in ("run/completions/student_000.parquet", "store/samples/model/old.parquet"):
        (tmp_path / old).parent.mkdir(parents=True)
        (tmp_path / old).write_text("as it was")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"stage": "sample"}\n')
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), what], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == 1
    assert "cannot be written" in ended.stdout
    assert "free space" in ended.stdout
    left = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    metrics = left.pop("metrics.jsonl")
    assert left == {"student_000.parquet": "as it was", "old.parquet": "as it was"}
    assert metrics.startswith('{"stage": "sample"}\n')

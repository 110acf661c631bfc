"""Nothing that is read runs code: no pickles, YAML of plain values, files that are as saved."""

import ast
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.errors import BadInputError, RunError
from cluster.publishing import MARKER, fetch_folder, is_whole, publish_folder
from cluster.recipes import load_recipe
from cluster.run_folder import RunFolder
from evals.single import SingleEvaluation, evaluate_model
from training.optimizer_state import newest_state

PROJECT = Path(__file__).parents[1]
OURS = ["potstill.py", "cluster", "pipeline", "training", "serving", "evals"]
UNSAFE = {
    *("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads", "pd.read_pickle"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "marshal.loads", "shelve.open", "eval"),
}
RUNS = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{}']]"


def calls_in(source):
    """(name, keywords) of each call, as the source has it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield ast.unparse(node.func), keywords


def unsafe_calls(source):
    return [
        name
        for name, keywords in calls_in(source)
        if name in UNSAFE
        or (name == "torch.load" and keywords.get("weights_only") != "True")
        or keywords.get("allow_pickle", "False") != "False"
    ]


def test_no_module_unpickles_or_evaluates():
    files = [file for name in OURS for file in (PROJECT / name).rglob("*.py")]
    files.append(PROJECT / "potstill.py")
    loads = {
        file.name for file in files for name, _ in calls_in(file.read_text()) if "load" in name
    }
    assert "weights.py" in loads
    assert {str(file): found for file in files if (found := unsafe_calls(file.read_text()))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(f)", ["torch.load"]),
        ("torch.load(f, weights_only=False)", ["torch.load"]),
        ("torch.load(f, weights_only=True)", []),
        ("np.load(f, allow_pickle=True)", ["np.load"]),
        ("def f():\n    return pickle.loads(x)", ["pickle.loads"]),
    ],
)
def test_an_unsafe_call_is_seen(source, found):
    assert unsafe_calls(source) == found


def test_yaml_holds_values_and_no_calls(tmp_path):
    mark = tmp_path / "mark"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {RUNS.format(mark)}")
    with pytest.raises(BadInputError, match="not valid YAML"):
        load_recipe(recipe)
    recipe.write_text("run: {folder: x}")
    with pytest.raises(BadInputError, match="has no YAML value"):
        load_recipe(recipe, [f"run.seed={RUNS.format(mark)}"])
    wanted = SingleEvaluation("http://127.0.0.1:9/v1", "chat", verdict=RUNS.format(mark))
    with pytest.raises(BadInputError, match="is no YAML"):
        evaluate_model(wanted)
    assert not mark.exists()


class Touches:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "in lists"])
def test_objects_in_parquet_are_refused_and_not_unpickled(nested, tmp_path):
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    mark = tmp_path / "mark"
    stored = pa.array([pickle.dumps(Touches(mark))], pa.large_binary())
    column = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), stored)
    if nested:
        column = pa.ListArray.from_arrays(pa.array([0, 1]), column)
    pq.write_table(pa.table({"question": column}), tmp_path / "rows.parquet")
    for columns in (None, ["question"]):
        with pytest.raises(BadInputError, match="extension type, question"):
            storage.read_parquet(storage.location(str(tmp_path / "rows.parquet")), columns)
    with pytest.raises(BadInputError, match="extension type, question"):
        storage.read_table(storage.location(str(tmp_path / "rows.parquet")))
    assert not mark.exists()
    pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert mark.exists(), "the file was no threat"


@pytest.fixture(params=["disk", "bucket"])
def published(request, tmp_path):
    """A published trainer state and the run that it is of."""
    root = str(tmp_path / "run") if request.param == "disk" else f"memory://{tmp_path.name}/run"
    run = RunFolder(storage.location(root))
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "state.json").write_text("{}")
    (source / "sub" / "moments").write_text("0.5")
    publish_folder(source, run.trainer_state(1))
    return run


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_trainer_state_is_not_taken(damage, published):
    file = published.trainer_state(1) / "sub" / "moments"
    file.write_text("0.6") if damage == "changed" else file.unlink()
    assert newest_state(published, limit=9) == 0


@pytest.mark.fault
@pytest.mark.parametrize("published", ["bucket"], indirect=True)
def test_a_copy_that_was_damaged_is_brought_again(published, tmp_path):
    state = published.trainer_state(1)
    (fetch_folder(state, tmp_path / "cache") / "sub" / "moments").write_text("0.6")
    copy = fetch_folder(state, tmp_path / "cache")
    assert (copy / "sub" / "moments").read_text() == "0.5"


@pytest.mark.fault
@pytest.mark.parametrize("published", ["bucket"], indirect=True)
def test_what_could_not_be_brought_takes_no_room(published, tmp_path):
    state, cache = published.trainer_state(1), tmp_path / "cache"
    (state / "sub" / "moments").write_text("0.6")
    with pytest.raises(RunError, match="is damaged"):
        fetch_folder(state, cache)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["../mark", "sub/../../mark", "/tmp/mark"])
def test_a_marker_leads_nowhere_else(name, published, tmp_path):
    state = published.trainer_state(1)
    storage.write_json(state / MARKER, {"files": {name: "0"}})
    with pytest.raises(RunError, match="no file of that folder"):
        is_whole(state)
    if not storage.is_local(state):
        with pytest.raises(RunError, match="no file of that folder"):
            fetch_folder(state, tmp_path / "cache")

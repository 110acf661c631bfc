"""Tables: their cells, and the figures that are read from the cells' runs."""

import csv
import io
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from cluster import storage
from cluster.errors import BadInputError
from cluster.lock import locked
from cluster.publishing import publish_folder, staging_folder
from cluster.run_folder import RunFolder
from evals.accuracy import Answer, answers_table
from evals.stage import answers_file
from evals.tables import run as running
from evals.tables.figures import chosen_result, is_done, measured
from evals.tables.fit import refuse_misfits
from evals.tables.layout import as_csv, lines_of, markdown, page, teachers_of
from evals.tables.plan import describe_table
from evals.tables.spec import load_table

RECIPE = {
    "run": {"folder": "runs/x"},
    "task": {"name": "gsm8k"},
    "teacher": {"model": "org/teacher"},
    "student": {"model": "org/student"},
    "training": {"epochs": 2},
}
ARMS = ["zero_shot_cot", "diverse_cot_sft", "mixed_policy_orpo"]


@pytest.fixture
def spec(tmp_path):
    raw = {
        "title": "Tiny",
        "recipe": "recipe.yaml",
        "folder": str(tmp_path / "table"),
        "blocks": [{"student": "Tiny 1B", "options": {"student.model": "tiny"}, "arms": ARMS}],
        "tasks": {"GSM8K": {"task.name": "gsm8k"}, "ARC-C": {"task.name": "arc_challenge"}},
        "seeds": [0, 1],
        "agreement": True,
        "published": {"Tiny 1B": {"mixed_policy_orpo": {"GSM8K": 40.72}}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return tmp_path / "table.yaml"


def finish(cell, accuracies, answers=("1", "2"), **more):
    """Write what a cell's run leaves: accuracy by model id, of 100 answers."""
    run = RunFolder(storage.location(cell.stages[-1].run.folder))
    for epoch in range(1, cell.stages[-1].training.epochs + 1):
        staging = staging_folder(run.checkpoint(epoch))
        (staging / "weights").write_text("x")
        publish_folder(staging, run.checkpoint(epoch))
    for name, accuracy in accuracies.items():
        result = {"accuracy": accuracy, "n": 100, **more}
        storage.write_json(run.evaluation(name), result)
        found = [
            Answer(f"p{n}", "", "", None if answer == "-" else answer, "right", "stop", None)
            for n, answer in enumerate(answers if name != "teacher_test" else ("1", "3"))
        ]
        storage.write_table(answers_table(found), answers_file(run.evaluation(name)))
    storage.write_text(run.finished_file, "{}")


def test_cells_are_every_arm_task_and_seed_with_the_options_of_each(spec):
    _, cells = load_table(spec)
    assert len(cells) == len(ARMS) * 2 * 2
    assert len({cell.stages[0].run.folder for cell in cells}) == len(cells)
    for cell in cells:
        (config,) = cell.stages
        assert config.student.model == "tiny"
        assert config.run.seed == cell.seed
        assert config.task.name == {"GSM8K": "gsm8k", "ARC-C": "arc_challenge"}[cell.task]
        assert config.training.method == ("sft" if cell.arm == "diverse_cot_sft" else "orpo")
        assert config.training.epochs == (0 if cell.arm == "zero_shot_cot" else 2)


MISTAKES = {
    "arms": ({"blocks": [{"student": "x", "arms": ["best"]}]}, "arm 'best' is not known"),
    "keys": ({"colour": 1}, "colour is not an option: options here are"),
    "recipe": ({"recipe": "none.yaml"}, "no configuration at"),
    "option": ({"tasks": {"a": {"task.nam": "gsm8k"}}}, "task.nam is not an option"),
    "seeds": ({"seeds": []}, r"seeds=\[]: tuple should have at least 1 item"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(spec, change, message):
    spec.write_text(yaml.safe_dump(yaml.safe_load(spec.read_text()) | change))
    with pytest.raises(BadInputError, match=message.replace(".", r"\.")):
        load_table(spec)


def fill(spec):
    described, cells = load_table(spec)
    scores = {"zero_shot_cot": 0.1, "diverse_cot_sft": 0.3, "mixed_policy_orpo": 0.5}
    for cell in cells:
        right = scores[cell.arm] + 0.02 * cell.seed + 0.2 * (cell.task == "ARC-C")
        trained = {"student-epoch-1_test": 0.9, "student-epoch-2_test": right}
        trained |= {"student-epoch-1_validation": 0.1, "student-epoch-2_validation": 0.2}
        finish(cell, {"base_test": right, "teacher_test": 0.8, **trained})
    return described, cells


def test_a_cell_is_the_best_epochs_by_validation_over_seeds(spec):
    _, cells = fill(spec)
    row = measured([c for c in cells if c.arm == "mixed_policy_orpo"], "mixed_policy_orpo", True)
    assert row["GSM8K"].mean == pytest.approx(51.0), "0.50 and 0.52, not epoch 1's 0.9"
    assert row["GSM8K"].standard_error == pytest.approx(1.0)
    assert (row["GSM8K"].n, row["GSM8K"].seeds) == (200, 2)
    assert row["mean"].mean == pytest.approx((51 + 71) / 2)
    assert row["mean"].standard_error == pytest.approx(1.0), "of 60 and 62"
    assert row["agreement"].mean == pytest.approx(50.0), "one of two answers is the teacher's"


def test_a_figure_stays_where_the_best_epochs_weights_are_not_kept(spec):
    _, cells = fill(spec)
    cell = next(cell for cell in cells if cell.arm == "mixed_policy_orpo")
    before = chosen_result(cell, cell.arm)
    assert "student-epoch-2" in str(before)
    RunFolder(storage.location(cell.stages[-1].run.folder)).remove_checkpoints([2])
    assert chosen_result(cell, cell.arm) == before


def test_markdown_has_the_papers_number_and_the_best_in_bold(spec):
    described, cells = fill(spec)
    text = markdown(described, lines_of(described, cells))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, zero, sft, mixed, teacher = lines
    assert head.split("|")[1:5] == [" student ", " arm ", " GSM8K ", " ARC-C "]
    assert "**51.0 ± 1.0** [40.72]" in mixed
    assert not any("**" in line.split("|")[3] for line in (zero, sft, teacher))
    assert "80.0 ± 0.0" in teacher
    assert len({line.count("|") for line in lines}) == 1


def test_a_tie_within_the_interval_is_bold_too(spec):
    described, cells = fill(spec)
    for cell in cells:
        if cell.arm == "diverse_cot_sft" and cell.task == "GSM8K":
            finish(cell, {"student-epoch-2_test": 0.495})
    text = markdown(described, lines_of(described, cells))
    assert "**49.5 ± 0.0**" in text


def test_csv_has_a_line_for_each_figure(spec):
    described, cells = fill(spec)
    rows = list(csv.DictReader(io.StringIO(as_csv(described, lines_of(described, cells)))))
    (found,) = [r for r in rows if (r["arm"], r["column"]) == ("mixed_policy_orpo", "GSM8K")]
    assert (float(found["mean"]), float(found["published"])) == (51.0, 40.72)


def test_a_published_0_is_a_number(spec):
    raw = yaml.safe_load(spec.read_text())
    raw["published"]["teacher"] = {"teacher": {"In-domain": 0}}
    spec.write_text(yaml.safe_dump(raw, sort_keys=False))
    described, cells = fill(spec)
    lines = lines_of(described, cells)
    rows = list(csv.DictReader(io.StringIO(as_csv(described, lines))))
    assert [r["published"] for r in rows if r["column"] == "In-domain"] == ["0.0"]
    assert "| – [0.00] |" in markdown(described, lines)


def test_percent_is_said_of_our_numbers_alone(spec):
    described, cells = fill(spec)
    text = markdown(described, lines_of(described, cells))
    assert "Ours in percent" in text
    assert "each column in the paper's own unit" in text


EXAMPLE = {"question": "1 + 1?", "answer": r"\boxed{2}"}


def taught_by(spec, **teachers):
    """The table with a block for each student, whose options these are."""
    raw = yaml.safe_load(spec.read_text())
    raw["blocks"] = [
        {"student": name, "options": options, "arms": ARMS} for name, options in teachers.items()
    ]
    spec.write_text(yaml.safe_dump(raw, sort_keys=False))
    return load_table(spec)


def test_each_teacher_has_a_row(spec):
    raw = yaml.safe_load(spec.read_text())
    raw["published"] = {"org/other": {"teacher": {"MT-Bench": 7.42}}}
    spec.write_text(yaml.safe_dump(raw))
    other = {"teacher.model": "org/other"}
    described, cells = taught_by(spec, first={}, second=other, third={}, fourth=other)
    for cell in cells:
        own = {"first": 0.6, "second": 0.8, "third": 0.6, "fourth": 0.8}[cell.student]
        finish(cell, {"base_test": 0.1, "teacher_test": own + 0.02 * cell.seed})
    *_, one, two = lines_of(described, cells)
    assert [(line.student, line.arm) for line in (one, two)] == [
        ("org/teacher", "teacher"),
        ("org/other", "teacher"),
    ]
    assert (one.figures["GSM8K"].mean, two.figures["GSM8K"].mean) == pytest.approx((61, 81))
    assert (one.figures["GSM8K"].n, one.figures["GSM8K"].seeds) == (200, 2)
    assert (one.published, two.published) == ({}, {"MT-Bench": 7.42})
    assert "| org/other | teacher | 81.0 ± 1.0 |" in markdown(described, [one, two])


def test_a_teachers_row_is_of_any_cell_that_is_done_and_evaluated_it(spec):
    silent = {"evaluation.teacher": False}
    raw = yaml.safe_load(spec.read_text()) | {"agreement": False}
    spec.write_text(yaml.safe_dump(raw))
    described, cells = taught_by(spec, silent=silent, second={})
    for cell in cells:
        if cell.student == "silent":
            finish(cell, {"base_test": 0.1})
    assert lines_of(described, cells)[-1].figures == {}
    for cell in cells:
        if cell.student == "second" and cell.arm == ARMS[1]:
            finish(cell, {"base_test": 0.1, "teacher_test": 0.8})
    last = lines_of(described, cells)[-1]
    assert (last.student, last.arm) == ("teacher", "teacher")
    assert last.figures["mean"].mean == pytest.approx(80)


def test_worked_examples_make_another_teacher_unless_a_task_sets_them(spec):
    shown = {"teacher.few_shot": [EXAMPLE]}
    other = {"teacher.few_shot": [EXAMPLE | {"question": "1 * 2?"}]}
    named = teachers_of(taught_by(spec, plain={}, shown=shown, other=other)[1])
    assert list(named) == [
        "org/teacher",
        "org/teacher, shown 1 worked examples (1)",
        "org/teacher, shown 1 worked examples (2)",
    ]
    assert [{cell.student for cell in ours} for ours in named.values()] == [
        {"plain"},
        {"shown"},
        {"other"},
    ]
    raw = yaml.safe_load(spec.read_text())
    raw["tasks"]["GSM8K"] |= shown
    spec.write_text(yaml.safe_dump(raw))
    assert list(teachers_of(taught_by(spec, one={}, two={})[1])) == ["teacher"]


def test_the_page_has_what_the_markdown_has_and_escapes_it(spec):
    described, cells = fill(spec)
    described = described.model_copy(update={"title": "Tiny <b>"})
    found = page(described, lines_of(described, cells))
    assert "<td><b>51.0 ± 1.0</b> [40.72]</td>" in found
    assert "<h1>Tiny &lt;b&gt;</h1>" in found


def test_columns_that_only_the_paper_has_are_shown(spec):
    raw = yaml.safe_load(spec.read_text())
    raw["published"]["Tiny 1B"]["mixed_policy_orpo"] |= {"MT-Bench": 3.84, "mean": 43.17}
    spec.write_text(yaml.safe_dump(raw, sort_keys=False))
    described, cells = fill(spec)
    lines = markdown(described, lines_of(described, cells)).splitlines()
    (head,) = [line for line in lines if line.startswith("| student")]
    assert head.split("|")[3:8] == [" GSM8K ", " ARC-C ", " MT-Bench ", " mean ", " agreement "]
    assert any("| – [3.84] |" in line for line in lines)


TABLES = sorted((Path(__file__).parents[1] / "configs/tables").glob("*.yaml"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_shipped_table_has_a_plan(path):
    described, cells = load_table(path)
    assert len({cell.name for cell in cells}) == len(cells)
    known = {block.student: set(block.arms) for block in described.blocks}
    known |= {name: {"teacher"} for name in teachers_of(cells)}
    for student, arms in described.published.items():
        assert set(arms) <= known.get(student, set()), student
    assert describe_table(described, cells).row_count == len(described.blocks) + 2 + (
        bool(cells[0].stages[0].cluster.nodes)
    )
    refuse_misfits(cells)


def test_a_cell_that_finds_no_room_is_named_before_the_table_starts(tmp_path):
    (shipped,) = [path for path in TABLES if path.stem == "dadpo_tables"]
    raw = yaml.safe_load(shipped.read_text())
    raw["recipe"] = str(shipped.parent / raw["recipe"])
    del raw["options"]  # leaves the recipe's smaller nodes
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(raw))
    _, cells = load_table(tmp_path / "table.yaml")
    room = r"No room for 8 training workers .*teacher 14.2"
    told = rf"^Qwen2.5 1.5B, dsft_kl, .*: {room}.*; Qwen2.5 1.5B, ddpo_kl, .*: {room}"
    with pytest.raises(BadInputError, match=told):
        refuse_misfits(cells)


def test_there_are_the_papers_tables():
    assert [path.stem for path in TABLES] == [
        "dadpo_tables",
        "miniature",
        "orpo_table1",
        "orpo_table2",
    ]


def test_a_mean_needs_every_task(spec):
    _, cells = load_table(spec)
    ours = [cell for cell in cells if cell.arm == "zero_shot_cot"]
    for cell in ours:
        if cell.task == "GSM8K":
            finish(cell, {"base_test": 0.4, "teacher_test": 0.9})
    assert set(measured(ours, "zero_shot_cot", False)) == {"GSM8K"}


def test_a_report_alone_does_not_make_a_cell_done(spec):
    _, cells = load_table(spec)
    folder = RunFolder(storage.location(cells[0].stages[-1].run.folder)).root
    storage.write_text(folder / "report.html", "as far as it has come")
    assert not is_done(cells[0])


def test_a_done_cell_of_another_recipe_is_refused(spec):
    described, cells = load_table(spec)
    finish(cells[0], {"base_test": 0.4, "teacher_test": 0.9})
    run = RunFolder(storage.location(cells[0].stages[-1].run.folder))
    changed = cells[0].stages[-1].model_dump(mode="json")
    changed["training"]["learning_rate"] = 1e-3
    storage.write_text(run.config_file, yaml.safe_dump(changed))
    with pytest.raises(BadInputError, match=r"another recipe: training\.learning_rate"):
        running.fill_table(described, cells)


def test_agreement_needs_the_teacher(spec):
    raw = yaml.safe_load(spec.read_text())
    raw["blocks"][0]["options"]["evaluation.teacher"] = False
    spec.write_text(yaml.safe_dump(raw))
    with pytest.raises(BadInputError, match="agreement=true compares with the teacher"):
        load_table(spec)


def test_an_arm_is_itself_whatever_the_student_sets(spec):
    raw = yaml.safe_load(spec.read_text())
    raw["blocks"][0] |= {"arms": ["ddpo", "rdpo", "dadpo"]}
    raw["blocks"][0]["options"] |= {
        "training.reference_weight": 0.3,
        "training.teacher_weight": 0.2,
    }
    spec.write_text(yaml.safe_dump(raw))
    _, cells = load_table(spec)
    weights = {
        c.arm: (c.stages[0].training.reference_weight, c.stages[0].training.teacher_weight)
        for c in cells
    }
    assert weights == {"ddpo": (0.3, 0), "rdpo": (0, 0.2), "dadpo": (0.3, 0.2)}


def test_one_seed_has_the_error_of_its_proportion(spec):
    _, cells = fill(spec)
    one = [c for c in cells if (c.arm, c.seed, c.task) == ("diverse_cot_sft", 0, "GSM8K")]
    assert measured(one, "diverse_cot_sft", False)["GSM8K"].standard_error == pytest.approx(
        100 * (0.3 * 0.7 / 100) ** 0.5
    )


def test_kinds_of_one_task_are_columns(spec):
    _, cells = load_table(spec)
    kinds = {"number": {"accuracy": 0.2, "n": 50}, "choice": {"accuracy": 0.6, "n": 50}}
    finish(cells[0], {"base_test": 0.4, "teacher_test": 0.9}, by_kind=kinds)
    row = measured(cells[:1], "zero_shot_cot", False)
    assert (row["number"].mean, row["choice"].mean) == (pytest.approx(20), pytest.approx(60))
    assert row["mean"].mean == pytest.approx(40)


def test_a_table_goes_on_at_the_cells_that_are_not_done(spec, monkeypatch):
    described, cells = load_table(spec)
    done, left = cells[::3], [cell for place, cell in enumerate(cells) if place % 3]
    for cell in done:
        finish(cell, {"base_test": 0.4, "teacher_test": 0.9})
    ran, refused = [], []

    def take_cells(spec, all_cells, missing):
        ran.extend(missing)
        for cell in missing:
            finish(cell, {"base_test": 0.4, "teacher_test": 0.9})

    class NoRay:
        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(running, "refuse_stages", refused.extend)
    monkeypatch.setattr(running, "ray_session", lambda _: NoRay())
    monkeypatch.setattr(running, "_run_cells", take_cells)
    busy = locked(storage.location(described.folder))
    with busy, pytest.raises(BadInputError, match="another process"):
        running.fill_table(described, cells)
    assert ran == []
    written = running.fill_table(described, cells)
    assert ran == left
    assert refused == [config for cell in left for config in cell.stages], "all, before any"
    assert all(is_done(cell) for cell in cells)
    assert written.read_text().startswith("# Tiny")
    assert json.loads(json.dumps(written.with_suffix(".csv").read_text())).startswith("student,arm")


def test_cells_are_told_by_their_place_in_the_table_with_an_eta(spec, monkeypatch, capsys):
    described, cells = load_table(spec)
    now = [0.0]

    def run(_, config, **__):
        now[0] += 90
        (cell,) = [cell for cell in cells if cell.stages[-1] == config]
        finish(cell, {"base_test": 0.4, "teacher_test": 0.9})

    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(running, "open_stage", nullcontext)
    monkeypatch.setattr(running, "run_stage", run)
    monkeypatch.setattr("pipeline.pool.release_engines", lambda _: None)
    running._run_cells(described, cells, cells[-3:])
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in told] == [f"cell {n} of 12" for n in (10, 11, 12)]
    assert "eta" not in told[0]
    assert told[1].endswith("(eta 0:03:00 at the pace of those before)")
    assert told[2].endswith("(eta 0:01:30 at the pace of those before)")


SIZES = {
    "teacher.parameters": 7_000_000_000,
    "student.parameters": 1_000_000_000,
    "cluster.nodes": [
        {"name": "large", "cpus": 8, "memory_gib": 64, "gpus": 4, "gpu_memory_gib": 80}
        | {"labels": "stage=training", "price_per_hour": 16},
        {"name": "small", "cpus": 4, "memory_gib": 16, "gpus": 1, "gpu_memory_gib": 24}
        | {"price_per_hour": 1},
    ],
    "cluster.training_nodes": "stage=training",
}


def costs(spec, **more):
    raw = yaml.safe_load(spec.read_text())
    raw["blocks"][0]["options"] |= SIZES | more
    spec.write_text(yaml.safe_dump(raw, sort_keys=False))
    table = describe_table(*load_table(spec))
    return [list(column.cells) for column in table.columns]


def test_a_table_tells_its_cost_without_weights_or_data(spec):
    rows, cells, steps, hours = costs(spec)
    assert rows[-1] == "cost, by cluster.nodes"
    assert cells[1:3] == ["12", "12"]
    least, most = (float(hour) for hour in hours[-2].split(" to "))
    assert 0 < least < most
    parts = [[float(n.replace(",", "")) for n in text.split(" to ")] for text in hours[:2]]
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(
        [least, most], abs=0.2
    )
    low, high = (float(cost.replace(",", "")) for cost in hours[-1].split(" to "))
    # A GPU costs 4 an hour where students train, 1 where engines answer.
    assert least < low < 4 * least
    assert most < high < 4 * most
    # Half of 8 traces of 7473 and 1119 prompts, two epochs of batches of 32; two arms and seeds.
    per_arm = 2 * (-(-7473 * 4 // 32) + -(-1119 * 4 // 32))
    assert steps[1] == f"{2 * 2 * per_arm:,}"


def test_on_a_cpu_the_starts_of_stages_count_most_of_a_miniatures_time():
    (miniature,) = [path for path in TABLES if path.stem == "miniature"]
    *_, hours = describe_table(*load_table(miniature)).columns
    assert float(list(hours.cells)[-1].split()[0]) > 1, "some 70 stages of more than a minute"


def test_a_table_of_unknown_size_is_refused(spec):
    raw = yaml.safe_load(spec.read_text())
    with pytest.raises(BadInputError, match="the size of org/teacher is not known"):
        describe_table(*load_table(spec))
    raw["tasks"] = {"Chat": {"task.name": "chat"}}
    raw["blocks"][0]["options"] |= SIZES
    spec.write_text(yaml.safe_dump(raw))
    with pytest.raises(BadInputError, match="how many prompts chat has is not known"):
        describe_table(*load_table(spec))


STAGED = RECIPE | {
    "stages": {
        "dsft": {"training": {"method": "sft", "epochs": 1}},
        "preference": {"training": {"method": "dadpo", "epochs": 1}},
    }
}


def test_cells_share_the_stages_that_are_the_same(spec):
    raw = yaml.safe_load(spec.read_text())
    (spec.parent / "staged.yaml").write_text(yaml.safe_dump(STAGED, sort_keys=False))
    arms = ["dsft", "ddpo", "dadpo"]
    raw["blocks"].append({"student": "Staged", "recipe": "staged.yaml", "arms": arms})
    spec.write_text(yaml.safe_dump(raw, sort_keys=False))
    _, cells = load_table(spec)
    staged = [cell for cell in cells if (cell.student, cell.task) == ("Staged", "GSM8K")]
    assert [cell.seed for cell in staged] == [0, 0, 0, 1, 1, 1], "a seed is whole before the next"
    for first in (0, 3):
        dsft, ddpo, dadpo = (cell.stages for cell in staged[first : first + 3])
        assert len(dsft) == 1
        assert dsft[0] == ddpo[0] == dadpo[0]
        trained = str(RunFolder(storage.location(dsft[0].run.folder)).checkpoint(1))
        assert {ddpo[1].student.model, dadpo[1].student.model} == {trained}
        assert ddpo[1].run.folder != dadpo[1].run.folder
        assert ddpo[1].base_student == dsft[0].student
    assert staged[0].stages[0].run.folder != staged[3].stages[0].run.folder, "another seed"

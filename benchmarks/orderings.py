"""Which of the papers' orderings hold in a table, on the same problems, and how surely.

    python benchmarks/orderings.py configs/tables/miniature.yaml

For each "A over B": the share of test problems that A's student gets right less that of B's, over
all seeds, with a 95 % interval by the bootstrap over problems, students one by one and together.
That interval is of these students; how much another training would differ is seen from the runs
(a student with a seed) in which A is ahead.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import bootstrap

from evals.stage import answers_file
from evals.tables.figures import chosen_result, is_done
from evals.tables.spec import Cell, load_table

# Where SFT alone is compared with an arm that trains on after it, this is SFT for as many steps.
AS_LONG = {"Teacher, 30 % pruned": "Teacher, 30 % pruned, 60 steps"}
ORDERINGS = (
    ("diverse_cot_sft", "single_cot_sft"),
    ("mixed_policy_orpo", "diverse_cot_sft"),
    ("off_policy_orpo", "diverse_cot_sft"),
    ("off_policy_orpo", "off_policy_orpo_teacher_negatives"),
    ("mixed_policy_orpo", "off_policy_orpo"),
    ("off_policy_orpo", "on_policy_orpo"),
    ("mixed_policy_orpo", "on_policy_orpo"),
    ("ddpo", "dsft"),
    ("dadpo", "ddpo"),
    ("dadpo", "rdpo"),
    ("dadpo", "dsft"),
)


def right(cell: Cell) -> dict[str, bool]:
    """Whether the cell's student is right on each test problem."""
    path = answers_file(chosen_result(cell, cell.arm))
    table = pq.read_table(path.path, filesystem=path.fs, columns=["prompt_id", "verdict"])
    return {row["prompt_id"]: row["verdict"] == "right" for row in table.to_pylist()}


def differences(cells: list[Cell], better: str, worse: str, student: str) -> Iterator[list[float]]:
    """What the better arm has over the worse one on each problem, seed by seed: 1, 0 or -1."""
    of_arm = {(cell.student, cell.arm, cell.seed): cell for cell in cells}
    other = AS_LONG.get(student, student) if worse == "dsft" else student
    for seed in sorted({cell.seed for cell in cells}):
        if (student, better, seed) in of_arm and (other, worse, seed) in of_arm:
            ours, theirs = right(of_arm[student, better, seed]), right(of_arm[other, worse, seed])
            yield [float(ours[key]) - float(theirs[key]) for key in sorted(ours)]


def shown(runs: list[list[float]]) -> str:
    """Mean and interval, in points."""
    sample = 100 * np.concatenate(runs)
    interval = bootstrap((sample,), np.mean, method="percentile", rng=0).confidence_interval
    return f"{sample.mean():+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    spec, cells = load_table(parser.parse_args().table)
    done = [cell for cell in cells if is_done(cell)]
    students = [block.student for block in spec.blocks if block.student not in AS_LONG.values()]
    print("| A over B, points | " + " | ".join(students) + " | together | runs with A ahead |")
    print("|" + "---|" * (len(students) + 3))
    for better, worse in ORDERINGS:
        each = [list(differences(done, better, worse, student)) for student in students]
        together = [run for runs in each for run in runs]
        if together:
            texts = [shown(runs) if runs else "–" for runs in [*each, together]]
            texts.append(f"{sum(np.mean(run) > 0 for run in together)} of {len(together)}")
            names = " over ".join(name.replace("_", " ") for name in (better, worse))
            print(f"| {names} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()

"""What the quickstart teaches, over seeds, beside two arms with one choice changed.

    python benchmarks/quickstart_seeds.py --seeds 0 1 2 --out benchmarks/quickstart_seeds.md

The arms of a seed share their samples through the store, and the evaluations of base and teacher.
Runs that are there are reused, so that it goes on where it was stopped.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from cluster.run_folder import describe_environment
from evals.statistics import mean_and_standard_error

ROOT = Path(__file__).parents[1]
SHIPPED = "quickstart"
# The shipped recipe first, then what each other arm changes in it.
ARMS = {
    SHIPPED: (),
    "sft": ("training.method=sft",),
    "boxed": ("pairs.negatives=wrong",),
}
LABELS = {
    SHIPPED: "mixed-policy ORPO (as shipped)",
    "sft": "NLL alone (SFT)",
    "boxed": "ORPO, boxed negatives alone",
}


def run_arm(seed: int, arm: str, work: Path) -> Path:
    folder = work / f"{arm}_{seed}"
    if (folder / "report.html").exists():
        return folder
    for name in ("base_test", "teacher_test"):  # the same in every arm of a seed
        for file in (work / f"{SHIPPED}_{seed}" / "evals").glob(f"{name}.*"):
            (folder / "evals").mkdir(parents=True, exist_ok=True)
            if not (folder / "evals" / file.name).exists():
                shutil.copy(file, folder / "evals")
    options = [
        f"run.seed={seed}",
        f"run.folder={folder}",
        f"run.store={work / 'store'}",
        *ARMS[arm],
    ]
    started = time.monotonic()
    command = [sys.executable, "potstill.py", "run", "configs/quickstart.yaml", *options]
    subprocess.run(command, cwd=ROOT, check=True)
    print(f"{arm}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    return folder


def results(folder: Path) -> dict[str, dict]:
    files = (folder / "evals").glob("*test*.json")
    found = [json.loads(file.read_text()) for file in files]
    return {result["model"]: result for result in found}


def row(label: str, measured: list[dict]) -> str:
    def cell(field: str) -> str:
        values = [100 * one[field] for one in measured if one[field] is not None]
        if not values:
            return "–"
        mean, error = mean_and_standard_error(values)
        return f"{mean:.1f} ± {error:.1f}"

    each = ", ".join(f"{100 * one['accuracy']:.1f}" for one in measured)
    fields = " | ".join(cell(name) for name in ("accuracy", "unparsed", "accuracy_given_parsed"))
    return f"| {label} | {fields} | {each} |"


def report(by_arm: dict[str, list[Path]]) -> str:
    lines = [
        "| model | accuracy | unparsed | accuracy if parsed | accuracy of each seed |",
        "|---|---|---|---|---|",
    ]
    first = [results(folder) for folder in by_arm[SHIPPED]]
    lines += [row(name, [one[name] for one in first]) for name in ("base", "teacher")]
    for arm, folders in by_arm.items():
        found = [results(folder) for folder in folders]
        students = sorted(name for name in found[0] if name.startswith("student"))
        lines += [row(f"{LABELS[arm]}, {name}", [one[name] for one in found]) for name in students]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quickstart_seeds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "quickstart_seeds.md")
    options = parser.parse_args()
    work = options.work.absolute()
    by_arm = {arm: [run_arm(seed, arm, work) for seed in options.seeds] for arm in options.arms}
    environment = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    n = next(iter(results(by_arm[SHIPPED][0]).values()))["n"]
    options.out.write_text(
        f"# The quickstart over {len(options.seeds)} seeds\n\n"
        f"{date.today()}, commit {environment['commit']}, {versions}.\n\n"
        f"    python {' '.join(sys.argv)}\n\n"
        f"Percent, greedy, n = {n} test problems a seed; mean ± standard error over seeds.\n\n"
        f"{report(by_arm)}\n"
    )


if __name__ == "__main__":
    main()

"""How far our losses are from TRL's and Liger's on the same batch and the same model.

    python -m benchmarks.loss_peers --out benchmarks/loss_peers.md

Both sides start from token ids and a small model in float32, and end with a loss and its gradient
by all weights of the student. The peers' own code runs: benchmarks/peers/ has the calls.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import disable_progress_bars
from torch import Tensor

from benchmarks.peers import liger_losses, our_losses, trl_losses
from benchmarks.peers.batch import Batch, make_batch
from cluster.run_folder import describe_environment

SEEDS = range(5)
WEIGHT = 0.7  # ORPO's lambda
BETA, BETA1, BETA2 = 0.1, 0.1, 0.25
WEIGHTS = 1.3, 0.7  # KTO's, of desirable and undesirable answers
TRL, LIGER = "trl", "liger-kernel"

LossOf = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Comparison:
    loss: str  # and its mode, in the words of our configuration
    ours: LossOf
    peer: str
    how: str  # the peer's mode that means the same
    theirs: LossOf


def _orpo(scope: str, reduction: str) -> tuple[str, LossOf]:
    loss = partial(our_losses.orpo, weight=WEIGHT, scope=scope, reduction=reduction)
    return f"ORPO, nll_scope {scope}, nll_reduction {reduction}", loss


def _dadpo(name: str, beta1: float, beta2: float) -> tuple[str, LossOf]:
    return name, partial(our_losses.dadpo, beta1=beta1, beta2=beta2)


def _kto(name: str, weights: tuple[float, float]) -> tuple[str, LossOf]:
    return name, partial(our_losses.kto, beta=BETA, weights=weights)


def _kl(direction: str) -> tuple[str, LossOf]:
    return f"token KL, {direction}", partial(our_losses.kl_per_token, direction=direction)


COMPARISONS = [
    Comparison(
        *_orpo("full", "tokens"), TRL, "ORPOTrainer", partial(trl_losses.orpo, weight=WEIGHT)
    ),
    Comparison(
        *_orpo("full", "pairs"),
        TRL,
        "ORPOTrainer, mean over micro-batches of one pair",
        partial(trl_losses.orpo_one_by_one, weight=WEIGHT),
    ),
    Comparison(
        *_orpo("response", "tokens"),
        LIGER,
        "ORPO",
        partial(liger_losses.orpo, weight=WEIGHT, scope="response"),
    ),
    Comparison(
        *_orpo("full", "tokens"),
        LIGER,
        "ORPO with nll_target",
        partial(liger_losses.orpo, weight=WEIGHT, scope="full"),
    ),
    Comparison(
        *_orpo("response", "pairs"),
        LIGER,
        "ORPO, mean over batches of one pair",
        partial(liger_losses.orpo_one_by_one, weight=WEIGHT, scope="response"),
    ),
    Comparison(
        *_dadpo("dDPO (daDPO with beta2 = 0)", BETA, 0),
        TRL,
        "DPOTrainer, sigmoid",
        partial(trl_losses.dpo, beta=BETA),
    ),
    Comparison(
        *_dadpo("dDPO (daDPO with beta2 = 0)", BETA, 0),
        LIGER,
        "DPO, sigmoid",
        partial(liger_losses.dpo, beta=BETA),
    ),
    Comparison(
        *_dadpo("rDPO (daDPO with beta1 = 0)", 0, BETA2),
        TRL,
        "DPOTrainer, the teacher's sums as reference",
        partial(trl_losses.dpo_with_mixed_reference, beta1=0, beta2=BETA2),
    ),
    Comparison(
        *_dadpo("daDPO", BETA1, BETA2),
        TRL,
        "DPOTrainer, the mixed reference, beta1 + beta2",
        partial(trl_losses.dpo_with_mixed_reference, beta1=BETA1, beta2=BETA2),
    ),
    Comparison(
        *_kto("KTO, weights 1.3 and 0.7", WEIGHTS),
        TRL,
        "KTOTrainer, its own estimate of the KL",
        partial(trl_losses.kto, beta=BETA, weights=WEIGHTS),
    ),
    Comparison(
        *_kto("KTO", (1, 1)),
        LIGER,
        "KTO, given our estimate of the KL",
        partial(liger_losses.kto, beta=BETA),
    ),
    Comparison(
        *_kl("reverse"),
        TRL,
        "GKDTrainer, beta 1",
        partial(trl_losses.kl_per_token, direction="reverse"),
    ),
    Comparison(
        *_kl("forward"),
        TRL,
        "GKDTrainer, beta 0",
        partial(trl_losses.kl_per_token, direction="forward"),
    ),
]


@dataclass(frozen=True)
class Difference:
    """The largest over batches, and over all weights; and the largest gradient, for comparison."""

    value: float
    gradient: float
    largest_gradient: float


def compare(comparison: Comparison, seeds: Iterable[int] = SEEDS) -> Difference:
    values, gradients, sizes = [], [], []
    for seed in seeds:
        batch = make_batch(seed)
        weights = list(batch.student.parameters())
        losses = comparison.ours(batch), comparison.theirs(batch)
        values.append((losses[0] - losses[1]).abs())
        slopes = [torch.autograd.grad(loss, weights) for loss in losses]
        gradients += [(a - b).abs().max() for a, b in zip(*slopes, strict=True)]
        sizes += [slope.abs().max() for slope in slopes[0]]
    largest = (torch.stack(found).max().item() for found in (values, gradients, sizes))
    return Difference(*largest)


def table() -> str:
    lines = [
        "| loss | peer | difference of value | of gradient | largest gradient |",
        "|---|---|---|---|---|",
    ]
    for one in COMPARISONS:
        found = compare(one)
        lines.append(
            f"| {one.loss} | {one.peer}: {one.how} | {found.value:.1e} | {found.gradient:.1e} "
            f"| {found.largest_gradient:.2g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    disable_progress_bars()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", TRL, LIGER))
    text = (
        f"# Our losses beside TRL's and Liger's\n\n"
        f"{date.today()}, commit {describe_environment()['commit']}, {versions}.\n\n"
        f"    python -m benchmarks.loss_peers {' '.join(sys.argv[1:])}\n\n"
        f"Largest differences over {len(SEEDS)} batches of 4 pairs, and over all weights of a "
        f"Llama of 2 layers in float32.\n\n{table()}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()

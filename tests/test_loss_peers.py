"""Our losses beside the real code of TRL and Liger, from the same ids and models.

What differs between them is what the NLL is a mean of, in our words `nll_scope` and
`nll_reduction`. TRL's ORPO takes prompt and answer (full), and the mean over all tokens of what it
is given at once (tokens); with one pair a micro-batch that is the mean of each pair's mean (pairs).
Liger's ORPO takes the answer (response), with an `nll_target` the prompt too (full), and the mean
over the batch's tokens (tokens). All contrasts are means over pairs, KTO's over answers.
"""

import os
from itertools import pairwise

import pytest

from benchmarks.loss_peers import COMPARISONS, LIGER, SEEDS, TRL, compare
from benchmarks.peers.batch import make_batch
from benchmarks.peers.our_losses import kl_estimate

MODULES = {TRL: "trl", LIGER: "liger_kernel"}
TWO = SEEDS[1:3]


def _name(comparison):
    return f"{comparison.loss}, {comparison.peer} {comparison.how}"


@pytest.mark.parametrize("comparison", COMPARISONS, ids=_name)
def test_value_and_gradient_are_the_peers(comparison):
    if "CI" not in os.environ:  # where it must be there
        module = MODULES[comparison.peer]
        pytest.importorskip(module, reason=f"no {comparison.peer}: sh requirements/install.sh dev")
    found = compare(comparison, TWO)
    assert found.value < 1e-5
    assert found.gradient < 1e-5
    assert found.largest_gradient > 0.01, "nothing flows, so that nothing was compared"


def test_ktos_estimates_above_and_below_zero_are_both_among_the_compared():
    estimates = [kl_estimate(make_batch(seed)).item() for seed in TWO]
    assert min(estimates) < 0 < max(estimates)


def test_the_modes_that_are_compared_are_apart():
    batch = make_batch(TWO[0])
    values = {comparison.loss: comparison.ours(batch).item() for comparison in COMPARISONS}
    assert len(values) == 11
    assert min(after - before for before, after in pairwise(sorted(values.values()))) > 1e-3

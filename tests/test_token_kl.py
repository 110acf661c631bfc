"""Token-level KL of a student and a teacher, in both directions."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import kl_div, log_softmax

from training import divergence
from training.losses import position_kl, token_kl

DIRECTIONS = ["reverse", "forward"]


def logits(*shape, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)


def batch(rows=8, width=9, dtype=torch.float64):
    """Student and teacher logits, and a mask with another number of tokens in each row."""
    mask = torch.arange(width) < 1 + torch.arange(rows)[:, None]
    return logits(rows, width, 17, dtype=dtype), logits(rows, width, 17, seed=1, dtype=dtype), mask


def of_torch(student, teacher, direction):
    """torch's own KL of logits [N, V] at each position: [N]."""
    log_p, log_q = log_softmax(student, -1), log_softmax(teacher, -1)
    first, second = (log_q, log_p) if direction == "reverse" else (log_p, log_q)
    return kl_div(first, second, reduction="none", log_target=True).sum(-1)


def test_two_words_by_hand():
    # Student 1/2, 1/2; teacher 1/4, 3/4.
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[0, math.log(3)]], dtype=torch.float64)
    reverse = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    forward = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert position_kl(student, teacher).item() == pytest.approx(reverse, abs=1e-15)
    assert position_kl(student, teacher, "forward").item() == pytest.approx(forward, abs=1e-15)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradient_are_torchs_own(direction, dtype, accuracy):
    student, teacher = logits(50, 300, dtype=dtype), logits(50, 300, seed=1, dtype=dtype)
    student.requires_grad_()
    weights = torch.linspace(-1, 2, 50, dtype=dtype)
    found, expected = (
        position_kl(student, teacher, direction),
        of_torch(student, teacher, direction),
    )
    torch.testing.assert_close(found, expected, rtol=accuracy, atol=accuracy)
    gradients = [torch.autograd.grad((x * weights).sum(), student)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_value_is_that_of_torchs_distributions(direction):
    student, teacher = logits(5, 30), logits(5, 30, seed=1)
    first, second = (student, teacher) if direction == "reverse" else (teacher, student)
    expected = kl_divergence(Categorical(logits=first), Categorical(logits=second))
    torch.testing.assert_close(position_kl(student, teacher, direction), expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_gradient_is_that_of_finite_differences_and_the_students_alone(direction):
    student, teacher, mask = batch(rows=3, width=4)
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_kl(x, teacher, mask, direction), student)
    token_kl(student, teacher, mask, direction).sum().backward()
    assert teacher.grad is None
    assert student.grad[mask].abs().max() > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_row_is_the_mean_of_its_tokens(direction):
    student, teacher, mask = batch()
    expected = [
        of_torch(student[row, :tokens], teacher[row, :tokens], direction).mean()
        for row, tokens in enumerate(mask.sum(-1).tolist())
    ]
    torch.testing.assert_close(token_kl(student, teacher, mask, direction), torch.stack(expected))


def test_a_row_without_tokens_is_zero_and_sends_nothing_back():
    student, teacher, mask = batch(rows=2)
    student.requires_grad_()
    for masked in (mask & torch.tensor([[True], [False]]), torch.zeros_like(mask)):
        found = token_kl(student, teacher, masked)
        assert found[1].item() == 0
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert not gradient[~masked].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_changes_nothing_whatever_stands_in_it(direction, dtype):
    student, teacher, mask = batch(dtype=dtype)
    padded = [torch.full((8, 14, 17), math.nan, dtype=dtype) for _ in range(2)]
    for wide, values in zip(padded, (student, teacher), strict=True):
        wide[:, :9] = torch.where(mask[..., None], values, math.nan)
    wide_mask = torch.nn.functional.pad(mask, (0, 5))
    student.requires_grad_()
    padded[0].requires_grad_()
    found = token_kl(*padded, wide_mask, direction)
    expected = token_kl(student, teacher, mask, direction)
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    assert torch.equal(padded[0].grad[:, :9], student.grad)
    assert not padded[0].grad[:, 9:].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sizes", [(17, 23), (23, 17)])
def test_padded_vocabularies_are_cut_to_the_ids_that_they_share(direction, sizes):
    student, teacher = (logits(6, size, seed=size) for size in sizes)
    student.requires_grad_()
    found = position_kl(student, teacher, direction)
    expected = of_torch(student[:, :17], teacher[:, :17], direction)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.shape == student.shape
    assert gradient[:, :17].abs().min() > 0
    assert not gradient[:, 17:].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_parts_that_positions_are_taken_in_do_not_matter(direction, monkeypatch):
    student, teacher = logits(10, 30).requires_grad_(), logits(10, 30, seed=1)

    def result():
        value = position_kl(student, teacher, direction)
        return value, torch.autograd.grad(value.sum(), student)[0]

    whole = result()
    monkeypatch.setattr(divergence, "_POSITIONS_AT_ONCE", 3)
    for part, expected in zip(result(), whole, strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bf16_logits_are_widened_and_get_their_gradient_in_bf16(direction):
    student, teacher = logits(20, 300).bfloat16(), logits(20, 300, seed=1).bfloat16()
    student.requires_grad_()
    found = position_kl(student, teacher, direction)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.sum(), student)
    exact = student.detach().double().requires_grad_()
    expected = of_torch(exact, teacher.double(), direction)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (exact_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_models_have_no_divergence_and_no_gradient(direction):
    student = logits(5, 30, dtype=torch.float32).requires_grad_()
    found = position_kl(student, student.detach().clone(), direction)
    found.sum().backward()
    assert found.tolist() == pytest.approx([0.0] * 5, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_are_sure_of_different_words_stay_finite(direction, dtype):
    student = torch.tensor([[1e4, 0.0, -1e4]], dtype=dtype, requires_grad=True)
    found = position_kl(student, torch.tensor([[0.0, 1e4, -1e4]], dtype=dtype), direction)
    found.sum().backward()
    assert found.item() == pytest.approx(1e4, rel=0.01)
    assert torch.isfinite(student.grad).all()


def test_nothing_of_the_logits_size_is_kept_but_the_gradient():
    student, teacher = logits(7, 30).requires_grad_(), logits(7, 30, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        position_kl(student, teacher)
    assert kept == [(7, 30)]


def test_a_teacher_that_could_learn_makes_no_graph():
    assert not position_kl(logits(2, 5), logits(2, 5, seed=1).requires_grad_()).requires_grad


def test_a_direction_is_one_of_two():
    with pytest.raises(ValueError, match="backward"):
        position_kl(logits(1, 3), logits(1, 3), "backward")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_accumulation_changes_nothing(direction):
    student, teacher, mask = batch(rows=8)

    def gradient(micro_batch):
        values = student.clone().requires_grad_()
        for rows in torch.arange(8).split(micro_batch):
            width = int(mask[rows].sum(-1).max())  # no more padding than the part needs
            part = [x[rows, :width] for x in (values, teacher, mask)]
            (token_kl(*part, direction).sum() / 8).backward()
        return values.grad

    whole = gradient(8)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(gradient(2), whole, rtol=0, atol=1e-9)

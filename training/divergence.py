"""Token-level KL between a student and a teacher of one tokenizer.

Vocabularies may be padded to different sizes: both are cut to the ids that they share, and each is
a distribution over these. Probabilities exist for some positions at a time; of the logits' size,
only the gradient is kept.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.precision import loss_dtype

Direction = Literal["reverse", "forward"]

# 64 positions of a vocabulary of 152k take 40 MB a tensor, and keep a GPU busy.
_POSITIONS_AT_ONCE = 64


def token_kl(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, direction: Direction = "reverse"
) -> Tensor:
    """KL per token (nats), the mean over each row's positions. [B, T, V], [B, T, V'] -> [B].

    `mask` [B, T] is true where a position counts. What stands elsewhere, even NaN, has no part in
    value or gradient. A row where nothing counts is 0. The rest is as in `position_kl`.
    """
    mask = mask.bool()
    found = position_kl(student_logits[mask], teacher_logits[mask], direction)
    sums = found.new_zeros(mask.shape[0]).index_add(0, mask.nonzero()[:, 0], found)
    return sums / mask.sum(-1).clamp(min=1)


def position_kl(
    student_logits: Tensor, teacher_logits: Tensor, direction: Direction = "reverse"
) -> Tensor:
    """KL (nats) at each position, of finite logits. [N, V], [N, V'] -> [N].

    "reverse" is KL(student || teacher), the +KL of arXiv:2506.15717; "forward" is
    KL(teacher || student). Neither is below 0 but by rounding. The gradient reaches the student
    alone, to the first order.
    """
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction={direction!r}: expected one of {', '.join(_DIRECTIONS)}")
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = student_logits[..., :shared], teacher_logits[..., :shared]
    return _Divergence.apply(student, teacher.detach(), _DIRECTIONS[direction])


def _reverse(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q), and its derivative by p's logits."""
    p, log_ratio = log_p.exp(), log_p - log_q
    value = (p * log_ratio).sum(-1)
    return value, p * (log_ratio - value[:, None])


def _forward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p), and its derivative by p's logits."""
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), log_p.exp() - q


_Divide = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_DIRECTIONS: dict[str, _Divide] = {"reverse": _reverse, "forward": _forward}


class _Divergence(torch.autograd.Function):
    """Finds the gradient along with the value, so that no probabilities wait for `backward`."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, divergence: _Divide) -> Tensor:
        dtype = loss_dtype(student, teacher)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        values = []
        for start in range(0, max(len(student), 1), _POSITIONS_AT_ONCE):
            part = slice(start, start + _POSITIONS_AT_ONCE)
            log_p = torch.log_softmax(student[part], -1, dtype=dtype)
            log_q = torch.log_softmax(teacher[part], -1, dtype=dtype)
            value, slope = divergence(log_p, log_q)
            values.append(value)
            if gradient is not None:
                gradient[part] = slope
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, flowing: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * flowing[:, None], None, None

"""What goes together in a layer, what it is worth, and its cut: torch-pruning's dependency groups.

A layer is traced in two parts, attention and MLP, so that nothing of the residual stream is in a
group. torch-pruning's own pruner for attention cuts query heads alone where key-value heads are
shared; here a *group* of heads, a key-value head with its query heads, goes as a whole.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from cluster.progress import progress
from training.calibration import negative_log_likelihood
from training.widths import Widths

# A channel's |weight * gradient|, summed over all weights of its dependency group: LLM-Pruner's
# element-wise importance, arXiv:2305.11627 eq. 5 without its second-order term.
_taylor = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None, bias=True)


def layers_of(model: Any) -> Sequence[Any]:
    """The transformer layers of a causal language model."""
    return model.get_decoder().layers


def weigh(model: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """What each group of heads is worth on texts, given as token ids: [groups] for each layer.

    A query head's worth is |d NLL / d gate|, summed over the texts, of a gate that its output
    passes: the first-order change of a text's negative log-likelihood where the head goes
    (arXiv:1905.10650 eq. 2). A group's is the sum of its heads'. Leaves in the MLPs' weights the
    gradients of the NLL of all texts.
    """
    attentions, config = [layer.self_attn for layer in layers_of(model)], model.config
    worth = [torch.zeros(config.num_attention_heads) for _ in attentions]
    _require_gradients(model)
    with progress("weighing", len(texts)) as bar:
        for ids in texts:
            negative_log_likelihood(model, ids).backward()
            for attention, heads in zip(attentions, worth, strict=True):
                heads += _gate_gradients(attention.o_proj.weight, len(heads)).abs()
                attention.o_proj.weight.grad = None
            bar.advance()
    return [heads.view(config.num_key_value_heads, -1).sum(1) for heads in worth]


def prune_layer(layer: Any, kept: Widths, head_worth: Tensor) -> None:
    """Cut the least important of a layer in place, down to these widths.

    `head_worth` [groups] is what `weigh` found; the MLP's weights still hold their gradients.
    """
    if kept.groups < len(head_worth):
        _prune_heads(layer.self_attn, head_worth, len(head_worth) - kept.groups)
    channels = layer.mlp.down_proj.in_features
    if kept.channels < channels:
        worth = _taylor(_channel_group(layer.mlp, list(range(channels))))
        _channel_group(layer.mlp, _least(worth, channels - kept.channels)).prune()


def _require_gradients(model: Any) -> None:
    model.requires_grad_(False)
    for layer in layers_of(model):
        layer.mlp.requires_grad_(True)
        layer.self_attn.o_proj.weight.requires_grad_(True)


def _gate_gradients(output: nn.Parameter, heads: int) -> Tensor:
    """d NLL / d gate [heads]: the sum of weight * gradient over the columns that a head feeds."""
    assert output.grad is not None
    return (output * output.grad).detach().sum(0).view(heads, -1).sum(1)


def _least(worth: Tensor, count: int) -> list[int]:
    """The indices of the `count` lowest, in ascending order; of equal ones the first."""
    return sorted(worth.argsort(stable=True)[:count].tolist())


def _prune_heads(attention: Any, worth: Tensor, count: int) -> None:
    size = attention.o_proj.in_features // len(worth)
    lost = [
        channel
        for group in _least(worth, count)
        for channel in range(group * size, (group + 1) * size)
    ]
    _head_group(attention, lost).prune()


def _channel_group(mlp: Any, channels: list[int]) -> Any:
    graph = tp.DependencyGraph().build_dependency(mlp, [_example(mlp.up_proj)], verbose=False)
    return graph.get_pruning_group(mlp.down_proj, tp.prune_linear_in_channels, channels)


def _head_group(attention: Any, channels: list[int]) -> Any:
    graph = tp.DependencyGraph().build_dependency(
        attention, _example(attention.q_proj), forward_fn=_attend, verbose=False
    )
    group = graph.get_pruning_group(attention.o_proj, tp.prune_linear_in_channels, channels)
    for index, (dependency, own) in enumerate(group):
        # It names a channel of shared keys and values once for each query head, and then counts
        # too few that are left.
        group[index] = type(group[index])(dependency, sorted(set(own)))
    return group


def _attend(attention: Any, hidden: Tensor) -> Tensor:
    """Attention as far as it ties channels together.

    Rotary positions, which tie none of two heads, are left out: torch-pruning takes their halves
    for channels, and may then look for the end of a group for ever.
    """
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    queries, keys, values = (part(hidden).view(shape).transpose(1, 2) for part in projections)
    keys, values = (_repeat(part, attention.num_key_value_groups) for part in (keys, values))
    seen = (queries @ keys.transpose(2, 3)).softmax(-1) @ values
    return attention.o_proj(seen.transpose(1, 2).reshape(*hidden.shape[:-1], -1))


def _repeat(heads: Tensor, times: int) -> Tensor:
    """[batch, heads, tokens, size] with each head `times` times in a row."""
    if times == 1:
        return heads
    batch, count, tokens, size = heads.shape
    # In this form torch-pruning knows it for shared keys and values.
    repeated = heads[:, :, None].expand(batch, count, times, tokens, size)
    return repeated.reshape(batch, count * times, tokens, size)


def _example(linear: nn.Linear) -> Tensor:
    # Tracing follows autograd, and would not see a frozen layer behind an input without gradient.
    return torch.zeros(1, 2, linear.in_features, dtype=linear.weight.dtype, requires_grad=True)

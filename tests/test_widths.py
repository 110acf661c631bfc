"""The widths that pruning leaves meet the ratio, and are such as engines take."""

import pytest

from cluster.errors import BadInputError
from training.prunable import Prunable
from training.widths import Widths, check_ratio, choose_widths, removed_share


def llama_shape(parameters, hidden, layers, groups, queries, size, channels, prunes_heads=True):
    return Prunable(
        parameters=parameters,
        hidden_size=hidden,
        groups=groups,
        queries=queries,
        group_parameters=layers * hidden * size * (2 * queries + 2),
        channels=channels,
        channel_parameters=layers * hidden * 3,
        prunes_heads=prunes_heads,
    )


MODELS = {
    "SmolLM2-135M": llama_shape(134_515_008, 576, 30, 3, 3, 64, 1536),
    "TinyLlama-1.1B": llama_shape(1_100_048_384, 2048, 22, 4, 8, 64, 5632),
    "Vicuna-7B": llama_shape(6_738_415_616, 4096, 32, 32, 1, 128, 11008),
    "InternLM2.5-1.8B": llama_shape(1_889_110_016, 2048, 24, 8, 2, 128, 8192),
    "Gemma-3-270m": llama_shape(268_098_176, 640, 18, 1, 4, 256, 2048),
    "Qwen2.5-0.5B": llama_shape(494_032_768, 896, 24, 2, 7, 64, 4864, prunes_heads=False),
}


@pytest.mark.parametrize(
    ("name", "ratio", "kept"),
    [
        # 26,903,002 parameters of 51,840 a channel are 519 channels; a group is 8,847,360.
        ("SmolLM2-135M", 0.2, Widths(3, 1024)),
        # (67,257,504 - 8,847,360) / 51,840 is 1127 of 1536 channels beside 1 of 3 groups.
        ("SmolLM2-135M", 0.5, Widths(2, 416)),
        # 15 of 32 heads would be the even share, but transformers takes only divisors of 4096.
        ("Vicuna-7B", 0.5, Widths(16, 5168)),
        ("Vicuna-7B", 0.2, Widths(32, 7584)),
        ("Qwen2.5-0.5B", 0.5, Widths(2, 1040)),
    ],
)
def test_known_models_get_the_widths_worked_out_by_hand(name, ratio, kept):
    assert choose_widths(MODELS[name], ratio) == kept


@pytest.mark.parametrize("name", MODELS)
def test_every_ratio_up_to_the_largest_is_met(name):
    model, reached = MODELS[name], 0
    for ratio in [point / 200 for point in range(1, 200)]:
        try:
            kept = choose_widths(model, ratio)
        except BadInputError:
            break
        reached = ratio
        assert abs(removed_share(model, kept) - ratio) <= 0.01
        assert kept.channels % 16 == 0
        assert model.hidden_size % (kept.groups * model.queries) == 0
        assert kept.groups / model.groups >= kept.channels / model.channels
    groups = 1 if model.prunes_heads else model.groups
    assert reached >= removed_share(model, Widths(groups, 16)) - 0.01
    with pytest.raises(BadInputError, match="the largest is"):
        choose_widths(model, reached + 0.02)


def test_heads_stay_where_they_may_not_go():
    model = MODELS["Qwen2.5-0.5B"]
    assert {choose_widths(model, point / 100).groups for point in range(1, 60)} == {model.groups}


def test_the_largest_ratio_is_named():
    model = MODELS["Qwen2.5-0.5B"]
    # 4848 of 4864 channels of 64,512 parameters each.
    assert removed_share(model, Widths(2, 16)) == pytest.approx(0.6331, abs=1e-4)
    with pytest.raises(BadInputError, match=r"ratio=0\.7 .* from MLP channels: .* is 0\.6331"):
        choose_widths(model, 0.7)


def test_a_small_ratio_still_prunes_something():
    for model in MODELS.values():
        assert choose_widths(model, 0.0001) != Widths(model.groups, model.channels)


def test_a_tiny_model_gets_narrower_steps_rather_than_another_ratio():
    model = llama_shape(100_000, 64, 2, 2, 2, 32, 128)
    # A channel is 0.384 % of it, so that sixteen would be steps of six points.
    kept = choose_widths(model, 0.11)
    assert abs(removed_share(model, kept) - 0.11) <= 0.01
    assert kept.channels % 16 != 0


@pytest.mark.parametrize("ratio", [0, 1, -0.2, 20, float("nan")])
def test_what_is_no_share_is_refused(ratio):
    with pytest.raises(BadInputError, match="above 0 and below 1"):
        check_ratio(ratio)


def test_heads_are_not_pruned_alone_for_the_sake_of_a_round_width():
    model = llama_shape(150_000, 64, 2, 4, 1, 16, 128)
    # Two of four groups are 10.9 % beside all 128 channels; 88 channels are no multiple of 16.
    assert choose_widths(model, 0.1) == Widths(4, 88)


def test_where_channels_cannot_give_more_the_shares_are_as_even_as_they_can_be():
    model = llama_shape(230_000, 64, 2, 4, 1, 32, 128)
    # All but 16 channels are 18.7 %. One group of four with all channels would come near, too.
    assert choose_widths(model, 0.215) == Widths(2, 80)

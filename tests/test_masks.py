from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from sparse_lth.masks import (
    block_l1_unstructured,
    block_means,
    common_rate,
    densities_after,
    density,
    erk_densities,
    expand,
    highest_masks,
    keep_highest,
)
from sparse_lth.program.config import RunConfig
from sparse_lth.program.models import MODELS
from sparse_lth.weights import weight_layers


def test_block_scores_are_means_without_the_padding():
    weight = torch.tensor([[1.0, -3.0, 5.0], [0.0, 4.0, -7.0], [2.0, 2.0, 9.0]])
    expected = torch.tensor([[2.0, 6.0], [2.0, 9.0]])
    assert torch.equal(block_means(weight.abs(), (2, 2)), expected)


def test_keep_highest_breaks_ties_by_position():
    kept = keep_highest(torch.tensor([[1.0, 2.0], [1.0, 1.0]]), 2)
    assert kept.tolist() == [[True, True], [False, False]]


def test_expand_covers_whole_blocks_of_a_convolution():
    mask = expand(torch.tensor([[True, False]]), (2, 2), torch.Size([2, 1, 1, 3]))
    assert mask.tolist() == [[[[True, True, False]]]] * 2


def _all_kept(weights):
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}


def magnitude_masks(weights, *settings, **scope):
    return highest_masks({name: w.abs() for name, w in weights.items()}, *settings, **scope)


@pytest.mark.parametrize("blocksize", [(1, 1), (4, 4), (3, 5)])
def test_counts_are_exact_when_every_score_ties(blocksize):
    weights = {"a": torch.ones(17, 31), "b": -torch.ones(10, 17)}
    masks = magnitude_masks(weights, _all_kept(weights), {"a": 0.3, "b": 0.7}, blocksize)
    block, counts = blocksize[0] * blocksize[1], {}
    for name, share in (("a", 0.3), ("b", 0.7)):
        blocks = block_means(masks[name].float(), blocksize)
        assert ((blocks == 0) | (blocks == 1)).all()
        counts[name] = int(masks[name].sum()), share * masks[name].numel()
        assert abs(counts[name][0] - counts[name][1]) <= block
    kept, wanted = (sum(pair) for pair in zip(*counts.values(), strict=True))
    assert abs(kept - wanted) <= block / 2
    if block == 1:
        assert [kept for kept, _ in counts.values()] == [round(w) for _, w in counts.values()]


def test_global_scope_lets_layers_compete_for_an_exact_total():
    weights = {"small": torch.full((10, 10), 0.1), "large": torch.full((10, 10), 1.0)}
    masks = magnitude_masks(
        weights, _all_kept(weights), {"small": 0.5, "large": 0.5}, scope="global"
    )
    assert (int(masks["small"].sum()), int(masks["large"].sum())) == (0, 100)
    masks = magnitude_masks(weights, masks, {"small": 0.2, "large": 0.2}, scope="global")
    assert (int(masks["small"].sum()), int(masks["large"].sum())) == (0, 40)


def test_what_is_pruned_stays_pruned_even_where_it_is_large():
    weights = {"a": torch.tensor([[9.0, 1.0, 2.0, 3.0]])}
    masks = {"a": torch.tensor([[False, True, True, True]])}
    after = magnitude_masks(weights, masks, {"a": 0.5})
    assert after["a"].tolist() == [[False, False, True, True]]
    assert masks["a"].tolist() == [[False, True, True, True]]  # the old mask is not edited


def test_the_papers_ladder_by_count():
    rounds = 15
    left = (265_200 * 0.8**rounds + 1000 * 0.9**rounds) / 266_200
    config = RunConfig(prune_pc=1 - left, prune_rounds=rounds)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(layer.weight.shape, generator=generator)
        for name, layer in weight_layers(MODELS["lenet-300-100"].empty()).items()
    }
    schedule = config.search(MODELS["lenet-300-100"].new(generator)).schedule
    masks = _all_kept(weights)
    assert sum(m.numel() for m in masks.values()) == 266_200
    ladder = {}
    for round in range(1, rounds + 1):
        masks = magnitude_masks(weights, masks, schedule[round - 1])
        hidden = (235_200, 30_000)
        expected = [*(0.8**round * n for n in hidden), 0.9**round * 1000]
        counts = [int(m.sum()) for m in masks.values()]
        assert all(abs(n - e) <= 1 for n, e in zip(counts, expected, strict=True))
        assert sum(counts) == _round(sum(expected))
        ladder[round] = f"{density(masks):.1%}"
    assert [ladder[r] for r in (3, 7, 9, 15)] == ["51.3%", "21.1%", "13.5%", "3.6%"]


def _round(value):
    return int(value + 0.5)


def test_the_output_layer_goes_at_half_the_rate_and_stays_dense_where_blocks_do_not_fit():
    def first(**settings):
        config = RunConfig(prune_pc=0.2, **settings)
        return config.search(MODELS[config.model].fresh())

    densities = first(prune_rounds=1).schedule[0]
    assert 1 - densities["fc3"] == pytest.approx((1 - densities["fc1"]) / 2)
    assert densities["fc1"] == densities["fc2"] < 0.8 < densities["fc3"]
    for name in ("fc1", "fc3"):
        assert first(prune_rounds=1, scope="global").schedule[0][name] == pytest.approx(0.8)
    assert first(prune_rounds=1, scope="erk").schedule[0]["fc3"] == 1
    assert set(first(blocksize=(16, 16)).masks) == {"fc1", "fc2"}
    convolutional = first(model="lenet-5", blocksize=(8, 4))
    assert set(convolutional.masks) == {"conv2", "fc1", "fc2", "fc3"}
    assert "blocks of at most (6, 25) to fit conv1, got (8, 4)" in convolutional.dense["conv1"]
    dense = first(blocksize=(128, 16)).dense
    assert "blocks of at most (100, 300) to fit fc2, got (128, 16)" in dense["fc2"]


@pytest.mark.parametrize("rates", [{}, {"head": 0.5}, {"head": 0.1, "body": 0.9}])
def test_the_common_rate_leaves_what_was_asked_for(rates):
    sizes = {"body": 9000, "head": 1000}
    for asked in (0.3, 0.5, 0.99):
        rate = common_rate(sizes, asked, 4, rates)
        left = densities_after(sizes, rate, 4, rates)
        assert sum(left[n] * sizes[n] for n in sizes) == pytest.approx(10_000 * asked)
    with pytest.raises(ValueError, match=r"a density of at least 0\.066, or more rounds"):
        common_rate(sizes, 0.01, 4, {"head": 0.1})


def test_erk_densities_of_lenet():
    shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    densities = erk_densities(shapes, 0.1)  # fc3 whole: 25,620 weights are left for 1084 : 400
    assert densities == pytest.approx({"fc1": 0.079572, "fc2": 0.230189, "fc3": 1.0}, rel=1e-4)


@settings(deadline=None)
@given(
    shapes=st.dictionaries(
        st.integers(), st.lists(st.integers(1, 500), min_size=2, max_size=4), min_size=1
    ),
    density=st.floats(1e-3, 0.999),
)
def test_erk_keeps_what_was_asked_for_in_proportion_to_the_sizes(shapes, density):
    densities = erk_densities(shapes, density)
    total = sum(map(prod, shapes.values()))
    kept = {name: densities[name] * prod(shape) for name, shape in shapes.items()}
    assert sum(kept.values()) == pytest.approx(density * total)
    factor = max(kept[name] / sum(shape) for name, shape in shapes.items())
    for name, shape in shapes.items():
        assert 0 < densities[name] <= 1
        assert densities[name] == pytest.approx(min(1, factor * sum(shape) / prod(shape)))
    more = erk_densities(shapes, density + (1 - density) / 2)
    assert all(more[name] >= densities[name] * (1 - 1e-12) for name in shapes)


@settings(deadline=None, max_examples=50)
@given(
    grids=st.lists(st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1, max_size=4),
    blocksize=st.sampled_from([(1, 1), (2, 3), (4, 1)]),
    scope=st.sampled_from(["layerwise", "erk", "global"]),
    density=st.floats(0.05, 0.99),
    seed=st.integers(0, 99),
)
def test_blocks_that_divide_the_layers_keep_what_was_asked_for(
    grids, blocksize, scope, density, seed
):
    R, C = blocksize
    shapes = {n: (R * rows, C * cols) for n, (rows, cols) in enumerate(grids)}
    total, block = sum(map(prod, shapes.values())), R * C
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    spread = erk_densities(shapes, density) if scope == "erk" else dict.fromkeys(shapes, density)
    assume(all(share * prod(shapes[name]) >= block for name, share in spread.items()))
    torch.manual_seed(seed)
    scores = {name: torch.randn(shape) for name, shape in shapes.items()}
    after = highest_masks(scores, masks, spread, blocksize, scope)
    kept = {name: int(mask.sum()) for name, mask in after.items()}
    assert abs(sum(kept.values()) - density * total) <= block / 2 * (1 + 1e-9)
    for name, share in spread.items():
        if scope != "global":
            assert abs(kept[name] - share * prod(shapes[name])) <= block * (1 + 1e-9)
        if share == 1:
            assert after[name].all()


def test_half_a_weight_counts_as_one():
    weights = {"a": torch.ones(1, 5)}
    assert int(highest_masks(weights, _all_kept(weights), {"a": 0.5})["a"].sum()) == 3


def test_weights_that_are_not_finite_are_refused_by_name():
    weights = {"a": torch.tensor([[1.0, float("nan")]])}
    with pytest.raises(ValueError, match="finite scores for a: did its training diverge"):
        magnitude_masks(weights, _all_kept(weights), {"a": 0.5})


def test_block_pruning_works_on_a_users_own_model():
    layer = nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1024.0).view(32, 32))
    block_l1_unstructured(layer, "weight", 0.5, (16, 16))
    assert torch.equal(layer.weight_mask[::16, ::16], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    block_l1_unstructured(layer, "weight", 1, (16, 16))  # one of the blocks that are left
    assert torch.equal(layer.weight_mask[::16, ::16], torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert prune.is_pruned(layer)
    prune.remove(layer, "weight")
    assert int((layer.weight != 0).sum()) == 256
    with pytest.raises(ValueError, match=r"fraction up to 1\.0, got 1\.5"):
        block_l1_unstructured(layer, "weight", 1.5)
    with pytest.raises(ValueError, match="at most 4 blocks alive, got 5"):
        block_l1_unstructured(layer, "weight", 5)

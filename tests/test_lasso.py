"""The group lasso on blocks, held to its formula, and what the search does with it."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from sparse_lth import Search, find_ticket, sparsify_
from sparse_lth.lasso import BlockLasso
from sparse_lth.masks import expand
from sparse_lth.weights import read, snapshot


def by_the_formula(weight, blocksize, strength, lr):
    """Block by block, in float64."""
    shrunk = weight.double().flatten(1).clone()
    for row in range(0, shrunk.shape[0], blocksize[0]):
        for col in range(0, shrunk.shape[1], blocksize[1]):
            block = shrunk[row : row + blocksize[0], col : col + blocksize[1]]
            norm = math.sqrt(sum(x * x for x in block.flatten().tolist()))
            limit = lr * strength * math.sqrt(block.numel())
            block *= max(0.0, 1 - limit / norm) if norm else 0.0
    return shrunk.view(weight.shape)


def without_gradients(model, lr=0.1):
    """An optimizer whose steps change nothing by themselves."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.SGD(model.parameters(), lr)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(7, 9), (16, 16), (5, 33), (1, 1)]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["dense", "masked", "sparse", "convolution"]),
    st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    st.sampled_from([0.0, 0.1, torch.tensor(0.1)]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_every_block_shrinks_as_the_formula_says(shape, blocksize, kind, strength, lr, dtype, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0])
    if kind == "convolution":
        layer = nn.Conv2d(shape[1], shape[0], 3).to(memory_format=torch.channels_last)
    model = nn.Sequential(layer).to(dtype)
    matrix = layer.weight.flatten(1).shape
    grid = [-(-size // block) for size, block in zip(matrix, blocksize, strict=True)]
    kept = torch.rand(grid) < 0.6
    kept[0, 0] = False  # there is an empty block, and there is another
    assume(kept.any() or kind in ("dense", "convolution"))
    mask = expand(kept, blocksize, layer.weight.shape)
    if kind in ("masked", "sparse"):
        prune.custom_from_mask(layer, "weight", mask)
    if kind == "sparse":
        sparsify_(model, blocksize, max_density=1.0)
    before = read(model)["0.weight"].clone()
    optimizer = without_gradients(model, lr)
    optimizer.register_step_post_hook(BlockLasso(model, ["0"], blocksize, strength))
    optimizer.step()
    after = read(model)["0.weight"]
    expected = by_the_formula(before, blocksize, strength, float(lr))
    # 1 - limit / norm is off by a few roundings of its dtype, of which a norm of at most 81
    # squares has no more than 9, and then it is rounded once in the dtype of the weight
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if isinstance(lr, torch.Tensor):
        wide = torch.finfo(torch.float32).eps
    error = 16 * wide + torch.finfo(dtype).eps
    assert ((after.double() - expected).abs() <= error * before.double().abs()).all()


@pytest.mark.parametrize("kind", ["dense", "masked", "sparse"])
def test_a_block_that_is_0_stays_0_and_no_strength_changes_no_bit(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight[:16] = 0.0
        model[0].weight[16, 0] = -0.0
    if kind != "dense":
        mask = torch.ones(32, 32)
        mask[:16, :16] = 0
        prune.custom_from_mask(model[0], "weight", mask)
    if kind == "sparse":
        sparsify_(model, (16, 16), max_density=1.0)
    before = snapshot(model)["0.weight"]
    for strength in (0.0, 0.1, 1e9):
        optimizer = without_gradients(model)
        optimizer.register_step_post_hook(BlockLasso(model, ["0"], (16, 16), strength))
        optimizer.step()
        after = snapshot(model)["0.weight"]
        assert not after[:16].any()
        if not strength:
            assert torch.equal(after.view(torch.int32), before.view(torch.int32))
    assert not after.any()


def test_only_what_the_optimizer_steps_is_shrunk():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    before = snapshot(model)
    optimizer = without_gradients(model[:2])
    model[1].weight.grad = None
    lasso = BlockLasso(model, ["0", "1", "2"], (4, 4), 0.1)
    optimizer.register_step_post_hook(lasso)
    assert not lasso.stepped
    optimizer.step()
    assert lasso.stepped
    changed = {name for name, value in snapshot(model).items() if not value.equal(before[name])}
    assert changed == {"0.weight"}


def one_step(model):
    without_gradients(model).step()


def test_the_search_shrinks_blocks_in_every_round_between_the_dense_one_and_the_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    search = Search(model, 0.3, 2, (8, 8), rewind="weights", block_lasso=0.2)
    for round in search:
        before = snapshot(model)
        one_step(model)
        for name, value in snapshot(model).items():
            expected = before[name].double()
            if round == 1 and name.endswith("weight"):
                expected = by_the_formula(before[name], (8, 8), 0.2, 0.1)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    assert search.ticket().settings["block_lasso"] == 0.2
    before = snapshot(model)
    one_step(model)
    assert all(value.equal(before[name]) for name, value in snapshot(model).items())


def test_weights_that_a_criterion_prunes_inside_a_block_count_in_no_norm():
    def upper(weights, masks, densities):
        return {name: torch.ones_like(mask).triu(1) for name, mask in masks.items()}

    model = nn.Sequential(nn.Linear(16, 16))
    search = Search(model, 0.5, 2, (8, 8), criterion=upper, block_lasso=0.2)
    for _ in zip(range(2), search, strict=False):
        before = snapshot(model)["0.weight"]
        one_step(model)
        after = snapshot(model)["0.weight"].double()
    expected = by_the_formula(before, (8, 8), 0.2, 0.1)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7)


def test_a_loop_that_ends_early_leaves_no_lasso_behind():
    model = nn.Sequential(nn.Linear(16, 16))
    for _ in zip(range(2), Search(model, 0.5, 2, (8, 8), block_lasso=0.2), strict=False):
        pass  # round 1, where it holds, is the last of the loop
    before = snapshot(model)
    one_step(model)
    assert snapshot(model)["0.weight"].equal(before["0.weight"])


def test_training_that_the_lasso_cannot_see_is_an_error():
    def by_hand(model):
        with torch.no_grad():
            model[0].weight.mul_(0.9)

    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"steps of a torch\.optim optimizer .* none in round 1"):
        find_ticket(model, by_hand, 0.5, 2, (8, 8), block_lasso=0.2)


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ({}, ["every weight and bias, to what it was when round 0 began."]),
        ({"rewind": "weights"}, ["Nothing was rewound", "2 rounds of training made this"]),
        (
            {"rewind": "weights", "block_lasso": 0.2},
            [
                "Nothing was rewound",
                "group lasso of 0.2",
                "in every round between the dense one and the last",
            ],
        ),
    ],
)
def test_the_ticket_says_what_was_rewound(arguments, texts):
    model = nn.Sequential(nn.Linear(16, 16))
    ticket = find_ticket(model, one_step, 0.5, 1, (8, 8), **arguments)
    assert all(text in ticket.rewound for text in texts)
    assert ("lasso" in ticket.rewound) == ("block_lasso" in arguments)

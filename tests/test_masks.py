import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparse_lth.masks import (
    block_l1_unstructured,
    block_scores,
    density,
    expand,
    keep_highest,
    layer_densities,
    magnitude_masks,
    weight_layers,
)
from sparse_lth.program.config import RunConfig
from sparse_lth.program.models import build


def test_block_scores_are_means_without_the_padding():
    weight = torch.tensor([[1.0, -3.0, 5.0], [0.0, 4.0, -7.0], [2.0, 2.0, 9.0]])
    expected = torch.tensor([[2.0, 6.0], [2.0, 9.0]])
    assert torch.equal(block_scores(weight, (2, 2)), expected)


def test_keep_highest_breaks_ties_by_position():
    kept = keep_highest(torch.tensor([[1.0, 2.0], [1.0, 1.0]]), 2)
    assert kept.tolist() == [[True, True], [False, False]]


def test_expand_covers_whole_blocks_of_a_convolution():
    mask = expand(torch.tensor([[True, False]]), (2, 2), torch.Size([2, 1, 1, 3]))
    assert mask.tolist() == [[[[True, True, False]]]] * 2


def _all_kept(weights):
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}


@pytest.mark.parametrize("blocksize", [(1, 1), (4, 4), (3, 5)])
def test_counts_are_exact_when_every_score_ties(blocksize):
    weights = {"a": torch.ones(17, 31), "b": -torch.ones(10, 17)}
    masks = magnitude_masks(weights, _all_kept(weights), {"a": 0.3, "b": 0.7}, blocksize)
    for name, share in (("a", 0.3), ("b", 0.7)):
        blocks = block_scores(masks[name].float(), blocksize)
        assert int((blocks == 1).sum()) == round(share * blocks.numel())
        assert ((blocks == 0) | (blocks == 1)).all()


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
    config = RunConfig(prune_pc=1 - 0.8**rounds, prune_rounds=rounds)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(layer.weight.shape, generator=generator)
        for name, layer in weight_layers(build("lenet-300-100")).items()
    }
    masks = _all_kept(weights)
    assert sum(m.numel() for m in masks.values()) == 266_200
    ladder = {}
    for round in range(1, rounds + 1):
        masks = magnitude_masks(weights, masks, config.layer_densities(round))
        hidden = (235_200, 30_000)
        expected = [*(0.8**round * n for n in hidden), 0.9**round * 1000]
        assert [int(m.sum()) for m in masks.values()] == [*map(_round, expected)]
        ladder[round] = f"{density(masks):.1%}"
    assert [ladder[r] for r in (3, 7, 9, 15)] == ["51.3%", "21.1%", "13.5%", "3.6%"]


def _round(value):
    return int(value + 0.5)


def test_the_output_layer_goes_at_half_the_rate_and_stays_dense_where_blocks_do_not_fit():
    model = build("lenet-300-100")
    assert layer_densities(model, 0.2, 1, (1, 1), "layerwise")["fc3"] == 0.9
    assert layer_densities(model, 0.2, 1, (1, 1), "global")["fc3"] == 0.8
    assert set(layer_densities(model, 0.2, 1, (16, 16), "layerwise")) == {"fc1", "fc2"}
    assert set(layer_densities(build("lenet-5"), 0.2, 1, (4, 4), "global")) == {"fc1", "fc2", "fc3"}
    with pytest.raises(ValueError, match=r"blocks of at most \(100, 300\) to fit fc2"):
        layer_densities(model, 0.2, 1, (128, 16), "layerwise")


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

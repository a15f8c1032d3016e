from dataclasses import replace

import pytest
import torch
from torch.nn.utils import prune

from sparse_lth.config import RunConfig
from sparse_lth.lottery import State, effective_weights, masked_model, next_round, search
from sparse_lth.models import build, initialise
from sparse_lth.training import TrainingError, train_epoch

CONFIG = RunConfig(dataset="digits", epochs=2, bs=50, prune_pc=0.8, prune_rounds=2)


def _same(a, b):
    """Whether two states agree bit for bit."""
    groups = ("init", "masks", "weights", "optimizer")
    same_tensors = all(
        getattr(a, g).keys() == getattr(b, g).keys()
        and all(torch.equal(getattr(a, g)[n], getattr(b, g)[n]) for n in getattr(a, g))
        for g in groups
    )
    return same_tensors and a.history == b.history and torch.equal(a.generator, b.generator)


def _last(states):
    *_, last = states
    return last


@pytest.mark.parametrize("model", ["lenet-300-100", "lenet-5"])
@pytest.mark.parametrize(("blocksize", "scope"), [((1, 1), "layerwise"), ((8, 4), "global")])
def test_every_epoch_of_every_round_is_trained_and_every_round_tested(
    tiny, model, blocksize, scope
):
    config = replace(CONFIG, model=model, blocksize=blocksize, scope=scope)
    states = [(s.round, s.epoch, s.history[-1]) for s in search(config, tiny)]
    assert [s[:2] for s in states] == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert ["test_accuracy" in record for *_, record in states] == [False, True] * 3
    densities = [record["density"] for *_, record in states]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] == 1


def test_same_seed_same_ticket_other_seed_another(tiny):
    assert _same(_last(search(CONFIG, tiny)), _last(search(CONFIG, tiny)))
    assert not _same(_last(search(CONFIG, tiny)), _last(search(replace(CONFIG, seed=1), tiny)))


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_search_resumed_after_any_epoch_ends_as_if_never_stopped(tiny, tmp_path, stop):
    for _, state in zip(range(stop), search(CONFIG, tiny), strict=False):
        state.save(tmp_path / "state")
    saved = State.load(tmp_path / "state")
    assert _same(saved, state)
    resumed = list(search(CONFIG, tiny, saved))
    assert len(resumed) == 6 - stop
    assert _same(resumed[-1] if resumed else saved, _last(search(CONFIG, tiny)))


def test_pruning_rewinds_every_survivor_and_every_bias(tiny):
    *_, trained = (s for s in search(CONFIG, tiny) if s.round == 0)
    assert any(not torch.equal(trained.weights[n], trained.init[n]) for n in trained.init)
    state = next_round(CONFIG, trained)
    weights = effective_weights(masked_model(CONFIG.model, state.weights, state.masks))
    start = initialise(build(CONFIG.model), torch.Generator().manual_seed(CONFIG.seed))
    for name, value in start.items():
        layer, _, kind = name.rpartition(".")
        expected = value if kind == "bias" else torch.where(state.masks[layer], value, 0)
        assert torch.equal(weights[name], expected), name
    assert state.optimizer == {}


def test_training_does_not_touch_the_rewind_weights(tiny):
    start = initialise(build(CONFIG.model), torch.Generator().manual_seed(CONFIG.seed))
    last = _last(search(CONFIG, tiny))
    assert all(torch.equal(last.init[name], start[name]) for name in start)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    ],
)
def test_pruned_weights_stay_zero_and_negative_ones_train(tiny, optimizer):
    generator = torch.Generator().manual_seed(0)
    init = initialise(build("lenet-300-100"), generator)
    masks = {
        name: torch.rand(init[f"{name}.weight"].shape, generator=generator) < 0.3
        for name in ("fc1", "fc2", "fc3")
    }
    model = masked_model("lenet-300-100", init, masks)
    batch = [(tiny.train.images, tiny.train.labels)]
    train_epoch(model, optimizer(model.parameters()), batch * 5)
    after = effective_weights(model)
    for name, mask in masks.items():
        before, now = init[f"{name}.weight"], after[f"{name}.weight"]
        assert not now[~mask].any()
        assert torch.equal(now, model.get_submodule(name).weight_orig * mask)
        assert prune.is_pruned(model.get_submodule(name))
        negative, positive = mask & (before < 0), mask & (before > 0)
        moved = (now - before).abs()
        # the signs are alike but for chance: neither half may move much less than the other
        assert 0.5 < moved[negative].mean() / moved[positive].mean() < 2


def test_a_loss_that_is_not_finite_stops_the_search(tiny):
    with pytest.raises(TrainingError, match="finite training loss, got nan: try a lower --lr"):
        list(search(replace(CONFIG, lr=1e30), tiny))

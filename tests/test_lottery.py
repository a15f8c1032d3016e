import itertools
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparse_lth.files import FormatError, load_tensors, save_tensors
from sparse_lth.kernels import backends, use_backend
from sparse_lth.lasso import BlockLasso
from sparse_lth.program.config import RunConfig, SettingError
from sparse_lth.program.data import Split, batches
from sparse_lth.program.lottery import Lottery, State, search_from, trains_sparse
from sparse_lth.program.models import MODELS, Model
from sparse_lth.program.tickets import dense_network, load_ticket, make_ticket
from sparse_lth.program.training import TrainingError, make_step, set_lr
from sparse_lth.weights import read, snapshot, write_

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


def search(config, data, state=None):
    return Lottery(config, data).states(state)


def _first_round(config, data):
    lottery = Lottery(config, data)
    start = lottery.start()
    return lottery.train(start.model(), start)


def _next_round(data, config, state):
    """What follows the round that this state ends."""
    search = search_from(config, state, trained=True)
    next(iter(search))
    return Lottery(config, data).begin_round(state, search)


def _start(config):
    return snapshot(MODELS[config.model].new(torch.Generator().manual_seed(config.seed)))


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


LASSO = replace(CONFIG, blocksize=(8, 3), rewind="weights", block_lasso=0.1, last_lr="linear")

# evaluated six times or more: after epochs, and in the midst of them, before and after step k
RESUMED = {
    "epochs": CONFIG,
    "late": replace(CONFIG, rewind="3it"),
    "steps": replace(CONFIG, rewind="3it", iterations=6, every=2, bs=60),
    "reinit": replace(CONFIG, reinit=True),
    "sparse": replace(CONFIG, train_sparse="on", blocksize=(8, 3)),
    "masks": replace(CONFIG, train_sparse="off"),
    "lasso": replace(LASSO, train_sparse="off"),
    "sparse lasso": replace(LASSO, train_sparse="on"),
}


@pytest.mark.parametrize("config", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("stop", range(1, 7))
def test_a_search_resumed_anywhere_ends_as_if_never_stopped(tiny, tmp_path, config, stop):
    for _, state in zip(range(stop), search(config, tiny), strict=False):
        state.save(tmp_path / "state")
    saved = State.load(tmp_path / "state")
    assert _same(saved, state)
    resumed, whole = list(search(config, tiny, saved)), list(search(config, tiny))
    assert len(resumed) == len(whole) - stop
    assert _same(resumed[-1] if resumed else saved, whole[-1])


@pytest.mark.parametrize("blocksize", [(1, 1), (16, 16), (8, 3)])
def test_sparse_layers_train_as_masks_do(tiny, blocksize):
    """The first step is the same to rounding, and what is pruned stays exactly 0."""
    config = replace(CONFIG, blocksize=blocksize, epochs=1, bs=200, prune_rounds=1)
    masked, sparse = (
        _last(search(replace(config, train_sparse=choice), tiny)) for choice in ("off", "on")
    )
    assert masked.history[-1]["trained_sparse"] == []
    assert {"fc1", "fc2"} <= set(sparse.history[-1]["trained_sparse"])
    assert "fc1.weight_values.exp_avg" in sparse.optimizer  # it was block-sparse
    for name, mask in masked.masks.items():
        assert torch.equal(mask, sparse.masks[name])
        assert not sparse.weights[f"{name}.weight"][~mask].any()
    for name, init in masked.init.items():
        # Adam's first step is lr * g / (|g| + 1e-8): rounding shows only where g is nearly 0
        a, b = masked.weights[name] - init, sparse.weights[name] - init
        assert ((a - b).abs() > 1e-2 * config.lr).float().mean() < 1e-3, name


def test_without_rewinding_a_round_goes_on_and_its_start_is_the_init_of_the_ticket(tiny):
    *_, trained = (s for s in search(LASSO, tiny) if s.round == 1)
    state = _next_round(tiny, LASSO, trained)
    assert (state.step, state.optimizer) == (0, {})
    for name, value in trained.weights.items():
        layer = name.removesuffix(".weight")
        kept = torch.where(state.masks[layer], value, 0) if layer in state.masks else value
        assert torch.equal(state.init[name], value)
        assert torch.equal(state.weights[name], kept)
    ticket = make_ticket(_last(search(LASSO, tiny)))
    assert "Nothing was rewound" in ticket.rewound
    assert torch.equal(ticket.init["fc1.weight"], trained.weights["fc1.weight"])


@pytest.mark.parametrize("train_sparse", ["on", "off"])
def test_the_lasso_shrinks_blocks_in_every_round_between_the_dense_one_and_the_last(
    tiny, train_sparse
):
    # Adam moves next to nothing at this rate, and a block loses 8 steps of lr * strength * sqrt(24)
    config = replace(LASSO, train_sparse=train_sparse, lr=1e-9, block_lasso=1e6)
    for state in search(config, tiny):
        if state.step == 8:
            mask, name = state.masks["fc1"], "fc1.weight"
            before, after = state.init[name][mask], state.weights[name][mask]
            if state.round == 1:
                assert after.norm() < 0.9 * before.norm()
            else:  # a step is lr, and rounded by half of 2^-28, since weights are below 1/16
                torch.testing.assert_close(after, before, rtol=0, atol=8 * (1e-9 + 2**-29))


def test_the_learning_rate_of_the_last_round_falls_to_0(tiny):
    config = replace(CONFIG, prune_rounds=1, bs=200, epochs=4)  # a step an epoch
    constant, falling = (
        [s.weights["fc1.bias"].clone() for s in search(replace(config, last_lr=how), tiny)]
        for how in ("constant", "linear")
    )
    assert all(torch.equal(constant[n], falling[n]) for n in range(5))  # the first step at lr
    assert not torch.equal(constant[5], falling[5])
    # a fourth step of Adam moves by lr * sqrt(4) at most, and here by a quarter of that
    assert 0 < (falling[7] - falling[6]).abs().max() <= config.lr / 2


def test_auto_is_a_rule_on_density_blocksize_and_backend():
    kept = torch.zeros(32, 32, dtype=torch.bool)
    kept[:16] = True
    fuller = kept.clone()
    fuller[16:20] = True
    native = backends()["native"].startswith("available")
    rows = [((1, 1), kept, native), ((1, 1), fuller, False), ((16, 16), fuller, native)]
    for blocksize, mask, expected in rows:
        assert trains_sparse(replace(CONFIG, blocksize=blocksize), mask) is expected
    with use_backend("torch"):
        assert not trains_sparse(CONFIG, kept)


def test_steps_are_the_same_however_often_they_are_evaluated(tiny):
    often = replace(CONFIG, epochs=1, prune_rounds=1, bs=60, iterations=7, every=2)
    states = list(search(often, tiny))
    assert [s.step for s in states] == [2, 4, 6, 7] * 2
    assert [s.epoch for s in states] == [0, 1, 1, 1] * 2  # four batches an epoch
    once = _last(search(replace(often, every=7), tiny))
    assert all(torch.equal(states[-1].weights[name], w) for name, w in once.weights.items())


def test_late_rewinding_goes_back_to_the_weights_of_step_k_bit_for_bit(tiny):
    config = replace(CONFIG, bs=60, rewind="1ep")  # four steps
    at_k = _last(_first_round(replace(config, rewind="init", iterations=4), tiny))
    expected = {name: w.clone() for name, w in at_k.weights.items()}
    rewound = _next_round(tiny, config, _last(_first_round(config, tiny)))
    assert not torch.equal(rewound.weights["fc1.bias"], torch.zeros(300))
    for name, value in expected.items():
        layer, _, kind = name.rpartition(".")
        kept = value if kind == "bias" else torch.where(rewound.masks[layer], value, 0)
        assert torch.equal(rewound.weights[name], kept)
        assert torch.equal(rewound.init[name], value)


def test_late_rewinding_trains_from_step_k_to_the_end(tiny):
    """As many steps as are left of the dense network's (arXiv 1912.05671), and the same batches."""
    config = replace(CONFIG, bs=60, rewind="6it", epochs=3)  # four batches an epoch
    steps = [(s.round, s.epoch, s.step) for s in search(config, tiny)]
    assert steps == [(0, 1, 4), (0, 2, 8), (0, 3, 12), (1, 2, 8), (1, 3, 12), (2, 2, 8), (2, 3, 12)]
    rewound = _next_round(tiny, config, _last(_first_round(config, tiny)))
    assert (rewound.epoch, rewound.step) == (1, 6)
    states = [*Lottery(replace(config, every=1), tiny).train(rewound.model(), rewound)]
    assert [state.step for state in states] == [7, 8, 9, 10, 11, 12]
    assert float(states[-1].optimizer["fc1.bias.step"]) == 6


@pytest.mark.parametrize("k", [8, 9])
def test_a_rewind_step_that_leaves_nothing_to_train_is_refused(tiny, k):
    message = f"rewind: expected a step before the end of a round, 8 steps, got {k}it"
    with pytest.raises(SettingError, match=message):
        list(search(replace(CONFIG, rewind=f"{k}it"), tiny))


def test_reinit_trains_the_masks_of_each_ticket_over_other_weights(tiny):
    """The paper's control, beside a ticket that is the same without it."""
    states = []
    for state in search(replace(CONFIG, reinit=True), tiny):
        states.append(replace(state, weights={n: w.clone() for n, w in state.weights.items()}))
    controls = [state for state in states if "control" in state.history[-1]]
    tickets = [state for state in states if "control" not in state.history[-1]]
    assert [(s.round, s.epoch) for s in controls] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [(s.round, s.epoch) for s in tickets] == [(n, e) for n in range(3) for e in (1, 2)]
    for alone, beside in zip(search(CONFIG, tiny), tickets, strict=True):
        assert all(torch.equal(beside.weights[name], w) for name, w in alone.weights.items())
        assert alone.history[-1] == beside.history[-1]
    for control, ticket in zip(controls, tickets[2:], strict=True):
        for name, mask in ticket.masks.items():
            assert torch.equal(control.masks[name], mask)
            weights = control.weights[f"{name}.weight"]
            assert not weights[~mask].any()
            assert not torch.equal(weights, ticket.weights[f"{name}.weight"])
    # four steps move a weight by 4 * lr at most; drawn anew they are 0.05 apart on average
    kept, start = tickets[-1].masks["fc1"], _start(CONFIG)["fc1.weight"]
    first, second = (controls[n].weights["fc1.weight"] for n in (0, 2))
    for a, b in ((first, second), (first, start), (second, start)):
        assert (a - b)[kept].abs().mean() > 10 * 4 * CONFIG.lr
    assert (tickets[2].weights["fc1.weight"] - start)[kept].abs().max() <= 4.1 * CONFIG.lr
    record = make_ticket(states[-1]).rounds[1]
    assert record["reinit_test_accuracy"] == controls[1].history[-1]["test_accuracy"]
    assert record["test_accuracy"] == tickets[3].history[-1]["test_accuracy"]


def test_one_shot_reaches_the_density_of_all_rounds_in_one(tiny):
    iterative = _last(search(CONFIG, tiny))
    *_, state = search(replace(CONFIG, one_shot=True), tiny)
    assert state.round == 1
    for name, mask in iterative.masks.items():
        assert int(state.masks[name].sum()) == int(mask.sum())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_graphed_step_is_the_eager_step(tiny, strength):
    split = Split(tiny.train.images.cuda(), tiny.train.labels.cuda())
    masks = {n: torch.rand(s) < 0.3 for n, s in (("fc1", (300, 784)), ("fc2", (100, 300)))}
    masks["fc3"] = torch.ones(10, 100, dtype=torch.bool)  # not masked at all
    weights = []
    for graphed in (False, True):
        model = MODELS["lenet-300-100"].new(torch.Generator().manual_seed(0)).cuda()
        write_(model, {}, masks)
        lr = torch.tensor(1e-3, device="cuda")
        optimizer = torch.optim.Adam(model.parameters(), lr, fused=True, capturable=True)
        optimizer.register_step_post_hook(BlockLasso(model, masks, (16, 16), strength))
        step = make_step(model, optimizer, split)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            set_lr(optimizer, float(lr) / 2)
            for chosen in batches(split, 60, generator):  # of 60 and, last, of 20
                (step if graphed else step.step)(chosen)
        weights.append(read(model))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


def test_pruning_rewinds_every_survivor_and_every_bias(tiny):
    *_, trained = (s for s in search(CONFIG, tiny) if s.round == 0)
    assert any(not torch.equal(trained.weights[n], trained.init[n]) for n in trained.init)
    state = _next_round(tiny, CONFIG, trained)
    weights = read(state.model())
    for name, value in _start(CONFIG).items():
        layer, _, kind = name.rpartition(".")
        expected = value if kind == "bias" else torch.where(state.masks[layer], value, 0)
        assert torch.equal(weights[name], expected), name
    assert state.optimizer == {}


def test_training_does_not_touch_the_rewind_weights(tiny):
    start = _start(CONFIG)
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
    model = MODELS["lenet-300-100"].new(generator)
    init = snapshot(model)
    masks = {
        name: torch.rand(init[f"{name}.weight"].shape, generator=generator) < 0.3
        for name in ("fc1", "fc2", "fc3")
    }
    write_(model, {}, masks)
    step = make_step(model, optimizer(model.parameters()), tiny.train)
    for _ in range(5):
        step(torch.arange(len(tiny.train.labels)))
    after = read(model)
    for name, mask in masks.items():
        before, now = init[f"{name}.weight"], after[f"{name}.weight"]
        assert not now[~mask].any()
        assert torch.equal(now, model.get_submodule(name).weight_orig * mask)
        assert prune.is_pruned(model.get_submodule(name))
        negative, positive = mask & (before < 0), mask & (before > 0)
        moved = (now - before).abs()
        # the signs are alike but for chance: neither half may move much less than the other
        assert 0.5 < moved[negative].mean() / moved[positive].mean() < 2


def test_a_round_that_ends_inside_an_epoch_leaves_its_order_to_no_other(tiny):
    config = replace(CONFIG, bs=50, iterations=5)  # 4 batches an epoch
    orders = [s.generator for s in search(config, tiny) if s.step == 5]
    assert not torch.equal(orders[0], orders[1])
    generator = torch.Generator()
    generator.set_state(Lottery(config, tiny).start().generator)
    epochs = [batches(tiny.train, 50, generator) for _ in range(2)]
    assert torch.equal(orders[0], generator.get_state())
    assert len(epochs) == 2


def test_a_ticket_does_not_hold_the_live_weights(tiny):
    *_, state = search(CONFIG, tiny)
    ticket = make_ticket(state)
    before = ticket.trained["fc1.bias"].clone()
    state.weights["fc1.bias"].add_(1)
    assert torch.equal(ticket.trained["fc1.bias"], before)


def test_a_loss_that_is_not_finite_stops_the_search(tiny):
    with pytest.raises(TrainingError, match=r"finite loss, got nan .* try a lower --lr"):
        list(search(replace(CONFIG, lr=1e30), tiny))


def _normed():
    """A small model with BatchNorm, as someone may add one."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 30, bias=False),
            norm=nn.BatchNorm1d(30),
            relu=nn.ReLU(),
            fc3=nn.Linear(30, 10),
        )
    )


def test_a_model_is_one_entry_and_its_buffers_are_rewound_and_resumed(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "normed", Model(_normed))
    config = replace(CONFIG, model="normed")
    start = _start(config)
    assert start["norm.weight"].eq(1).all()
    states = []
    for state in search(config, tiny):
        states.append(replace(state, weights={n: w.clone() for n, w in state.weights.items()}))
        if len(states) == 3:
            state.save(tmp_path / "state")
    assert int(states[1].weights["norm.num_batches_tracked"]) == 8
    assert int(states[2].weights["norm.num_batches_tracked"]) == 4  # counted anew in round 1
    assert not torch.equal(states[1].weights["norm.running_mean"], start["norm.running_mean"])
    rewound = _next_round(tiny, config, states[1])
    for name in ("norm.weight", "norm.running_mean", "norm.running_var"):
        assert torch.equal(rewound.weights[name], start[name])
    assert _same(_last(search(config, tiny, State.load(tmp_path / "state"))), states[-1])
    ticket = make_ticket(states[-1])
    ticket.save(tmp_path / "ticket")
    assert torch.equal(
        dense_network(load_ticket(tmp_path / "ticket"))(tiny.test.images),
        dense_network(ticket)(tiny.test.images),
    )


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """The state of a search in the midst of round 1, whose layers train block-sparse."""
    path = tmp_path_factory.mktemp("saved") / "state"
    config = replace(CONFIG, train_sparse="on")
    for state in itertools.islice(search(config, tiny), 3):
        state.save(path)
    return path


STATE_CHANGES = {
    "expected round, epoch": lambda t, a: a.pop("sparse"),
    "expected the settings of a run": lambda t, a: a.update(settings=[1]),
    "model: expected one of": lambda t, a: a["settings"].update(model="vgg"),
    "lr: expected": lambda t, a: a["settings"].update(lr=-1.0),
    "expected settings": lambda t, a: a["settings"].pop("seed"),
    "expected round to count, got 1.5": lambda t, a: a.update(round=1.5),
    "expected step to count, got True": lambda t, a: a.update(step=True),
    "expected epoch to count, got -1": lambda t, a: a.update(epoch=-1),
    "expected a round up to 2, got 3": lambda t, a: a.update(round=3),
    "expected a list as history": lambda t, a: a.update(history={}),
    "expected records of": lambda t, a: a["history"].append([]),
    "expected train_loss of": lambda t, a: a["history"][0].update(train_loss="low"),
    "expected validation_loss of": lambda t, a: a["history"][0].update(
        validation_loss=float("nan")
    ),
    "expected density of": lambda t, a: a["history"][0].pop("density"),
    "names of .* as sparse, got .*fc9": lambda t, a: a.update(sparse=["fc9"]),
    "names of .* as sparse, got 3": lambda t, a: a.update(sparse=3),
    "expected init, masks": lambda t, a: t.pop("generator"),
    "expected init tensors to have other names": lambda t, a: t.pop("init.fc1.bias"),
    "expected masks tensors to have other names": lambda t, a: t.pop("masks.fc1"),
    "expected trained tensors to have other names": lambda t, a: t.pop("weights.fc1.bias"),
    "expected optimizer tensors to have other names": lambda t, a: t.pop("optimizer.fc1.bias.step"),
    "expected optimizer fc1.bias.exp_avg of shape": lambda t, a: t.update(
        {"optimizer.fc1.bias.exp_avg": torch.zeros(3)}
    ),
    "expected trained fc2.weight of shape": lambda t, a: t.update(
        {"weights.fc2.weight": t["weights.fc2.weight"].half()}
    ),
    "trained fc1.weight to be 0 where pruned": lambda t, a: t["weights.fc1.weight"].fill_(1),
    "finite numbers in init fc1.bias": lambda t, a: t["init.fc1.bias"].fill_(torch.inf),
    "finite numbers in optimizer": lambda t, a: t["optimizer.fc1.bias.exp_avg"].fill_(torch.nan),
    "state of a generator": lambda t, a: t.update(generator=torch.zeros(3, dtype=torch.uint8)),
}


@pytest.mark.parametrize("message", STATE_CHANGES)
def test_a_wrong_state_is_refused_by_name(saved, tmp_path, message):
    tensors, about = load_tensors(saved, "state")
    STATE_CHANGES[message](tensors, about)
    save_tensors(tmp_path / "state", "state", tensors, about)
    with pytest.raises(FormatError, match=f"state: .*{message}"):
        State.load(tmp_path / "state")


@pytest.mark.parametrize("change", [{"step": 99}, {"epoch": 2}, {"optimizer": {}}])
def test_a_state_that_does_not_fit_its_data_is_refused(saved, tiny, change):
    state = replace(State.load(saved), **change)
    config = replace(CONFIG, train_sparse="on")
    with pytest.raises(FormatError, match="a state within steps 0 to 8 of a round, 4 an"):
        next(search(config, tiny, state))

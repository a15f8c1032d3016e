"""The search on models that are not ours, and every rule of it."""

import copy
import multiprocessing
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from sparse_lth import Search, Ticket, TicketError, find_ticket
from sparse_lth.masks import CRITERIA, highest_masks
from sparse_lth.weights import prunable, snapshot, weight_layers


class Tied(nn.Module):
    """An embedding, two layers on one weight, and a head on the embedding's."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(13, width)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.other = nn.Linear(width, width)
        self.head = nn.Linear(width, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):  # (batch, features) of any kind, taken as tokens
        tokens = x.flatten(1)[:, :3].abs().long() % 13
        return self.head(self.other(F.relu(self.b(F.relu(self.a(self.embed(tokens).sum(1)))))))


def mlp(*widths):
    layers = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.BatchNorm1d(m), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 5))


def convolutional(kind, channels):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[kind - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[kind - 1]
    body = conv(2, channels, 3, padding=1), norm(channels), nn.ReLU(), conv(channels, 6, 2)
    return nn.Sequential(*body, nn.Flatten(), nn.LazyLinear(5))


@st.composite
def models(draw):
    """(a model, an input that it takes)"""
    width = st.integers(3, 24)
    kind = draw(st.sampled_from(["mlp", "tied", 1, 2, 3]))
    torch.manual_seed(draw(st.integers(0, 99)))
    if kind == "mlp":
        widths = draw(st.lists(width, min_size=1, max_size=3))
        return mlp(*widths), torch.randn(8, widths[0])
    if kind == "tied":
        return Tied(draw(width)), torch.randn(8, 4)
    model, x = convolutional(kind, draw(width)), torch.randn(4, 2, *[4] * kind)
    model(x)
    return model, x


OPTIMIZERS = (
    partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
)


def trainer(x, optimizer=OPTIMIZERS[0], steps=3):
    def train(model):
        updates = optimizer(model.parameters())
        for _ in range(steps):
            updates.zero_grad()
            model(x).square().mean().backward()
            updates.step()

    return train


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


@settings(max_examples=60, deadline=None)
@given(
    models(),
    st.floats(0.05, 0.95),
    st.integers(1, 4),
    st.sampled_from([(1, 1), (2, 3), (4, 4)]),
    st.sampled_from(["layerwise", "global"]),
    st.sampled_from([*CRITERIA]),
    st.sampled_from(["init", "weights"]),
    st.sampled_from(OPTIMIZERS),
    st.booleans(),
)
def test_every_rule_of_the_search(
    made, density, rounds, blocksize, scope, criterion, rewind, optimizer, halve
):
    """The density, to one block; exact rewinding; masks that hold, shrink and are whole blocks."""
    model, x = made
    start, flags = snapshot(model), [module.training for module in model.modules()]
    try:
        layers = prunable(model, blocksize)
        last = [*layers.weights][-1]
        rates = {last: 0.5} if halve and scope == "layerwise" else {}
        arguments = {"criterion": criterion, "scope": scope, "rewind": rewind, "rates": rates}
        search = Search(model, density, rounds, blocksize, **arguments)
    except ValueError:  # too few blocks for this density
        reject()
    before, trained = search.masks, start
    for round in search:
        live, layer_of = snapshot(model), weight_layers(model)
        pruned = {f"{name}.weight": ~mask for name, mask in search.masks.items()}
        origin = start if rewind == "init" or round == 0 else trained
        for name, value in origin.items():
            expected = torch.where(pruned[name], 0, value) if name in pruned else value
            assert torch.equal(live[name], expected), name
        assert [module.training for module in model.modules()] == flags
        for name, mask in search.masks.items():
            assert not (mask & ~before[name]).any()
            assert layer_of[name].weight[~mask].count_nonzero() == 0
        before = search.masks
        trainer(x, optimizer)(model)
        model.eval()
        trained = snapshot(model)
        for name, out in pruned.items():
            assert not trained[name][out].any()
            kept = ~out & (live[name] != 0)
            assert not kept.any() or not torch.equal(trained[name][kept], live[name][kept])
    ticket = search.ticket()
    total = sum(mask.numel() for mask in ticket.masks.values())
    block = blocksize[0] * blocksize[1]
    assert abs(sum(int(m.sum()) for m in ticket.masks.values()) - density * total) <= block
    assert same(ticket.init, origin)
    assert ticket.masks.keys() == layers.weights.keys()
    assert [record["round"] for record in ticket.rounds] == list(range(rounds + 1))
    if isinstance(model, Tied):
        assert ticket.masks.keys() <= {"a", "other"}
        assert torch.equal(model.a.weight, model.b.weight)
        a, b = (getattr(m, "weight_orig", m.weight) for m in (model.a, model.b))
        assert a is b
        assert prune.is_pruned(model.a) == prune.is_pruned(model.b)
        assert model.head.weight is model.embed.weight


def test_negative_weights_train_as_positive_ones_do():
    torch.manual_seed(0)
    model, x = mlp(40, 40), torch.randn(64, 40)
    search = Search(model, 0.3, 1)
    for _ in search:
        before = snapshot(model)["1.weight"]
        trainer(x)(model)
    moved, mask = (snapshot(model)["1.weight"] - before).abs(), search.masks["1"]
    halves = moved[mask & (before < 0)].mean() / moved[mask & (before > 0)].mean()
    assert 0.5 < halves < 2


def test_ties_are_pruned_to_the_count_that_was_asked_for():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    for layer in model:
        nn.init.constant_(layer.weight, -0.5)
    assert find_ticket(model, lambda model: None, 0.37, 3).density == 0.37


@pytest.mark.parametrize("scope", ["layerwise", "global"])
def test_a_layer_that_died_stays_dead(scope):
    scores = {"dead": torch.full((4, 4), 9.0), "alive": torch.rand(4, 4)}
    masks = {"dead": torch.zeros(4, 4).bool(), "alive": torch.ones(4, 4).bool()}
    after = highest_masks(scores, masks, {"dead": 0.25, "alive": 0.5}, (2, 1), scope)
    assert not after["dead"].any()
    assert int(after["alive"].sum()) == 12  # what is asked for together


def test_a_layer_keeps_a_block_that_is_alive():
    scores = {"a": torch.tensor([[9.0, 8.0, 1.0, 2.0]])}
    masks = {"a": torch.tensor([[False, False, True, True]])}
    assert highest_masks(scores, masks, {"a": 0.01})["a"].tolist() == [[False] * 3 + [True]]


def test_in_global_scope_a_layer_may_die():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.constant_(model[0].weight, 1e-6)
    ticket = find_ticket(model, lambda model: None, 0.2, 4, scope="global")
    assert not ticket.masks["0"].any()
    assert ticket.density == pytest.approx(0.2, abs=1 / 128)


def test_later_rounds_rewind_to_the_weights_that_the_loop_marked():
    torch.manual_seed(0)
    model, x = mlp(6, 6), torch.randn(8, 6)
    search, marked = Search(model, 0.5, 2), None
    for round in search:
        if round:
            live = snapshot(model)
            assert torch.equal(live["1.bias"], marked["1.bias"])
            assert torch.equal(live["2.running_mean"], marked["2.running_mean"])
            assert int(live["2.num_batches_tracked"]) == 3
        trainer(x)(model)
        search.mark_rewind()  # counts in round 0 only
        if round == 0:
            marked = snapshot(model)
        trainer(x)(model)
    assert same(search.ticket().init, marked)


def test_one_shot_leaves_what_all_rounds_leave():
    densities = []
    for levels in (None, (2, 4), (4,)):
        torch.manual_seed(0)
        ticket = find_ticket(mlp(9, 9), lambda model: None, 0.2, 4, levels=levels)
        densities.append([round(record["density"], 3) for record in ticket.rounds])
    assert densities[0] == pytest.approx([1, 0.669, 0.447, 0.299, 0.2], abs=0.01)
    assert densities[1] == [densities[0][n] for n in (0, 2, 4)]
    assert densities[2] == [densities[0][n] for n in (0, 4)]
    assert [*Search(mlp(9, 9), levels=())] == [0]  # the dense network alone


def test_movement_keeps_what_moved_away_from_zero():
    weights, init = torch.tensor([[1.0, -1.0, 0.5, -0.2]]), torch.tensor([[2.0, -0.5, 0.5, 0.3]])
    scores = {"a": CRITERIA["movement"](weights, init, None)}
    masks = {"a": torch.ones(1, 4, dtype=torch.bool)}
    kept = highest_masks(scores, masks, {"a": 0.5})["a"]
    assert kept.tolist() == [[False, True, True, False]]


def test_the_random_criterion_is_its_seeds():
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        ticket = find_ticket(mlp(9, 9), lambda model: None, criterion="random", seed=seed)
        masks.append(ticket.masks)
    assert same(masks[0], masks[1])
    assert not same(masks[0], masks[2])


def by_norm(weights, masks, densities):
    """Rows of the largest norm, whole."""
    scores = {n: w.norm(dim=1, keepdim=True).expand_as(w) for n, w in weights.items()}
    return highest_masks(scores, masks, densities, (1, 1))


def other_half(weights, masks, densities):
    """The weights that were not kept before."""
    half = torch.arange(80).view(10, 8) < 40
    return {"0": ~masks["0"] if not masks["0"].all() else half}


def test_a_criterion_of_ones_own_decides_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10))
    norms = model[0].weight.norm(dim=1)
    ticket = find_ticket(model, lambda model: None, 0.5, 1, criterion=by_norm)
    assert ticket.masks["0"].all(1).tolist() == (norms >= norms.sort().values[5]).tolist()
    assert ticket.settings["criterion"] == "by_norm"
    with pytest.raises(ValueError, match="brings back no weight of 0"):
        find_ticket(nn.Sequential(nn.Linear(8, 10)), lambda model: None, criterion=other_half)
    with pytest.raises(ValueError, match="criterion's"):
        find_ticket(nn.Sequential(nn.Linear(8, 10)), lambda m: None, criterion=lambda *_: {})


def _unmask(model):
    for layer in weight_layers(model).values():
        if prune.is_pruned(layer):
            prune.remove(layer, "weight")
    with torch.no_grad():
        model[1].weight.add_(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 1.5}, "density: expected above 0 and below 1, got 1.5"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"density": 0.001}, "at least one of the 36 blocks of 1, got a density of 0.001"),
        ({"blocksize": (64, 64)}, r"got none: 1: expected blocks of at most \(6, 6\) to fit 1"),
        ({"filter_fn": lambda module, name: False}, "got none: 1: filter_fn leaves it out"),
        ({"criterion": "size"}, "criterion: expected one of"),
        ({"scope": "local"}, "scope: expected one of"),
        ({"rewind": "start"}, "rewind: expected one of"),
        ({"block_lasso": -1}, "block_lasso: expected a finite number of at least 0, got -1"),
        ({"block_lasso": float("nan")}, "block_lasso: expected a finite number"),
        ({"rates": {"head": 0.5}}, r"rates: expected layers of \['1', '4'\]"),
        ({"rates": {"1": 0.0}}, "rates: expected above 0, up to 1"),
        ({"rates": {"1": 0.1}, "rounds": 1}, "a density of at least"),
        ({"rates": {"1": 0.5}, "scope": "global"}, "rates: expected none in global scope"),
        ({"levels": (2, 9)}, "levels: expected rising, from 1 to 5"),
        ({"train": _unmask}, "pruned weights of 1 to be 0 after training: its mask must stay on"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    model = mlp(6, 6)
    with pytest.raises(ValueError, match=message):
        find_ticket(model, **{"train": lambda model: None, **settings})


def test_training_that_diverged_is_said():
    def train(model):
        nn.init.constant_(model[1].bias, float("nan"))

    with pytest.raises(ValueError, match=r"finite numbers in trained 1\.bias"):
        find_ticket(mlp(6, 6), train)


def test_buffers_that_are_infinite_by_design_are_kept(tmp_path):
    model = mlp(6, 6)
    model.register_buffer("causal", torch.full((3, 3), -torch.inf).triu(1))
    find_ticket(model, lambda model: None, out_dir=tmp_path)
    assert Ticket.load(tmp_path / "ticket.safetensors").init["causal"][0, 1] == -torch.inf


def test_a_model_that_is_masked_already_is_refused():
    model = mlp(6, 6)
    prune.l1_unstructured(model[1], "weight", 0.5)
    with pytest.raises(ValueError, match=r"take them off with prune\.remove"):
        Search(model)


def test_what_stays_dense_says_why():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "tied": Tied(8),
            "small": nn.Linear(2, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "free": nn.Linear(8, 8),
            "kept": nn.Linear(8, 8),
        }
    )
    found = prunable(model, (4, 4), lambda module, name: name != "kept")
    assert [*found.weights] == ["tied.a", "tied.other", "free"]
    reasons = {
        "attention.out_proj": "reads its weight without calling it",
        "tied.head": "also that of tied.embed",
        "small": "blocks of at most (2, 2)",
        "normed": "computed from other tensors",
        "kept": "filter_fn leaves it out",
    }
    assert found.dense.keys() == reasons.keys()
    assert all(text in found.dense[name] for name, text in reasons.items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("rewind", ["init", "weights"])
@pytest.mark.parametrize("criterion", [*CRITERIA])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_search_that_was_killed_goes_on_to_the_same_ticket(tmp_path, rewind, criterion, stop):
    x = torch.randn(8, 6)
    arguments = {"rewind": rewind, "criterion": criterion}

    def run(folder, kill=None, seed=0):
        torch.manual_seed(seed)
        search = Search(mlp(6, 6), 0.3, 3, **arguments, out_dir=folder)
        rounds = []
        for round in search:
            if round == kill:
                raise Killed
            rounds.append(round)
            trainer(x)(search.model)
            search.mark_rewind()
            trainer(x)(search.model)
            search.record(score=round)
        return search.ticket(), rounds

    whole, _ = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", stop)
    resumed, rounds = run(tmp_path / "killed", seed=0 if stop == 0 else 1)
    assert rounds == list(range(stop, 4))
    for ticket in (resumed, Ticket.load(tmp_path / "killed" / "ticket.safetensors")):
        for group in ("init", "masks", "trained"):
            assert same(getattr(ticket, group), getattr(whole, group))
        assert ticket.rounds == whole.rounds
    again, rounds = run(tmp_path / "killed")
    assert rounds == []
    assert same(again.trained, whole.trained)


def test_a_folder_of_another_search_is_refused(tmp_path):
    find_ticket(mlp(6, 6), lambda model: None, out_dir=tmp_path)
    with pytest.raises(ValueError, match=r"density: expected 0\.1, as the search there has it"):
        find_ticket(mlp(6, 6), lambda model: None, 0.2, out_dir=tmp_path)
    with pytest.raises(ValueError, match=r"expected init 1\.bias of shape \(7,\)"):
        find_ticket(mlp(6, 7), lambda model: None, out_dir=tmp_path)
    path = tmp_path / "ticket.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TicketError, match="expected a sparse_lth ticket"):
        find_ticket(mlp(6, 6), lambda model: None, out_dir=tmp_path)


def test_the_measurements_of_each_round_are_in_the_ticket():
    model = mlp(6, 6)
    numbers = iter([0.5, 0.75])
    ticket = find_ticket(
        model, lambda model: None, 0.5, 1, evaluate=lambda model: {"accuracy": next(numbers)}
    )
    assert [record["accuracy"] for record in ticket.rounds] == [0.5, 0.75]
    assert repr(ticket) == "Ticket(33 of 66 weights (50.00%) in 2 layers, 2 rounds)"
    scored = find_ticket(mlp(6, 6), lambda model: None, 0.5, 1, evaluate=lambda model: 0.9)
    assert scored.rounds[-1]["score"] == 0.9


def test_a_model_is_trained_in_its_own_mode_and_evaluated_without_gradients():
    model, modes = mlp(6, 6), []
    model[2].eval()  # a BatchNorm that is frozen

    def note(model):
        modes.append((model.training, model[2].training, torch.is_grad_enabled()))
        return len(modes)

    find_ticket(model, note, 0.5, 1, evaluate=note)
    assert modes == [(True, False, True), (False, False, False)] * 2


def test_an_optimizer_made_before_the_search_goes_on_with_the_model():
    torch.manual_seed(0)
    model, x = mlp(9, 9), torch.randn(8, 9)
    updates = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    search = Search(model, 0.3, 2)
    for _ in search:
        before = snapshot(model)
        trainer(x, lambda _: updates)(model)
        for name, mask in search.masks.items():
            moved = snapshot(model)[f"{name}.weight"] != before[f"{name}.weight"]
            assert torch.equal(moved, mask)


@pytest.mark.parametrize("weights", ["init", "trained"])
def test_a_ticket_goes_onto_a_fresh_model(tmp_path, weights):
    torch.manual_seed(0)
    model, x = mlp(9, 9), torch.randn(8, 9)
    find_ticket(model, trainer(x), 0.3, 2).save(tmp_path / "t")
    ticket = Ticket.load(tmp_path / "t")
    fresh = ticket.apply_(mlp(9, 9), weights)
    if weights == "trained":
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    live = snapshot(fresh)
    for name, value in getattr(ticket, weights).items():
        mask = ticket.masks.get(name.removesuffix(".weight"), torch.tensor(True))
        assert torch.equal(live[name], torch.where(mask, value, 0))
    trainer(x)(fresh.train())
    for name, mask in ticket.masks.items():
        assert not snapshot(fresh)[f"{name}.weight"][~mask].any()
    with pytest.raises(ValueError, match=r"1\.weight of shape \(9, 9\)"):
        ticket.apply_(mlp(9, 8))
    with pytest.raises(ValueError, match="one on the meta device"):
        ticket.apply_(mlp(9, 9).to("meta"))
    with pytest.raises(ValueError, match='"init" or "trained"'):
        ticket.apply_(mlp(9, 9), "θ")


def test_the_sparse_network_of_a_ticket_is_the_trained_model():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)), torch.randn(8, 32)
    ticket = find_ticket(model, trainer(x), 0.3, 1, (8, 8), filter_fn=lambda m, name: name == "0")
    sparse = ticket.sparse_network(copy.deepcopy(model))
    assert sparse[0].blocksize == (8, 8)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-4)
    assert not prune.is_pruned(sparse)


def test_a_model_that_is_wrapped_is_searched_inside():
    ticket = find_ticket(nn.DataParallel(mlp(6, 6)), lambda model: None)
    assert ticket.masks.keys() == {"1", "4"}


def _masks_of_rank(rank, file, criterion, folder, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(mlp(6, 6))
    torch.manual_seed(rank + 1)  # data of its own, but BatchNorm's buffers alike
    train = trainer(torch.randn(8, 6))
    ticket = find_ticket(model, train, 0.3, 2, criterion=criterion, out_dir=folder)
    results.put((rank, {name: mask.tolist() for name, mask in ticket.masks.items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_two_processes_find_the_same_masks(tmp_path, criterion):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (tmp_path / "store", criterion, tmp_path / "out", results)
    workers = [context.Process(target=_masks_of_rank, args=(n, *arguments)) for n in range(2)]
    for worker in workers:
        worker.start()
    masks = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert masks[0] == masks[1]
    saved = Ticket.load(tmp_path / "out" / "ticket.safetensors")
    assert {name: mask.tolist() for name, mask in saved.masks.items()} == masks[0]

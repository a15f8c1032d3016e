"""Random sequences of what people do to modules, on a sparse model and on a masked dense one."""

import copy
import itertools
import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from sparse_lth import SparseLinear, SparseSequential, load_sparse, save_sparse, sparsify_
from tests.bounds import ROUNDINGS

SIZES = (11, 16, 16, 16, 7)  # the middle layers can be tied, the last stays dense
LAYERS = range(0, 2 * len(SIZES) - 2, 2)  # between them are ReLUs
SPARSE = LAYERS[:-1]
BLOCKSIZES = [(4, 4), (1, 1), (3, 5), (8, 1)]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


class Masked(nn.Linear):
    """What a sparse layer has to be equal to."""

    def __init__(self, inputs, outputs, mask, dtype):
        super().__init__(inputs, outputs, dtype=dtype)
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


def dense_of(layer, values, padding=0):
    """The (out_features, in_features) matrix of values (nnz, C, R) at the blocks of a layer."""
    (R, C), crow, col = layer.blocksize, layer.crow_indices.tolist(), layer.col_indices.tolist()
    full = values.new_zeros(layer.out_features + R, layer.in_features + C)
    for r, (start, end) in enumerate(itertools.pairwise(crow)):
        for n in range(start, end):
            full[r * R : (r + 1) * R, col[n] * C : (col[n] + 1) * C] = values[n].T
    return full[: layer.out_features, : layer.in_features]


def stored(layer, dense):
    """The inverse of `dense_of`: (nnz, C, R), 0 in the padding."""
    (R, C), crow, col = layer.blocksize, layer.crow_indices.tolist(), layer.col_indices.tolist()
    full = F.pad(dense, (0, C, 0, R))
    return torch.stack(
        [
            full[r * R : (r + 1) * R, col[n] * C : (col[n] + 1) * C].T
            for r, (start, end) in enumerate(itertools.pairwise(crow))
            for n in range(start, end)
        ]
        or [full.new_zeros(C, R)]
    )[: len(col)]


def a_mask(shape, blocksize, inside, choose):
    """bool: some of the blocks, and if `inside` some of the weights in them."""
    rows, cols = (-(-n // size) for n, size in zip(shape, blocksize, strict=True))
    blocks = torch.zeros(rows * cols, dtype=torch.bool)
    blocks[torch.randperm(rows * cols)[: choose.randint(1, rows * cols - 1)]] = True
    full = blocks.view(rows, cols).repeat_interleave(blocksize[0], 0)
    mask = full.repeat_interleave(blocksize[1], 1)[: shape[0], : shape[1]]
    return mask & (torch.rand(shape) < 0.7) if inside else mask


def fresh(dtype):
    linears = (nn.Linear(*pair, dtype=dtype) for pair in itertools.pairwise(SIZES))
    modules = [module for linear in linears for module in (linear, nn.ReLU())][:-1]
    return SparseSequential(*modules)


def a_pair(choose, dtype, blocksize, tied, hook_at=None):
    """A masked dense model, and a sparse one that torch's prune and sparsify_ made of the same
    weights; and the handles of a hook that was registered on both before that."""
    torch.manual_seed(choose.randrange(1 << 30))
    model, masked, handles = fresh(dtype), [], []
    promised = [choose.random() < 0.5 for _ in LAYERS]
    for i in SPARSE:
        layer, inside = model[i], promised[i // 2]
        mask = a_mask(layer.weight.shape, blocksize, inside, choose)
        if tied and i == 4:
            mask, inside = masked[2].mask.clone(), promised[1]
            layer.weight = model[2].weight_orig if inside else model[2].weight
        if inside:
            prune.custom_from_mask(layer, "weight", mask)
        else:
            with torch.no_grad():
                layer.weight.mul_(mask)
        masked += [Masked(layer.in_features, layer.out_features, mask, dtype), nn.ReLU()]
    if tied and promised[1]:
        model[4].weight_orig = model[2].weight_orig
    head = model[6]
    ones = torch.ones(head.weight.shape, dtype=torch.bool)
    masked.append(Masked(head.in_features, head.out_features, ones, dtype))
    reference = nn.Sequential(*masked)
    for i in LAYERS:
        weight = getattr(model[i], "weight_orig", model[i].weight)
        with torch.no_grad():
            reference[i].weight.copy_(weight)
            reference[i].bias.copy_(model[i].bias)
    if tied:
        reference[4].weight = reference[2].weight
    if hook_at is not None:
        handles = [m[hook_at].register_forward_hook(doubled) for m in (reference, model)]
    sparsify_(model, blocksize, max_density=1.0)
    assert all(type(model[i]) is SparseLinear for i in SPARSE)
    return reference, model, handles


def doubled(module, args, output):
    return 2 * output


def halved(module, args):
    return tuple(x / 2 for x in args)


def doubled_back(module, grad_inputs, grad_outputs):
    return tuple(None if g is None else 2 * g for g in grad_inputs)


class Twins:
    """The two models, their optimizers, and what can be done to both."""

    def __init__(self, seed):
        choose = random.Random(seed)
        self.dtype = choose.choice([torch.float32, torch.float64])
        self.blocksize = choose.choice(BLOCKSIZES)
        self.tied = choose.random() < 0.3
        self.optimizer = OPTIMIZERS[choose.choice([*OPTIMIZERS])]
        hook_at = choose.choice([None, *LAYERS])
        pair = a_pair(choose, self.dtype, self.blocksize, self.tied, hook_at)
        self.reference, self.model, handles = pair
        self.handles = [tuple(handles)] if handles else []
        self.scale = 2 ** len(self.handles)
        self.make_optimizers()

    def make_optimizers(self):
        self.optimizers = [self.optimizer(m.parameters()) for m in (self.reference, self.model)]

    def both(self, i):
        return self.reference[i], self.model[i]

    # what is compared

    def check(self):
        self.check_parameters()
        x = torch.randn(3, SIZES[0], dtype=self.dtype)
        exact, magnitude, gradients, kinks = self.magnitudes(x)
        bound = self.bound(magnitude)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                self.close(self.model(x), exact, bound)
        if kinks:  # where a ReLU may turn over by rounding
            return
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for model, leaf in zip((self.reference, self.model), inputs, strict=True):
            model.zero_grad()
            y = model(leaf)
            y.backward(torch.ones_like(y))
        self.close(inputs[1].grad, inputs[0].grad, self.bound(gradients["x"]))
        for i in LAYERS:
            dense, layer = self.both(i)
            weight = layer.weight_values if i in SPARSE else layer.weight
            assert (weight.grad is None) == (dense.weight.grad is None)
            assert (layer.bias.grad is None) == (dense.bias.grad is None)
            if dense.bias.grad is not None:
                self.close(layer.bias.grad, dense.bias.grad, self.bound(gradients[i, "bias"]))
            if dense.weight.grad is not None:
                grad = dense_of(layer, weight.grad) if i in SPARSE else weight.grad
                self.close(grad, dense.weight.grad, self.bound(gradients[i, "weight"]))

    def check_parameters(self):
        """Equal but for what an optimizer rounds, and 0 where the mask says so."""
        eps = 64 * torch.finfo(self.dtype).eps
        for i in LAYERS:
            dense, layer = self.both(i)
            assert layer.training == dense.training
            assert layer.bias.requires_grad == dense.bias.requires_grad
            torch.testing.assert_close(layer.bias, dense.bias, rtol=eps, atol=eps)
            weight, expected = layer.weight, dense.weight * dense.mask
            if i in SPARSE:
                assert layer.weight_values.requires_grad == dense.weight.requires_grad
                weight = dense_of(layer, layer.masked_values())
                assert torch.equal(weight, layer.to_dense().weight)
            torch.testing.assert_close(weight, expected, rtol=eps, atol=eps)
            assert not weight[~dense.mask].any()
        assert (self.model[2].weight_values is self.model[4].weight_values) == self.tied

    def magnitudes(self, x):
        """Outputs of the reference in float64, and those and its gradients of the same network
        without a ReLU, of absolute values; and whether a ReLU's input is 0 to rounding."""
        leaf = x.double().abs().requires_grad_()
        exact, sums, leaves, kinks = x.double(), leaf, {"x": leaf}, False
        with torch.enable_grad():
            for i in LAYERS:
                dense = self.reference[i]
                weight = (dense.weight * dense.mask).detach().double()
                bias = dense.bias.detach().double()
                leaves[i, "weight"] = weight.abs().requires_grad_()
                leaves[i, "bias"] = bias.abs().requires_grad_()
                sums = F.linear(sums, leaves[i, "weight"], leaves[i, "bias"])
                before = 2.0 ** -sum(h is halved for h in dense._forward_pre_hooks.values())
                after = 2.0 ** sum(h is doubled for h in dense._forward_hooks.values())
                exact = F.linear(before * exact, weight, bias) * after
                if i in SPARSE:
                    kinks |= bool((exact.abs() <= self.bound(sums)).any())
                    exact = exact.relu()
            grads = torch.autograd.grad(sums, [*leaves.values()], torch.ones_like(sums))
        gradients = dict(zip(leaves, grads, strict=True))
        if self.tied:
            both = gradients[2, "weight"] + gradients[4, "weight"]
            gradients[2, "weight"] = gradients[4, "weight"] = both
        return exact, sums.detach(), gradients, kinks

    def bound(self, magnitude):
        """Two computations of it, each rounded once in each layer, there and back."""
        eps = torch.finfo(self.dtype).eps
        return 2 * 2 * len(LAYERS) * ROUNDINGS * eps * self.scale * magnitude.detach()

    def close(self, actual, expected, bound):
        error = (actual.double() - expected.double()).abs()
        assert actual.dtype == self.dtype
        assert (error <= bound + torch.finfo(self.dtype).smallest_normal).all(), error.max()

    # what people do

    def step(self, choose):
        for model in (self.reference, self.model):
            model.zero_grad()
        x = torch.randn(4, SIZES[0], dtype=self.dtype, requires_grad=True)  # as full hooks want it
        for model in (self.reference, self.model):
            if any(p.requires_grad for p in model.parameters()):
                model(x).square().mean().backward()
        for i in LAYERS:  # the same to the last bit, which `check` has found to be near
            dense, layer = self.both(i)
            weight = layer.weight_values if i in SPARSE else layer.weight
            if dense.weight.grad is not None:
                grad = dense.weight.grad
                weight.grad.copy_(stored(layer, grad) if i in SPARSE else grad)
            if dense.bias.grad is not None:
                layer.bias.grad.copy_(dense.bias.grad)
        for optimizer in self.optimizers:
            optimizer.step()
        self.check_parameters()
        self.agree()

    def agree(self):
        """Takes the rounding of the optimizers away, so that it does not add up."""
        with torch.no_grad():
            for i in LAYERS:
                dense, layer = self.both(i)
                weight = dense.weight * dense.mask
                values = layer.weight_values if i in SPARSE else layer.weight
                values.copy_(stored(layer, weight) if i in SPARSE else weight)
                layer.bias.copy_(dense.bias)

    def steps(self, choose):
        for _ in range(3):
            self.step(choose)

    def to_dtype(self, choose):
        self.dtype = choose.choice([torch.float32, torch.float64])
        name = choose.choice(["to", "type"])
        if name == "type":
            self.model.type(self.dtype)
        else:
            self.model.to(self.dtype)
        self.reference.to(self.dtype)
        self.agree()
        self.make_optimizers()

    def through_half(self, choose):
        self.model.half()
        assert self.model(torch.randn(2, SIZES[0]).half()).dtype == torch.float16
        self.model.to(self.dtype)
        self.reference.half().to(self.dtype)
        self.make_optimizers()

    def emptied_and_loaded(self, choose):
        state = copy.deepcopy(self.model.state_dict())
        if choose.random() < 0.5:
            self.model.to("meta")
        self.model.to_empty(device="cpu")
        if self.tied:
            for name in ("weight_values", "crow_indices", "col_indices", "weight_kept"):
                setattr(self.model[4], name, getattr(self.model[2], name))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* starts anew", category=UserWarning)
            self.model.load_state_dict(state)
        self.make_optimizers()

    def emptied_and_reset(self, choose):
        """Blocks anew where `to_empty` left no indices that are any."""
        self.model.to_empty(device="cpu")
        for i in LAYERS:
            dense, layer = self.both(i)
            layer.reset_parameters()
            if i in SPARSE:
                layer.weight_kept = None
                if self.tied and i == 4:
                    layer.crow_indices = self.model[2].crow_indices
                    layer.col_indices = self.model[2].col_indices
                    layer.weight_values = self.model[2].weight_values
                dense.mask = dense_of(layer, torch.ones_like(layer.weight_values)) > 0
            with torch.no_grad():
                weight = dense_of(layer, layer.weight_values) if i in SPARSE else layer.weight
                dense.weight.copy_(weight)
                dense.bias.copy_(layer.bias)
        self.make_optimizers()

    def other_state(self, choose):
        """Other blocks: the parameters stay, and the optimizers go on."""
        self.step(choose)
        reference, other, _ = a_pair(choose, self.dtype, self.blocksize, self.tied)
        before = dict(self.model.named_parameters())
        changed = [i for i in SPARSE if not self.same_blocks(i, other[i])]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* starts anew", category=UserWarning)
            self.model.load_state_dict(other.state_dict())
        self.reference.load_state_dict(reference.state_dict())
        assert all(before[name] is p for name, p in self.model.named_parameters())
        for i in changed:
            dense, layer = self.both(i)
            self.optimizers[0].state.pop(dense.weight, None)
            assert layer.weight_values not in self.optimizers[1].state

    def same_blocks(self, i, other):
        pairs = (
            (getattr(self.model[i], name), getattr(other, name))
            for name in ("crow_indices", "col_indices", "weight_kept")
        )
        return all(
            a is b if a is None or b is None else a.shape == b.shape and torch.equal(a, b)
            for a, b in pairs
        )

    def other_state_assigned(self, choose):
        reference, other, _ = a_pair(choose, self.dtype, self.blocksize, self.tied)
        self.model.load_state_dict(other.state_dict(), assign=True)
        self.reference.load_state_dict(reference.state_dict())
        if self.tied:
            self.model[4].weight_values = self.model[2].weight_values
        self.make_optimizers()

    def other_values(self, choose):
        """The same blocks: written in place, and nothing of the optimizers is lost."""
        state = copy.deepcopy(self.model.state_dict())
        with torch.no_grad():
            for i in LAYERS:
                dense, layer = self.both(i)
                if not (self.tied and i == 4):
                    dense.weight.normal_()
                dense.bias.normal_()
                weight = dense.weight * dense.mask
                state[f"{i}.bias"] = dense.bias.detach().clone()
                if i in SPARSE:
                    state[f"{i}.weight_values"] = stored(layer, weight)
                else:
                    state[f"{i}.weight"] = weight.clone()
        before = len(self.optimizers[1].state)
        self.model.load_state_dict(state)
        assert len(self.optimizers[1].state) == before

    def failed_load(self, choose):
        i = choose.choice(SPARSE)
        _, other, _ = a_pair(choose, self.dtype, self.blocksize, self.tied)
        state = copy.deepcopy(self.model.state_dict())
        name = choose.choice(["crow_indices", "col_indices", "weight_values", "bias"])
        bad = {f"{i}.{key}": t.clone() for key, t in other[i].state_dict().items()}
        if name == "bias":
            bad[f"{i}.bias"] = bad[f"{i}.bias"][1:]
        elif name == "weight_values":
            bad[f"{i}.weight_values"] = bad[f"{i}.weight_values"][1:]
        else:
            bad[f"{i}.{name}"] += 100
        for key in [key for key in state if key.startswith(f"{i}.")]:
            del state[key]
        before = self.model.state_dict()
        held = {key: t.clone() for key, t in before.items()}
        with pytest.raises(RuntimeError, match=f"'{i}'"):
            self.model.load_state_dict(state | bad, strict=choose.random() < 0.5)
        after = self.model.state_dict()
        assert before.keys() == after.keys()
        assert all(t.data_ptr() == before[key].data_ptr() for key, t in after.items())
        assert all(torch.equal(t, held[key]) for key, t in after.items())

    def rewritten_in_place(self, choose):
        """As many blocks elsewhere, by copy_ into the tensors of a state_dict."""
        for i in SPARSE if not self.tied else SPARSE[:1]:
            dense, layer = self.both(i)
            (rows, cols), nnz = layer.grid, len(layer.col_indices)
            places = sorted(choose.sample(range(rows * cols), nnz))
            crow = [sum(p < r * cols for p in places) for r in range(rows + 1)]
            state = layer.state_dict()
            state["crow_indices"].copy_(torch.tensor(crow))
            state["col_indices"].copy_(torch.tensor([p % cols for p in places]))
            kept = layer.weight_kept
            kept = torch.ones_like(layer.weight_values) if kept is None else kept.to(self.dtype)
            dense.mask = dense_of(layer, kept) > 0
            with torch.no_grad():  # no weight of the padding becomes one inside
                values = torch.randn_like(layer.weight_values)
                values = stored(layer, dense_of(layer, values))
                layer.weight_values.copy_(values)
                dense.weight.copy_(dense_of(layer, values))
        self.make_optimizers()

    def copied(self, choose):
        how = choose.choice([copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
        self.model = how(self.model)
        self.drop_hooks()
        self.make_optimizers()

    def saved_and_loaded(self, choose, path):
        """Into a fresh dense model; hooks are no part of a file, flags are the model's own."""
        save_sparse(self.model, path)
        with torch.device(choose.choice(["cpu", "meta"])):
            model = fresh(torch.float32)
        model.train(self.model.training)
        if self.tied:
            model[4].weight = model[2].weight
        for i in LAYERS:
            dense, layer = self.reference[i], model[i]
            layer.weight.requires_grad_(dense.weight.requires_grad)
            layer.bias.requires_grad_(dense.bias.requires_grad)
        for mine, now in zip(model, self.model, strict=True):
            mine.train(now.training)
        self.model = load_sparse(path, model)
        self.drop_hooks()
        self.make_optimizers()

    def drop_hooks(self):
        for i in LAYERS:
            for layer in self.both(i):
                for hooks in (
                    *(layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks),
                ):
                    hooks.clear()
        self.handles, self.scale = [], 1

    def hook(self, choose):
        if len(self.handles) < 4:
            kind, function = choose.choice(
                [
                    ("forward_hook", doubled),
                    ("forward_pre_hook", halved),
                    ("full_backward_hook", doubled_back),
                ]
            )
            layers = self.both(choose.choice(LAYERS))
            handles = tuple(getattr(m, f"register_{kind}")(function) for m in layers)
            self.handles.append(handles)
            self.scale *= 2

    def unhook(self, choose):
        if self.handles:
            for handle in self.handles.pop(choose.randrange(len(self.handles))):
                handle.remove()
            self.scale /= 2

    def tie(self, choose):
        if not self.tied:
            (a, sparse), (b, other) = self.both(2), self.both(4)
            b.weight, b.mask = a.weight, a.mask.clone()
            for name in ("weight_values", "crow_indices", "col_indices", "weight_kept"):
                setattr(other, name, getattr(sparse, name))
            self.tied = True
            self.make_optimizers()

    def untie(self, choose):
        if self.tied:
            dense, layer = self.both(4)
            dense.weight = nn.Parameter(dense.weight.detach().clone(), dense.weight.requires_grad)
            values = layer.weight_values
            layer.weight_values = nn.Parameter(values.detach().clone(), values.requires_grad)
            layer.crow_indices, layer.col_indices = (
                t.clone() for t in (layer.crow_indices, layer.col_indices)
            )
            self.tied = False
            self.make_optimizers()

    def freeze(self, choose):
        i, flag = choose.choice(LAYERS), choose.random() < 0.5
        dense, layer = self.both(i)
        kind = choose.choice(["weight", "bias"])
        getattr(dense, kind).requires_grad_(flag)
        name = "weight_values" if kind == "weight" and i in SPARSE else kind
        getattr(layer, name).requires_grad_(flag)

    def freeze_all(self, choose):
        flag = choose.random() < 0.5
        for model in (self.reference, self.model):
            model.requires_grad_(flag)

    def train_or_eval(self, choose):
        flag, i = choose.random() < 0.5, choose.choice([None, *LAYERS])
        for model in (self.reference, self.model):
            (model if i is None else model[i]).train(flag)

    def pruned_and_removed(self, choose):
        if self.tied:
            return
        i = choose.choice(SPARSE)
        dense, layer = self.both(i)
        mask = torch.rand(layer.weight_values.shape) < 0.8
        parameter = layer.weight_values
        prune.custom_from_mask(layer, "weight_values", mask)
        before = dense.mask
        dense.mask = before & (dense_of(layer, mask.to(self.dtype)) > 0)
        x = torch.randn(3, SIZES[0], dtype=self.dtype)
        exact, magnitude, *_ = self.magnitudes(x)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                self.close(self.model(x), exact, self.bound(magnitude))
        prune.remove(layer, "weight_values")
        assert layer.weight_values is parameter
        with torch.no_grad():
            dense.weight.mul_(dense.mask)
        dense.mask = before

    def data_swapped(self, choose):
        i = choose.choice(LAYERS)
        dense, layer = self.both(i)
        name = choose.choice(["weight", "bias"])
        with torch.no_grad():
            getattr(dense, name).normal_()
            new = (dense.weight * dense.mask if name == "weight" else dense.bias).clone()
        if name == "weight" and i in SPARSE:
            name, new = "weight_values", stored(layer, new)
        if choose.random() < 0.5:  # other strides
            new = new.repeat_interleave(2, -1)[..., ::2]
        getattr(layer, name).data = new

    def new_parameter(self, choose):
        i = choose.choice(LAYERS)
        dense, layer = self.both(i)
        dense.bias = nn.Parameter(torch.randn_like(dense.bias), dense.bias.requires_grad)
        layer.bias = nn.Parameter(dense.bias.detach().clone(), dense.bias.requires_grad)
        self.make_optimizers()

    def share_memory(self, choose):
        self.model.share_memory()

    def compiled(self, choose):
        if choose.random() < 1 / 32:  # it takes a second
            x = torch.randn(3, SIZES[0], dtype=self.dtype)
            exact, magnitude, *_ = self.magnitudes(x)
            torch._dynamo.reset()
            y = torch.compile(self.model, backend="aot_eager")(x)
            self.close(y, exact, self.bound(magnitude))


OPERATIONS = [
    *("step", "steps", "to_dtype", "through_half", "emptied_and_loaded", "emptied_and_reset"),
    *("other_state", "other_state_assigned", "other_values", "failed_load", "rewritten_in_place"),
    *("copied", "saved_and_loaded", "hook", "unhook", "tie", "untie", "freeze", "freeze_all"),
    *("train_or_eval", "pruned_and_removed", "data_swapped", "new_parameter", "share_memory"),
    "compiled",
]
operations = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**20)), max_size=12)


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_sparse_model_goes_through_all_that_a_dense_one_does(examples, tmp_path):
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**20), operations)
    def test(seed, sequence):
        twins = Twins(seed)
        twins.check()
        for name, number in sequence:
            rest = [tmp_path / "model"] if name == "saved_and_loaded" else []
            getattr(twins, name)(random.Random(number), *rest)
            twins.check()

    test()

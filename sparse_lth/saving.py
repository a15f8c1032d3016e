"""Whole models with sparse layers as files: any model into a file, and back into a dense one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .base import BLOCKS, BlockSparse, as_activation
from .bsr import blocksize_of
from .convert import empty, is_weighted, matrix, own_hooks, replace
from .files import FormatError, TicketError, load_tensors, save_tensors
from .huggingface import is_conv1d, refuse_from_pretrained
from .int8 import Int8SparseLinear
from .kernels.pattern import row_indices

BUILDERS: dict[str, Callable[[], nn.Module]] = {}  # of networks that a file can name


def save_sparse(model: nn.Module, path: str | Path, name: str | None = None) -> None:
    """Writes what `load_sparse` reads: every parameter and buffer, and which layers are sparse.

    name: of the network in BUILDERS, if it is one: the file can then be loaded alone
    ValueError where a tensor has no numbers, torch's prune still masks a layer, or the model keeps
    other things than tensors in its `state_dict`.
    """
    for owner, module in model.named_modules():
        if any(isinstance(h, prune.BasePruningMethod) for h in module._forward_pre_hooks.values()):
            raise ValueError(
                f"expected no masks of torch's prune, got one on {owner or 'the model'}: call "
                "sparsify_, or torch.nn.utils.prune.remove"
            )
    model = _inner(model)
    tensors, aliases, first = {}, {}, {}
    compact = _compact(model)
    for key, tensor in _tensors(model):
        if key in compact:
            continue
        if tensor.is_meta:
            raise ValueError(f"expected numbers to save, got {key} on the meta device")
        if id(tensor) in first:
            aliases[key] = first[id(tensor)]
        else:
            first[id(tensor)] = key
            tensors[key] = tensor.detach().clone()
    tensors |= {key: tensor for key, tensor in compact.items() if tensor is not None}
    if other := sorted(
        model.state_dict().keys() - tensors.keys() - aliases.keys() - compact.keys()
    ):
        raise ValueError(f"expected a state_dict of parameters and buffers, got also {other}")
    layers = {
        owner: {"activation": module.activation}
        for owner, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BlockSparse)
    }
    for owner, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Int8SparseLinear):
            layers[owner] = {"activation": module.activation, "int8_grid": [*module.grid]}
    about = {"model": name, "layers": layers, "aliases": aliases}
    save_tensors(path, "model", tensors, about)


def load_sparse(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Makes `model` the sparsified model that was saved, bit for bit, and returns it.

    path: a file of `save_sparse`, or a folder of Hugging Face's `save_pretrained`
    model: a fresh dense instance of the class that was saved, which may be on the meta device; it
        keeps its device, flags and ties, and takes the dtypes of the file. Without one, a network
        of our own that the file names, on the CPU and in eval mode.

    If it is a layer itself, the sparse layer is returned in its stead. Its parameters are other
    objects afterwards, so make optimizers after it. Raises TicketError,
    naming what is wrong, and leaves the model as it was, unless both fit.
    """
    tensors, about = _read(Path(path))
    alone = model is None
    if alone:
        if about.get("model") not in [*BUILDERS]:
            raise TicketError(
                f"{path}: expected a model of {', '.join(BUILDERS)}, got {about.get('model')!r}; "
                "load_sparse(path, model) loads into any other"
            )
        for name, tensor in tensors.items():
            wanted = torch.bfloat16 if name.endswith(".weight_scales") else torch.float32
            if tensor.is_floating_point() and tensor.dtype != wanted:
                raise TicketError(f"{path}: expected {name} in {wanted}, got {tensor.dtype}")
            if not tensor.isfinite().all():
                raise TicketError(f"{path}: expected finite numbers in {name}")
        model = BUILDERS[about["model"]]()
    given, model = model, _inner(model)
    held = ("_modules", "_parameters", "_buffers", "_forward_pre_hooks")
    before = [(getattr(m, kind), {**getattr(m, kind)}) for m in model.modules() for kind in held]
    modules = [*model.modules()]
    try:
        made = _sparse_layers(model, tensors, about["layers"])
        replace(model, made)
        if model in made:
            given = model = made[model]
        _fill(model, tensors)
        refuse_from_pretrained(model)
    except BaseException as error:
        for now, then in before:
            now.clear()
            now.update(then)
        for module in modules:
            own_hooks(module)
        if not isinstance(error, RuntimeError | TypeError | ValueError):
            raise
        raise TicketError(f"{path}: {error}") from error
    return given.eval() if alone else given


def _inner(model: nn.Module) -> nn.Module:
    """The model itself, where `torch.compile` has wrapped it."""
    return getattr(model, "_orig_mod", model)


def _compact(model: nn.Module) -> dict[str, Tensor | None]:
    """What a file has of the indices of int8 layers: `block_bits`, uint8, a bit for each block of
    the grid, row by row; and by None what it has not."""
    found = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Int8SparseLinear):
            rows, cols = module.grid
            kept = np.zeros((rows, cols), bool)
            at = row_indices(module.crow_indices.cpu(), len(module.col_indices))
            kept[at.numpy(), module.col_indices.cpu().numpy()] = True
            found |= {_join(owner, n): None for n in ("crow_indices", "col_indices")}
            found[_join(owner, "block_bits")] = torch.from_numpy(np.packbits(kept))
    return found


def _indices(bits: Tensor, grid: list[int], blocks: int) -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices of `block_bits`; ValueError unless of so many blocks."""
    rows, cols = grid if len(grid) == 2 else (0, 0)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or len(bits) != -(-rows * cols // 8):
        raise ValueError(f"expected block_bits of a grid of {grid}, got {tuple(bits.shape)}")
    kept = np.unpackbits(bits.numpy(), count=rows * cols).reshape(rows, cols)
    if kept.sum() != blocks:
        raise ValueError(f"expected block_bits of {blocks} blocks, got {kept.sum()}")
    crow = np.concatenate([[0], kept.sum(1, dtype=np.int64).cumsum()])
    return tuple(torch.from_numpy(t.astype(np.int32)) for t in (crow, kept.nonzero()[1]))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under each of its names, also buffers that are not saved."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors under all of their names, and what the file says of them."""
    if path.is_dir():
        tensors, about = _read_folder(path), {}
    else:
        try:
            tensors, about = load_tensors(path, "model")
        except (OSError, FormatError) as error:
            raise TicketError(str(error)) from error
    about = about if isinstance(about, dict) else {"model": None}
    layers, aliases = about.get("layers", None if about else {}), about.get("aliases", {})
    if isinstance(layers, list):  # of files before version 0.2
        layers = {name: {} for name in layers if isinstance(name, str)}
    named = isinstance(layers, dict) and all(isinstance(kept, dict) for kept in layers.values())
    known = isinstance(aliases, dict) and all(
        isinstance(first, str) and first in tensors for first in aliases.values()
    )
    if not (named and known):
        raise TicketError(f"{path}: expected layers and aliases of its tensors, got {about}")
    tensors = {_renamed(name, tensors): tensor for name, tensor in tensors.items()}
    tensors |= {name: tensors[first] for name, first in aliases.items()}
    for owner, kept in layers.items():
        if "int8_grid" in kept:
            try:
                bits, values = (tensors[_join(owner, n)] for n in ("block_bits", "weight_values"))
                crow, col = _indices(bits, kept["int8_grid"], len(values))
            except (KeyError, TypeError, ValueError) as error:
                raise TicketError(f"{path}: expected an int8 layer {owner}: {error!r}") from error
            del tensors[_join(owner, "block_bits")]
            tensors |= {_join(owner, "crow_indices"): crow, _join(owner, "col_indices"): col}
    return tensors, {**about, "layers": layers}


def _read_folder(path: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, or of the parts that its index names."""
    index, files = path / "model.safetensors.index.json", ["model.safetensors"]
    try:
        if index.exists():
            files = sorted({*json.loads(index.read_text())["weight_map"].values()})
        parts = [safetensors.torch.load_file(path / Path(file).name) for file in files]
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
        safetensors.SafetensorError,
    ) as error:
        raise TicketError(f"{path}: expected a folder of save_pretrained: {error!r}") from error
    return {name: tensor for part in parts for name, tensor in part.items()}


def _renamed(name: str, tensors: dict[str, Tensor]) -> str:
    """`weight_values` for what files before version 0.2 call `values`."""
    owner, _, kind = name.rpartition(".")
    is_old = kind == "values" and _join(owner, "crow_indices") in tensors
    return _join(owner, "weight_values") if is_old else name


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


def _sparse_layers(
    model: nn.Module, tensors: dict[str, Tensor], layers: dict[str, dict]
) -> dict[nn.Module, BlockSparse]:
    """For each dense layer that the file has sparse, the sparse one; ValueError if it cannot be."""
    modules, made, tied = dict(model.named_modules(remove_duplicate=False)), {}, {}
    for name in layers:
        if _join(name, "crow_indices") not in tensors:
            raise ValueError(f"{name}: expected crow_indices of a sparse layer, got none")
    for name in tensors:
        owner, _, kind = name.rpartition(".")
        layer = modules.get(owner)
        if kind != "crow_indices" or layer in made or isinstance(layer, BlockSparse):
            continue
        if not is_weighted(layer):
            what = "no module of this name" if layer is None else type(layer).__name__
            raise ValueError(f"{owner}: expected a layer with a weight, got {what}")
        bias, given = layer.bias, {k: tensors.get(_join(owner, k)) for k in (*BLOCKS, "bias")}
        try:
            if given["weight_values"] is None or given["col_indices"] is None:
                raise ValueError("expected weight_values and col_indices with crow_indices")
            if (bias is None) != (given["bias"] is None):
                raise ValueError(f"expected {'a' if given['bias'] is None else 'no'} bias")
            if "int8_grid" in layers.get(owner, {}):
                made[layer] = _int8_layer(layer, given, tensors, owner, layers[owner])
                continue
            sparse = empty(layer, blocksize_of(given["weight_values"]))._hold(**given)
            sparse.activation = as_activation(layers.get(owner, {}).get("activation", "none"))
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{owner}: {error}") from error
        sparse.weight_values = tied.setdefault(layer.weight, sparse.weight_values)
        sparse.weight_values.requires_grad_(layer.weight.requires_grad)
        if bias is not None:
            sparse.bias = tied.setdefault(bias, sparse.bias)
            sparse.bias.requires_grad_(bias.requires_grad)
        made[layer] = sparse
    return made


def _int8_layer(layer: nn.Module, given: dict, tensors: dict, owner: str, about: dict) -> nn.Module:
    scales = tensors.get(_join(owner, "weight_scales"))
    if scales is None or not (isinstance(layer, nn.Linear) or is_conv1d(layer)):
        raise ValueError(f"expected weight_scales and a Linear, got {type(layer).__name__}")
    moved = [
        t if t is None or layer.weight.is_meta else t.to(layer.weight.device)
        for t in (
            given["weight_values"],
            scales,
            given["crow_indices"],
            given["col_indices"],
            given["bias"],
        )
    ]
    values, scales, crow, col, bias = moved
    features = matrix(layer, layer.weight).shape[::-1]
    activation = about.get("activation", "none")
    return Int8SparseLinear(values, scales, (crow, col), bias, features, activation)


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Loads all of the tensors, in their dtypes, to where the model is, tied as in the model and
    as in the file."""
    now, given = dict(_tensors(model)), dict(tensors)
    ties = _names(now)
    for twins in ties:
        known = [given[name] for name in twins if name in given]
        if not all(known[0] is other or torch.equal(known[0], other) for other in known):
            raise ValueError(
                f"expected the same numbers for {' and '.join(twins)}, which are one tensor of the "
                "model, got others: load into a model in which they are not tied"
            )
        given |= {name: known[0] for name in twins if known}
    ties += _names({name: given[name] for name in given if name in now})
    for name, tensor in now.items():
        if name in given and given[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"expected {name} like {tensor.dtype}, got {given[name].dtype}")
        if name in given and not tensor.is_meta:
            given[name] = given[name].to(tensor.device)
    transient = now.keys() - model.state_dict().keys()
    if lost := sorted(name for name in transient - given.keys() if now[name].is_meta):
        raise ValueError(f"expected {lost} in the file, or a model that is not on the meta device")
    state = {name: tensor for name, tensor in given.items() if name not in transient}
    model.load_state_dict(state, assign=True)
    for name in transient & given.keys():
        _put(model, name, given[name])
    for first, *others in ties:
        for name in others:
            _put(model, name, dict(_tensors(model))[first])


def _names(tensors: dict[str, Tensor]) -> list[list[str]]:
    """The names of each tensor."""
    names = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return [*names.values()]


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    (module._parameters if kind in module._parameters else module._buffers)[kind] = tensor

"""Find lottery tickets, run them as block-sparse layers, measure whether they are faster."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

if find_spec(f"{__name__}.kernels") is None:  # a checkout: it is the kernels/ folder beside this
    _folder = Path(__file__).parent.parent / "kernels"
    _spec = spec_from_file_location(
        f"{__name__}.kernels", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    sys.modules[_spec.name] = kernels = module_from_spec(_spec)
    _spec.loader.exec_module(kernels)

from .conv import SparseConv2d
from .convert import Conversion, conversion, sparsify_
from .int8 import Int8SparseLinear
from .kernels import backends
from .layers import SparseLinear
from .masks import block_l1_unstructured
from .program import models as _models  # noqa: F401, whose networks load_sparse can name
from .quantize import quantize_
from .saving import load_sparse, save_sparse
from .search import Search, find_ticket
from .sequential import SparseSequential
from .ticket import Ticket, TicketError
from .timing import benchmark

__all__ = [
    "Conversion",
    "Int8SparseLinear",
    "Search",
    "SparseConv2d",
    "SparseLinear",
    "SparseSequential",
    "Ticket",
    "TicketError",
    "backends",
    "benchmark",
    "block_l1_unstructured",
    "conversion",
    "find_ticket",
    "load_sparse",
    "quantize_",
    "save_sparse",
    "sparsify_",
]

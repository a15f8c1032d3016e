"""Find lottery tickets, run them as block-sparse layers, measure whether they are faster."""

from pathlib import Path

_root = Path(__file__).parent.parent
if (_root / "pyproject.toml").exists():  # a checkout: `sparse_lth.kernels` is its kernels/ folder
    __path__.append(str(_root))

from .conv import SparseConv2d  # noqa: E402
from .convert import Conversion, conversion, sparsify_  # noqa: E402
from .kernels import backends  # noqa: E402
from .layers import SparseLinear  # noqa: E402
from .masks import block_l1_unstructured  # noqa: E402
from .sequential import SparseSequential  # noqa: E402
from .ticket import Ticket, TicketError, load_sparse  # noqa: E402

__all__ = [
    "Conversion",
    "SparseConv2d",
    "SparseLinear",
    "SparseSequential",
    "Ticket",
    "TicketError",
    "backends",
    "block_l1_unstructured",
    "conversion",
    "load_sparse",
    "sparsify_",
]

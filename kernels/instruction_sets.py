"""Which instruction set the native kernels use, each type of its own list."""

from collections.abc import Sequence
from contextvars import ContextVar

# All that there are; where one is chosen, a type that has no kernels for it takes the next
ORDER = (
    "avx512_jit",
    "avx512_vnni",
    "avx512_bf16",
    "avx512",
    "avx_vnni",
    "avx2",
    "baseline",
)

chosen: ContextVar[str | None] = ContextVar("chosen_instruction_set", default=None)


def index_of(usable: Sequence[str], name: str | None = None) -> int:
    """Of the first that `name`, or else the context, allows; usable: of a type, the best first."""
    name = name or chosen.get()
    if name is None:
        return 0
    return next(i for i, known in enumerate(usable) if ORDER.index(known) >= ORDER.index(name))

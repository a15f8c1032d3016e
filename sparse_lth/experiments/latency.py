"""How long networks take for one image on one thread of a CPU, and the columns that say so."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from functools import partial

import torch
from torch import nn

from ..kernels import backend
from ..program.measure import device_name
from ..sequential import SparseSequential
from ..timing import Times, in_turn
from .results import MACHINE, TIMES, Row


def latency(
    tickets: Mapping[Hashable, nn.Module], dense: Mapping[Hashable, nn.Module], unpruned: Hashable
) -> dict[Hashable, Row]:
    """The columns TIMES and MACHINE of every network; unpruned: the dense one to compare with.

    A dense network is run as plain layers and in one call, as tickets are, and the faster counts:
    what is compared is sparsity.
    """
    forms = {(key, "one call"): network for key, network in tickets.items()}
    for key, network in dense.items():
        layers = OrderedDict(network.named_children())
        forms[key, "layers"] = nn.Sequential(layers).eval()
        forms[key, "one call"] = SparseSequential(layers).eval()
    threads, image = torch.get_num_threads(), torch.zeros(1, 1, 28, 28)
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            measured = in_turn({key: partial(form, image) for key, form in forms.items()})
    finally:
        torch.set_num_threads(threads)
    times: dict[Hashable, Times] = {}
    for (key, _), form in measured.items():
        times[key] = min(times.get(key, form), form, key=lambda form: form.p50)
    machine = dict(zip(MACHINE, (device_name("cpu"), 1, backend(image).name), strict=True))
    rows = {}
    for key, form in times.items():
        values = (1e6 * form.p50, 1e6 * form.p20, 1e6 * form.p80, times[unpruned].p50 / form.p50)
        rows[key] = dict(zip(TIMES, values, strict=True)) | machine
    return rows

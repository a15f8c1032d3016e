"""What is particular to the models of Hugging Face's transformers, which need not be installed."""

import sys

from torch import nn

from .base import BlockSparse

HOW_TO_LOAD = "sparse_lth.load_sparse(folder, Model(config)) loads this, from_pretrained cannot"


def is_conv1d(layer: nn.Module | None) -> bool:
    """Whether it is a `Conv1D`: a linear layer that stores its weight as (in, out)."""
    kind = type(layer)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def refuse_from_pretrained(model: nn.Module) -> None:
    """Has `save_pretrained` of models with sparse layers write what only `load_sparse` reads.

    `from_pretrained` would draw the weights of those layers anew, with no more than a word in the
    log. It raises ValueError where the config has a `quantization_config` without a `quant_method`.
    The tensors keep the names of their modules, where some families use those of old files.
    """
    library = sys.modules.get("transformers.modeling_utils")
    for module in model.modules() if library else ():
        if not isinstance(module, library.PreTrainedModel):
            continue
        is_sparse = any(isinstance(layer, BlockSparse) for layer in module.modules())
        if is_sparse and getattr(module.config, "quantization_config", None) is None:
            module.config.quantization_config = {"sparse_lth": HOW_TO_LOAD}
        if is_sparse:
            module._weight_conversions = []

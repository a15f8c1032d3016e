"""Tiny, randomly initialised models of other libraries, and how they are pruned."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparse_lth import block_l1_unstructured, sparsify_
from sparse_lth.huggingface import is_conv1d

BLOCKSIZES = {"blocks": (8, 4), "unstructured": (1, 1)}  # "blocks" masks half of some blocks
ATTENTION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Case(NamedTuple):
    """A model of another library: what makes it, what it is called with, what it computes."""

    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    output: Callable = lambda out: out
    pruned: int = 1  # how many of its layers are pruned, and so converted


def _torchvision(module: str, name: str, config: Callable) -> Case:
    def make() -> nn.Module:
        found = importlib.import_module(f"torchvision.models.{module}")
        return getattr(found, name)(**config(found), num_classes=24)

    return make, lambda: {"x": torch.randn(2, 3, 32, 32)}


def _timm(name: str, **config):
    def make() -> nn.Module:
        kind = getattr(importlib.import_module("timm.models"), name)
        return kind(img_size=32, embed_dim=32, num_classes=24, **config)

    return make, lambda: {"x": torch.randn(2, 3, 32, 32)}


def _transformers(name: str, inputs: Callable, **config):
    def make():
        library = importlib.import_module("transformers")
        kind = getattr(library, name)
        return kind(kind.config_class(**config))

    return make, inputs


def _tokens():
    return {"input_ids": torch.randint(3, 64, (2, 9)), "use_cache": False}


def _text():
    return {"input_ids": torch.randint(3, 64, (2, 9))}


def _logits(out):
    return out.logits


CASES = {
    "torchvision ViT": Case(
        "torchvision",
        *_torchvision(
            "vision_transformer",
            "VisionTransformer",
            lambda _: {
                "image_size": 32,
                "patch_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "hidden_dim": 32,
                "mlp_dim": 64,
            },
        ),
        pruned=5,
    ),
    "torchvision Swin": Case(
        "torchvision",
        *_torchvision(
            "swin_transformer",
            "SwinTransformer",
            lambda _: {
                "patch_size": [4, 4],
                "embed_dim": 16,
                "depths": [2, 1],
                "num_heads": [2, 2],
                "window_size": [4, 4],
                "stochastic_depth_prob": 0.0,
            },
        ),
        pruned=14,
    ),
    "torchvision ConvNeXt": Case(
        "torchvision",
        *_torchvision(
            "convnext",
            "ConvNeXt",
            lambda found: {
                "block_setting": [
                    found.CNBlockConfig(16, 32, 1),
                    found.CNBlockConfig(32, None, 1),
                ],
                "layer_scale": 1.0,
            },
        ),
        pruned=5,
    ),
    "timm ViT": Case(
        "timm", *_timm("VisionTransformer", patch_size=16, depth=2, num_heads=2), pruned=9
    ),
    "timm MLP-Mixer": Case("timm", *_timm("MlpMixer", patch_size=8, num_blocks=2), pruned=9),
    "BERT": Case(
        "transformers",
        *_transformers(
            "BertForMaskedLM",
            _text,
            **ATTENTION,
            intermediate_size=64,
            vocab_size=64,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        _logits,
        pruned=13,
    ),
    "GPT-2": Case(
        "transformers",
        *_transformers(
            "GPT2LMHeadModel",
            _tokens,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **TOKENS,
        ),
        _logits,
        pruned=8,
    ),
    "T5": Case(
        "transformers",
        *_transformers(
            "T5ForConditionalGeneration",
            lambda: _tokens() | {"decoder_input_ids": torch.randint(3, 64, (2, 5))},
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            vocab_size=64,
            decoder_start_token_id=0,
        ),
        _logits,
        pruned=16,
    ),
    "Llama": Case(
        "transformers",
        *_transformers(
            "LlamaForCausalLM",
            _tokens,
            **ATTENTION,
            **TOKENS,
            num_key_value_heads=1,
            intermediate_size=64,
            max_position_embeddings=32,
        ),
        _logits,
        pruned=15,
    ),
    "ViT": Case(
        "transformers",
        *_transformers(
            "ViTForImageClassification",
            lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
            **ATTENTION,
            intermediate_size=64,
            image_size=32,
            patch_size=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=24,
        ),
        _logits,
        pruned=13,
    ),
    "Whisper": Case(
        "transformers",
        *_transformers(
            "WhisperForConditionalGeneration",
            lambda: {
                "input_features": torch.randn(2, 8, 32),
                "decoder_input_ids": torch.randint(3, 64, (2, 5)),
                "use_cache": False,
            },
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            dropout=0.0,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **TOKENS,
        ),
        _logits,
        pruned=16,
    ),
    "Mamba": Case(
        "transformers",
        *_transformers(
            "MambaForCausalLM",
            _tokens,
            hidden_size=32,
            state_size=4,
            num_hidden_layers=2,
            **TOKENS,
        ),
        _logits,
        pruned=8,
    ),
}


def pruned_model(name: str, how: str) -> nn.Module:
    """The model with its linear layers masked by torch's prune; the same whenever it is made."""
    model = fresh_model(name)
    for layer in _prunable(model):
        if how == "blocks":
            block_l1_unstructured(layer, "weight", 0.6, (4, 4))
        else:
            prune.l1_unstructured(layer, "weight", 0.8)
    return model.eval()


def sparse_model(name: str, how: str) -> nn.Module:
    return sparsify_(pruned_model(name, how), BLOCKSIZES[how], max_density=1.0)


def dense_twin(name: str, how: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with the same weights pruned for good, and the mask of each parameter pruned."""
    model, masks = pruned_model(name, how), {}
    for layer, module in model.named_modules():
        if hasattr(module, "weight_mask"):
            masks[f"{layer}.weight"] = module.weight_mask.bool()
            prune.remove(module, "weight")
    return model, masks


def fresh_model(name: str) -> nn.Module:
    """The model as somebody's script makes it, no parameter of it all zero."""
    case = CASES[name]
    pytest.importorskip(case.library)
    torch.manual_seed(0)
    model = case.make()
    for parameter in model.parameters():
        if not parameter.is_meta and not parameter.any():  # as new heads and biases are
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs_of(name: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return CASES[name].inputs()


def _prunable(model: nn.Module) -> list[nn.Module]:
    """The linear layers that have a weight of their own and are called as layers."""
    tied = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    attention = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return [
        layer
        for layer in model.modules()
        if (isinstance(layer, nn.Linear) or is_conv1d(layer))
        and layer not in attention
        and not any(layer.weight is weight for weight in tied)
    ]

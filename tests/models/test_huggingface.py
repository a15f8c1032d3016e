"""Sparsified transformers models with the library's own files and methods."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparse_lth import SparseLinear, block_l1_unstructured, load_sparse, sparsify_
from tests.bounds import assert_as_exact_as
from tests.models.zoo import CASES, fresh_model, inputs_of, sparse_model

transformers = pytest.importorskip("transformers")

FAMILIES = [name for name, case in CASES.items() if case.library == "transformers"]


def _logits(model, name):
    with torch.no_grad():
        return model(**inputs_of(name)).logits


def _dense_again(model):
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, SparseLinear):
                setattr(parent, child, layer.to_dense())
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_saved_folder_comes_back_by_load_sparse_only(name, shards, tmp_path):
    model = sparse_model(name, "blocks")
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    with pytest.raises(ValueError, match="quantization config"):
        type(model).from_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "load_sparse(folder, Model(config))" in about["sparse_lth"]

    config = transformers.AutoConfig.from_pretrained(tmp_path)
    loaded = load_sparse(tmp_path, type(model)(config)).eval()
    assert torch.equal(_logits(loaded, name), _logits(model, name))
    loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="quantization config"):
        type(model).from_pretrained(tmp_path / "again")


@pytest.mark.slow
def test_no_process_mistakes_a_folder_for_a_dense_model(tmp_path):
    sparse_model("GPT-2", "blocks").save_pretrained(tmp_path)
    script = (
        "import sys, transformers\n"
        "try: transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError: sys.exit('refused')"
    )
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert run.stderr.endswith("refused\n"), run.stderr


def test_a_part_of_a_model_is_marked_too_and_a_dense_model_is_not(tmp_path):
    sparse_model("T5", "blocks").encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="quantization config"):
        transformers.T5EncoderModel.from_pretrained(tmp_path / "encoder")
    dense = fresh_model("GPT-2")
    with pytest.warns(UserWarning, match="converted no layer"):
        sparsify_(dense)
    dense.save_pretrained(tmp_path / "dense")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    assert torch.equal(_logits(loaded, "GPT-2"), _logits(dense, "GPT-2"))


@pytest.mark.parametrize("name", ["GPT-2", "T5", "Llama", "Whisper", "Mamba"])
def test_generate_makes_the_tokens_of_the_dense_model(name):
    model = sparse_model(name, "blocks")
    first = next(iter(inputs_of(name).values()))
    auto = {"max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(first, **auto)
    assert torch.equal(tokens, _dense_again(model).generate(first, **auto))


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "T5", "Llama"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = sparse_model(name, "blocks").train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()
    for each in (model, twin):
        each(**inputs_of(name)).logits.square().mean().backward()
    for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "T5", "Llama"])
def test_other_dtypes_compute_as_the_dense_model_does(name, dtype):
    model = sparse_model(name, "blocks").to(dtype)
    exact = _logits(_dense_again(model).double(), name)
    assert_as_exact_as(_logits(model, name), _logits(_dense_again(model), name), exact)


def test_embeddings_resize_under_a_tied_and_under_a_sparse_head():
    tied = sparse_model("GPT-2", "blocks")
    before = _logits(tied, "GPT-2")
    tied.resize_token_embeddings(70, mean_resizing=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    torch.testing.assert_close(_logits(tied, "GPT-2")[..., :64], before)

    own = sparse_model("Llama", "blocks")
    assert isinstance(own.lm_head, SparseLinear)
    before = _logits(own, "Llama")
    with pytest.raises(TypeError, match="SparseLinear"):  # which transformers cannot enlarge
        copy.deepcopy(own).resize_token_embeddings(70, mean_resizing=False)
    own.lm_head = own.lm_head.to_dense()
    own.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(_logits(own, "Llama")[..., :64], before)


class _Adapter(nn.Module):
    """LoRA, as peft wraps a layer that it knows by its sizes and weight."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        weight = base_layer.weight
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Linear(base_layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.to(device=weight.device, dtype=weight.dtype)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def test_adapters_around_sparse_layers_train_alone():
    model = sparse_model("Llama", "blocks").requires_grad_(False)
    before = _logits(model, "Llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = _Adapter(layer.self_attn.q_proj)
    assert torch.equal(_logits(model, "Llama"), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    base = copy.deepcopy(model.model.layers[0].self_attn.q_proj.base_layer.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs_of("Llama")).logits.square().mean().backward()
        optimizer.step()
    assert not torch.equal(_logits(model, "Llama"), before)
    for name, tensor in model.model.layers[0].self_attn.q_proj.base_layer.state_dict().items():
        assert torch.equal(tensor, base[name])


def test_an_adapter_that_starts_at_zero_is_left():
    model = fresh_model("Llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj = _Adapter(layer.self_attn.q_proj)
        block_l1_unstructured(layer.self_attn.q_proj.base_layer, "weight", 0.5)
    before = _logits(model, "Llama")
    sparsify_(model, max_density=1.0)
    adapter = model.model.layers[0].self_attn.q_proj
    assert isinstance(adapter.base_layer, SparseLinear)
    assert type(adapter.up) is nn.Linear
    torch.testing.assert_close(_logits(model, "Llama"), before)


def test_conv1d_blocks_are_of_outputs_by_inputs():
    model = fresh_model("GPT-2")
    layer = model.transformer.h[0].mlp.c_fc  # stored (32 inputs, 128 outputs)
    block_l1_unstructured(layer, "weight", 0.5, (16, 2))
    assert prune.is_pruned(model)
    sparsify_(model, (16, 2), max_density=1.0)
    assert model.transformer.h[0].mlp.c_fc.density == 0.5

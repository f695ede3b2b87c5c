"""Names and layers behind whatever stands around them."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from evatune.modeling.wrappers import (
    adapted,
    adapted_inside,
    base_name,
    describe,
    is_wrapper,
    named_layers,
    peft_name,
    peft_names,
    plain_layer,
    unwrapped,
    without_wrappers,
)
from tests.helpers import Toy, tiny_bert

torch.set_num_threads(1)


def test_a_name_is_that_of_the_base_model_whatever_is_around_it() -> None:
    model = get_peft_model(Toy(), LoraConfig(r=2, target_modules=["q"]))
    wrapped = "base_model.model.blocks.0.q.base_layer"
    assert base_name(wrapped) == peft_name(without_wrappers(wrapped)) == "blocks.0.q"
    assert base_name("_orig_mod.blocks.0._fsdp_wrapped_module.q") == "blocks.0.q"
    names = peft_names(model)
    assert {name for name, _ in Toy().named_modules()} <= names
    assert not any("lora" in name or "base_layer" in name for name in names)


def test_wrappers_for_training_are_looked_through() -> None:
    model = Toy()
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(model) is model
    checkpointed = checkpoint_wrapper(model.blocks[0])
    assert plain_layer(checkpointed) is model.blocks[0]


def test_the_layers_inside_adapters_are_named_once() -> None:
    plain = [name for name, _, _ in named_layers(Toy())]
    model = get_peft_model(Toy(), LoraConfig(r=2, target_modules=["q", "down"]))
    layers = {name: (module, layer) for name, module, layer in named_layers(model)}
    assert set(plain) <= set(layers)
    module, layer = layers["blocks.0.q"]
    assert is_wrapper(module)
    assert type(layer) is nn.Linear
    assert not is_wrapper(layer)


def test_the_one_model_with_adapters_inside_is_found() -> None:
    adapted_model = get_peft_model(Toy(), LoraConfig(r=2, target_modules=["q"]))
    policy = nn.ModuleDict({"policy": adapted_model, "value": Toy()})
    assert adapted(policy) is adapted_model
    assert adapted(Toy().blocks[0].q).__class__ is nn.Linear
    assert list(adapted_inside(policy)) == ["policy"]


def test_a_model_is_described_by_its_class_and_the_name_of_its_weights() -> None:
    assert describe(Toy()) == "Toy"
    model = tiny_bert()
    model.config._name_or_path = "some/bert"
    assert describe(model) == "BertModel some/bert"
    assert describe(get_peft_model(model, LoraConfig(r=2))) == "BertModel some/bert"

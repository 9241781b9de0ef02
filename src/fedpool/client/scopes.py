"""Which of a module's tensors are exchanged, and under which names.

A scope gets a module and the received names, and maps each name in transit to the module's own.
PEFT has two names for a tensor of an adapter: the module's own, `...lora_A.default.weight`, and the
one from `get_peft_model_state_dict`, without the adapter's name. Both are accepted, and the update
uses the received ones.
"""

import sys
from collections.abc import Callable, Collection, Mapping

import torch

Names = Mapping[str, str]
"""Name of a tensor in transit -> the module's own name."""

Scope = Callable[[torch.nn.Module, Collection[str]], Names]


def whole(module: torch.nn.Module, received: Collection[str]) -> Names:
    """The whole state dict: parameters and persistent buffers."""
    return {name: name for name in module.state_dict()}


def trainable_params(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The parameters that require a gradient: the adapters of a PEFT model."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def trainable(module: torch.nn.Module, received: Collection[str]) -> Names:
    """The parameters that require a gradient; for a PEFT model, under the names that were
    received.
    """
    return _closest(_trained_forms(module), received)


def automatic(module: torch.nn.Module, received: Collection[str]) -> Names:
    """The adapters of a PEFT model, unless the received model is the whole one; all of any other
    model.
    """
    if not is_peft(module):
        return whole(module, received)
    return _closest([*_trained_forms(module), whole(module, received)], received)


def prefixed(scope: Scope, prefix: str) -> Scope:
    """A scope with prefixed names. Received names without the prefix are accepted, and sent back
    without.
    """

    def names(module: torch.nn.Module, received: Collection[str]) -> Names:
        bare = {name.removeprefix(prefix): name for name in received}
        return {bare.get(name, prefix + name): own for name, own in scope(module, bare.keys()).items()}

    return names


def is_peft(module: torch.nn.Module) -> bool:
    """Whether a module is a PEFT model; doesn't import PEFT."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.PeftModel)


def advice(module: torch.nn.Module) -> str:
    """The remedy if a received model doesn't fit, or "" if the module's type suggests none."""
    if not is_peft(module):
        return ""
    return (
        '. This is a PEFT model: flare.patch(trainer, params_scope="trainable") exchanges its adapters only; give the recipe '
        "just these as its model, peft.get_peft_model_state_dict(model)"
    )


def _trained_forms(module: torch.nn.Module) -> list[Names]:
    forms: list[Names] = [{name: name for name in trainable_params(module)}]
    if is_peft(module):
        forms.append(_saved_names(module))
    return forms


def _saved_names(module: torch.nn.Module) -> Names:
    """The names under which PEFT saves the active adapter, mapped to the module's own. The saved
    tensors are the module's, so identity matches them.
    """
    import peft

    state = module.state_dict()
    own = {id(value): name for name, value in state.items()}
    # Resized embeddings have the same name in both forms; to look for them, PEFT would query the
    # hub.
    saved = peft.get_peft_model_state_dict(
        module, state, adapter_name=str(module.active_adapter), save_embedding_layers=False
    )
    return {name: own[id(value)] for name, value in saved.items() if id(value) in own}


def _closest(forms: list[Names], received: Collection[str]) -> Names:
    """The form that differs least from the received names: the first one on a tie or if none
    were received.
    """
    return min(forms, key=lambda names: len(names.keys() ^ set(received)) if received else 0)

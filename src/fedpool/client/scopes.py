"""Which of a module's tensors travel, and under which names.

A scope is given a module and the names that were received, and says for each name that travels
which of the module's own it is. PEFT has two names for a tensor of an adapter: the module's own,
`...lora_A.default.weight`, and the one without the adapter's name that `get_peft_model_state_dict`
gives. Both fit: whichever was received is sent back.
"""

import sys
from collections.abc import Callable, Collection, Mapping

import torch

Names = Mapping[str, str]
"""Name under which a tensor travels -> the module's own name."""

Scope = Callable[[torch.nn.Module, Collection[str]], Names]


def whole(module: torch.nn.Module, received: Collection[str]) -> Names:
    """The state dict: parameters and persistent buffers."""
    return {name: name for name in module.state_dict()}


def trainable_params(module: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """Only the parameters that require a gradient: the adapters of a PEFT model."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def trainable(module: torch.nn.Module, received: Collection[str]) -> Names:
    """The parameters that require a gradient; of a PEFT model in the form that was received."""
    return _closest(_trained_forms(module), received)


def automatic(module: torch.nn.Module, received: Collection[str]) -> Names:
    """The adapters of a PEFT model, unless the whole of it was received; of another model
    everything.
    """
    if not is_peft(module):
        return whole(module, received)
    return _closest([*_trained_forms(module), whole(module, received)], received)


def prefixed(scope: Scope, prefix: str) -> Scope:
    """A scope whose names travel with a prefix. A received name that lacks it fits, too, and
    goes back without.
    """

    def names(module: torch.nn.Module, received: Collection[str]) -> Names:
        bare = {name.removeprefix(prefix): name for name in received}
        return {bare.get(name, prefix + name): own for name, own in scope(module, bare.keys()).items()}

    return names


def is_peft(module: torch.nn.Module) -> bool:
    """Whether a module is a model with adapters of PEFT's; PEFT is not imported for that."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.PeftModel)


def advice(module: torch.nn.Module) -> str:
    """What to do when a received model does not fit, where the kind of module says something
    about it.
    """
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
    """The names that PEFT saves the active adapter under; its values are the module's own
    tensors, which tells which is which.
    """
    import peft

    state = module.state_dict()
    own = {id(value): name for name, value in state.items()}
    # Embeddings that were resized have one name in both forms; to look for them PEFT would ask the
    # hub.
    saved = peft.get_peft_model_state_dict(
        module, state, adapter_name=str(module.active_adapter), save_embedding_layers=False
    )
    return {name: own[id(value)] for name, value in saved.items() if id(value) in own}


def _closest(forms: list[Names], received: Collection[str]) -> Names:
    """The form that differs least from what was received, the first of several; the first where
    nothing was.
    """
    return min(forms, key=lambda names: len(names.keys() ^ set(received)) if received else 0)

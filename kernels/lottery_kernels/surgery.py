"""Layers exchanged in a module tree, with all that hangs on them besides their parameters."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Container, Mapping

from torch import nn

from . import masked, replay

HOOKS = [key for key in vars(nn.Module()) if "hook" in key]  # the attributes that hold hooks, most of them dicts

RECORD = "sparsify_choice"  # the attribute of a converted layer that says what was chosen for it, and why

# A child's place: its parent's dict of children, and the name there.
Place = tuple[dict[str, nn.Module | None], str, nn.Module]


def places_of(layers: Container[nn.Module], model: nn.Module) -> list[Place]:
    """Where the layers hang in the model; a shared one hangs in several places."""
    found = ((parent._modules, key, child) for parent in model.modules() for key, child in parent._modules.items())
    return [(children, key, child) for children, key, child in found if child is not None and child in layers]


def install(replacements: Mapping[nn.Module, nn.Module], places: list[Place], model: nn.Module) -> nn.Module:
    """Puts each layer's replacement, or else itself, in its places. Returns the model, which may be such a layer."""
    replay.forget()
    for children, key, layer in places:
        children[key] = replacements.get(layer, layer)
    return replacements.get(model, model)


def change_classes(model: nn.Module, classes: Mapping[type, type]) -> nn.Module:
    """Changes the class of every module that is exactly of one of `classes`, in place; all else stays."""
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model


def take_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Gives `new` the mode, the hooks and the user's attributes of `old`. The dicts of hooks are handed on themselves,
    so that the handles which remove hooks keep working; the hook of `torch.nn.utils.prune` stays behind."""
    for key in masked.prune_hooks(old):
        del old._forward_pre_hooks[key]
    for attribute in HOOKS:
        setattr(new, attribute, getattr(old, attribute))
    for key, hook in list(new._load_state_dict_pre_hooks.items()):
        if getattr(hook, "with_module", False):  # it was registered to be given its module
            hook = new._load_state_dict_pre_hooks[key] = copy.copy(hook)
            vars(hook)["module"] = weakref.ref(new)
    # What a smallest layer of its kind has is not the user's, nor is `weight`, that of the last masked forward.
    plain = type(old)(1, 1, 1, device="meta")
    for attribute in vars(old).keys() - vars(plain).keys() - {"weight", RECORD}:
        setattr(new, attribute, vars(old)[attribute])
    return new.train(old.training)


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module that shares parameters and buffers with `module`, but can be masked or hooked without touching it."""
    twin = copy.copy(module)
    for attribute, value in vars(module).items():
        if isinstance(value, dict):
            vars(twin)[attribute] = value.copy()
    return twin


def without_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy that only `torch.nn.utils.prune` hooks into."""
    twin, plain = shallow_copy(module), nn.Module()
    kept = {key: module._forward_pre_hooks[key] for key in masked.prune_hooks(module)}
    for attribute in HOOKS:
        setattr(twin, attribute, getattr(plain, attribute))
    twin._forward_pre_hooks.update(kept)
    return twin

"""What is tried of a model and its optimizers before any work, because it would go wrong late, or in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import lottery_kernels
from lth.plan import Search
from lth.prune import Layer, Masks, weight_key
from lth.seeds import derive, seed_all
from lth.train import Task, Training, computing_in


def check_model(model: nn.Module) -> None:
    """Raises TypeError or ValueError, by name, for a model that a search cannot start from or save."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: the function returned a {type(model).__name__}; it takes a torch.nn.Module")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(
                f"model: {name!r} has no shape yet, its module is lazy; the function that makes the model has to run a "
                "batch through it"
            )
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model: its state holds {name!r}, a {type(value).__name__}; only tensors can be saved")
    check_plain(model)


def check_plain(model: nn.Module) -> None:
    """Raises ValueError for a model that is masked."""
    if model.state_dict().keys() != lottery_kernels.dense_state_dict(model).keys():
        raise ValueError("model: it is pruned or sparse already; it takes a dense one (lottery_kernels.densify)")


def check_maskable(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raises TypeError or ValueError, by name, for a layer that cannot be masked; masks the model on the way."""
    _masked(model, layers, sparse=False)


def check_draws(task: Task, search: Search, layers: Sequence[Layer]) -> None:
    """Raises ValueError if models are not made anew, or if other draws are asked for and come out equal."""
    one, other = task.fresh(), task.fresh()
    if {id(parameter) for parameter in one.parameters()} & {id(parameter) for parameter in other.parameters()}:
        raise ValueError("model: the function returned the same parameters twice; it has to make a new model each time")
    wanting = [f"replicates={search.replicates}"] if search.replicates > 1 else []
    wanting += ["branches with 'reinit'"] if "reinit" in search.branches else []
    if not wanting:
        return
    drawn = []
    for seed in (0, 1):
        seed_all(seed)
        drawn.append(task.model())
    keys = [weight_key(layer.name) for layer in layers]
    if all(torch.equal(*(model.get_parameter(key) for model in drawn)) for key in keys):
        raise ValueError(
            f"model: two draws gave equal weights, but {' and '.join(wanting)} take new ones; the function has to draw "
            "from torch's generator, and not to seed it"
        )


def check_optimizers(task: Task, search: Search, layers: Sequence[Layer]) -> None:
    """Raises ValueError if optimizers do not treat a masked layer's parameter as they do its dense weight.

    Masking renames it, to `weight_orig`, and packs it where the layer is sparse, into `values` [blocks, rows, cols]: an
    optimizer that picks parameters by their names or sizes might not train them at all.
    """
    plain = _treated(task, task.fresh(), {})
    for sparse in (False, True) if search.kernels != "dense" else (False,):
        key = "values" if sparse else "weight_orig"
        renamed = {weight_key(layer.name, key): weight_key(layer.name) for layer in layers}
        treated = _treated(task, _masked(task.fresh(), layers, sparse), renamed)
        for name, now in renamed.items():
            if treated.get(now) != plain.get(now):
                raise ValueError(
                    f"optimizer: {_said(plain.get(now))} {now!r}, but {_said(treated.get(now))} it when its layer is "
                    f"{'sparse' if sparse else 'masked'} and the parameter is {name!r}; pick parameters by their "
                    "modules or number of dimensions, not by names or sizes"
                )


def check_example(task: Task, search: Search) -> None:
    """Raises TypeError if kernels="auto" could not call the model with what `example` makes of a batch, to time it."""
    model = task.fresh()
    example = task.example(task.batches(0, derive(search.seed, 0, "order")))
    try:
        with torch.no_grad(), computing_in(task.autocast, next(model.parameters()).device):
            if isinstance(example, dict):
                model(**example)
            else:
                model(*example if isinstance(example, tuple | list) else (example,))
    except Exception as error:  # it is the user's code that raises
        raise TypeError(
            f"example: kernels='auto' could not call the model with it, to time it ({type(error).__name__}: {error}). "
            "It is made of a batch and takes a tensor, a tuple of arguments or a dict of named ones; kernels='sparse' "
            "or 'dense' needs none"
        ) from error


def _treated(task: Task, model: nn.Module, renamed: Mapping[str, str]) -> dict[str, tuple[int, int, str]]:
    """{parameter's name in the dense model: number of its optimizer, number and options of its group}."""
    names = {id(parameter): renamed.get(name, name) for name, parameter in model.named_parameters()}
    found = {}
    for i, optimizer in enumerate(Training.begin(task, model, 0).optimizers):
        for j, group in enumerate(optimizer.param_groups):
            options = ", ".join(f"{key}={value}" for key, value in group.items() if key != "params")
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise ValueError(
                        f"optimizer: it trains a parameter {tuple(parameter.shape)} that is none of the model's that "
                        "it was called with; what is not part of that model is neither rewound nor saved"
                    )
                found[names[id(parameter)]] = i, j, options
    return found


def _said(treatment: tuple[int, int, str] | None) -> str:
    return "does not train" if treatment is None else "trains (optimizer {}, group {}: {})".format(*treatment)


def _masked(model: nn.Module, layers: Sequence[Layer], sparse: bool) -> nn.Module:
    """The model under masks that leave a single weight, which are indexed in no time."""
    masks: Masks = {layer.name: torch.zeros(layer.shape, dtype=torch.bool) for layer in layers}
    for mask in masks.values():
        mask.flatten()[:1] = True
    blocks = {layer.name: layer.block for layer in layers}
    when: Any = "always" if sparse else lambda name, layer, mask: False
    return lottery_kernels.sparsify(model, masks, blocks, when)

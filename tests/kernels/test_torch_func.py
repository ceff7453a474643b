"""`torch.func`: per-sample gradients, ensembles and Jacobians of a sparse model are those of the dense masked one."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

from lottery_kernels import sparsify
from tests.kernels.nets import images, masked, random_masks, small_net

Call = Callable[[dict[str, Tensor], Tensor], Tensor]


@pytest.fixture(params=[(1, 1), (4, 4)], ids=["1x1", "4x4"])
def nets(request) -> tuple[nn.Module, nn.Module]:
    """A sparse net and its dense masked twin, in evaluation, where BatchNorm can be mapped over."""
    net = small_net().eval()
    masks = random_masks(net)
    return sparsify(copy.deepcopy(net), masks, request.param, "always").eval(), masked(net, masks)


def of_parameters(model: nn.Module) -> Call:
    return lambda parameters, x: functional_call(model, parameters, (x,))


def dense_gradient(model: nn.Module, of_values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients named and shaped as those of the dense masked twin; any number of leading dimensions of `values`."""
    patterns = {f"{name}.values": layer.pattern for name, layer in model.named_modules() if hasattr(layer, "pattern")}
    named = {}
    for name, gradient in of_values.items():
        if name in patterns:
            gradient = vmap(patterns[name].unpack)(gradient)
            name = name.removesuffix("values") + "weight_orig"
        named[name] = gradient
    return named


def test_gradients_of_single_samples(nets):
    x = images()

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return of_parameters(model)(parameters, image.unsqueeze(0)).square().sum()

        return vmap(grad(loss), (None, 0))(dict(model.named_parameters()), x)

    sparse, dense = nets
    expected = gradients(dense)
    torch.testing.assert_close(dense_gradient(sparse, gradients(sparse)), expected)


def test_an_ensemble_of_one_mask(nets):
    sparse, _ = nets
    members = [sparse, copy.deepcopy(sparse)]
    with torch.no_grad():
        for parameter in members[1].parameters():
            parameter.mul_(0.5)
    (parameters, buffers), x = stack_module_state(members), images()
    outputs = vmap(lambda state, x: functional_call(sparse, state, (x,)), (0, None))({**parameters, **buffers}, x)
    torch.testing.assert_close(outputs, torch.stack([member(x) for member in members]))


def test_jacobians_forward_and_backward(nets):
    x = images(2)
    torch.testing.assert_close(*[jacrev(net)(x) for net in nets])
    torch.testing.assert_close(*[jvp(net, (x,), (torch.ones_like(x),)) for net in nets])


def test_forward_mode_without_torch_func(nets):
    x, dx = images(), images()
    found = []
    for net in nets:
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(net(forward_ad.make_dual(x, dx))).tangent)
    assert found[0] is not None
    torch.testing.assert_close(*found)


def test_a_transform_leaves_the_kernels_in_place(nets):
    sparse, x = nets[0], images()
    before = sparse(x)
    jacrev(sparse)(x)
    assert torch.equal(sparse(x), before)


def test_a_transformed_model_can_be_compiled(nets):
    def gradients(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return vmap(grad(lambda image: model(image.unsqueeze(0)).sum()))

    (sparse, dense), x = nets, images()
    torch.testing.assert_close(torch.compile(gradients(sparse), fullgraph=True)(x), gradients(dense)(x))

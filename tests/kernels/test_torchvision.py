"""torchvision's models, converted whole: the same function, the same gradients, the same checkpoints.

ResNets with residual sums and strides, VGG with pooling between convolutions, MobileNet with depthwise convolutions and
ReLU6, RegNet with grouped convolutions and gates. Small images and fp64, so that nothing but rounding may differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor

from lottery_kernels import SparseConv2d, dense_state_dict, densify, sparsify
from lottery_kernels.layers import SparseLayer
from tests.kernels.nets import masked, random_masks

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def made(factory: Callable[..., nn.Module]) -> nn.Module:
    """A model of torchvision's with 10 classes, in fp64. VGG's head, of 120 million weights, is cut down to its last
    layer; dropout is off, for it draws in the order of memory, which a sparse layer changes."""
    vgg = factory is torchvision.models.vgg19_bn
    with torch.device("meta" if vgg else "cpu"):
        model = factory(num_classes=10)
    if vgg:
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Linear(512, 10))
        model.to_empty(device="cpu")
    model.double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d):  # away from 0, where a channel of zeros would sit on the kink of ReLU
            nn.init.normal_(module.bias)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


NAMES = ("resnet18", "resnet50", "vgg19_bn", "mobilenet_v2", "regnet_y_400mf")
MODELS = {name: getattr(torchvision.models, name) for name in NAMES}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """The dense model; copied before it is changed."""
    torch.manual_seed(0)
    return made(MODELS[request.param])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 33, 40, dtype=torch.float64)


def outputs_and_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """In training mode; gradients by the dense model's names, of pruned weights zero."""
    x = x.clone().requires_grad_()
    y = model.train()(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    gradients = {"input": x.grad}
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            gradients[f"{name}.weight"] = module.pattern.unpack(module.values.grad)
        for key, parameter in module.named_parameters(recurse=False):
            if key != "values":
                gradients[f"{name}.{key.removesuffix('_orig')}"] = parameter.grad
    return y.detach(), gradients


def assert_same_training(sparse: nn.Module, dense: nn.Module, x: Tensor) -> None:
    (y, gradients), (expected, expected_gradients) = (outputs_and_gradients(model, x) for model in (sparse, dense))
    torch.testing.assert_close(y, expected, **CLOSE)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp(min=1)
        torch.testing.assert_close(
            gradients[name] / scale, gradient / scale, **CLOSE, msg=lambda text, at=name: at + text
        )
    buffers = dict(dense.named_buffers())
    for name, buffer in sparse.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], **CLOSE)


def test_a_full_mask_gives_the_dense_model(model: nn.Module, x: Tensor) -> None:
    full = {name: torch.ones_like(mask) for name, mask in random_masks(model).items()}
    sparse = sparsify(copy.deepcopy(model), full, block="auto", when="always")
    assert not any(type(module) in (nn.Conv2d, nn.Linear) for module in sparse.modules())
    dense = copy.deepcopy(model)
    assert_same_training(sparse, dense, x)
    with torch.no_grad():
        torch.testing.assert_close(sparse.eval()(x), dense.eval()(x), **CLOSE)


def test_a_sparse_mask_gives_the_dense_masked_model_and_its_gradients(model: nn.Module, x: Tensor) -> None:
    masks = random_masks(model, 0.05)
    sparse = sparsify(copy.deepcopy(model), masks, when="always")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(isinstance(module, SparseConv2d) for module in sparse.modules()) == len(convolutions)
    assert_same_training(sparse, masked(copy.deepcopy(model), masks), x)


def test_densify_gives_back_the_same_bits_and_the_same_model(model: nn.Module, x: Tensor) -> None:
    masks = random_masks(model, 0.05)
    back = densify(sparsify(copy.deepcopy(model), masks, when="always"))
    plain = copy.deepcopy(model)
    for name, mask in masks.items():
        prune.remove(prune.custom_from_mask(plain.get_submodule(name), "weight", mask), "weight")
    assert [(name, type(module)) for name, module in back.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    state, expected = back.state_dict(), plain.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    with torch.no_grad():
        assert torch.equal(back.eval()(x), plain.eval()(x))


def test_checkpoints_go_from_dense_to_sparse_and_back(model: nn.Module) -> None:
    masks = random_masks(model, 0.05)
    sparse = sparsify(copy.deepcopy(model), masks, when="always")
    assert [name for name in sparse.state_dict() if not name.endswith("weight_mask")] == list(model.state_dict())

    trained = {
        name: value + 1 if value.is_floating_point() else value + 3 for name, value in model.state_dict().items()
    }
    sparse.load_state_dict(trained, strict=True)  # projected on the masks
    dense = copy.deepcopy(model)
    dense.load_state_dict(dense_state_dict(sparse), strict=True)
    for name, value in dense.state_dict().items():
        mask = masks.get(name.removesuffix(".weight"))
        assert torch.equal(value, trained[name] if mask is None else trained[name].where(mask, value.new_zeros(())))

    again = sparsify(copy.deepcopy(model), random_masks(model, 0.1), when="always")
    state = sparse.state_dict()
    again.load_state_dict(state, strict=True)  # brings its masks
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_features_are_extracted_with_the_layers_as_leaves(x: Tensor) -> None:
    model = made(torchvision.models.resnet18).eval()
    expected = create_feature_extractor(masked(copy.deepcopy(model), masks := random_masks(model)), ["layer4"])(x)
    sparse = sparsify(model, masks, when="always")
    leaves = {type(module) for module in sparse.modules() if type(module).__module__.startswith("lottery_kernels.lay")}
    extractor = create_feature_extractor(sparse, ["layer4"], tracer_kwargs={"leaf_modules": [*leaves]})
    torch.testing.assert_close(extractor(x), expected, **CLOSE)

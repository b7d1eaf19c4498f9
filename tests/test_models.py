"""Architectures, and the classifier around them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

from dau_fast.errors import UserError
from dau_fast.models import Classifier, SmallResNet, build


def seeded_images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def mlp(inputs: int = 6, hidden: int = 5, classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(network: nn.Module, before: dict[str, Tensor]) -> bool:
    after = network.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in network.modules())


# ---- architectures


@pytest.mark.parametrize(
    ("arch", "shape", "features"),
    [
        ("small", (1, 8, 8), 64),
        ("small", (3, 32, 32), 64),
        ("resnet18", (3, 32, 32), 512),
        ("resnet18", (1, 28, 28), 512),
        ("resnet18", (3, 96, 96), 512),
        ("resnet50", (3, 32, 32), 2048),
        ("vgg16", (3, 32, 32), 512),
        ("vgg16", (1, 32, 32), 512),
        ("mobilenet_v3_small", (3, 32, 32), 1024),
        ("mobilenet_v3_small", (1, 224, 224), 1024),
    ],
)
def test_logits_are_the_classifier_layer_on_the_features(
    arch: str, shape: tuple[int, ...], features: int
) -> None:
    torch.manual_seed(0)
    model = Classifier(build(arch, 7, shape)).eval()
    with torch.no_grad():
        outputs = model(seeded_images(2, *shape))
        expected = outputs.features @ model.head.weight.T + model.head.bias
    assert outputs.features.shape == (2, features)
    assert outputs.logits.shape == (2, 7)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-5)
    assert outputs.features.std() > 0


def test_a_small_image_keeps_its_resolution_in_a_resnet() -> None:
    network = build("resnet18", 10, (3, 32, 32))
    stem = network.conv1
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(network.maxpool, nn.Identity)
    with torch.no_grad():
        assert network.layer1(stem(torch.zeros(1, 3, 32, 32))).shape[-2:] == (32, 32)


def test_a_large_image_gets_the_stem_of_torchvision() -> None:
    network = build("resnet18", 10, (3, 224, 224))
    stem = network.conv1
    assert (stem.kernel_size, stem.stride, stem.padding) == ((7, 7), (2, 2), (3, 3))
    assert isinstance(network.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize(("pixels", "kernel"), [(64, 3), (65, 7)])
def test_64_pixels_are_the_largest_small_image(pixels: int, kernel: int) -> None:
    assert build("resnet18", 2, (3, 8, pixels)).conv1.kernel_size == (kernel, kernel)


@pytest.mark.parametrize("pixels", [32, 224])
def test_another_number_of_channels_changes_the_stem_alone(pixels: int) -> None:
    grey, colour = (build("resnet18", 4, (channels, pixels, pixels)) for channels in (1, 3))
    ours, theirs = grey.state_dict(), colour.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].shape != theirs[name].shape] == ["conv1.weight"]
    for name in ("kernel_size", "stride", "padding", "out_channels"):
        assert getattr(grey.conv1, name) == getattr(colour.conv1, name)
    assert (grey.conv1.in_channels, grey.conv1.bias) == (1, None)


def test_a_fresh_network_is_in_training_mode_and_follows_the_global_generator() -> None:
    first, again, other = (
        (torch.manual_seed(seed), build("resnet18", 3, (3, 8, 8)))[1] for seed in (1, 1, 2)
    )
    assert all(module.training for module in first.modules())
    assert same(again, weights(first))
    assert not same(other, weights(first))


def test_building_leaves_batchnorm_statistics_as_initialised() -> None:
    network = build("resnet18", 3, (3, 8, 8))
    assert network.bn1.num_batches_tracked == 0
    assert (network.bn1.running_mean == 0).all()


@pytest.mark.parametrize("arch", ["resnet19", "", "fcn_resnet50", "r3d_18"])
def test_an_unknown_architecture_is_refused(arch: str) -> None:
    with pytest.raises(UserError, match=f"`arch={arch}`: expected small, "):
        build(arch, 10, (3, 32, 32))


def test_a_library_that_is_not_installed_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"`arch=timm:resnet10t` needs timm, .*: pip install timm$"):
        build("timm:resnet10t", 10, (3, 32, 32))


@pytest.mark.parametrize(("arch", "pixels"), [("alexnet", 32), ("vit_b_16", 32), ("vgg16", 16)])
def test_images_an_architecture_cannot_take_are_refused_with_their_size(arch: str, pixels: int) -> None:
    with pytest.raises(UserError, match=f"`arch={arch}` cannot take {pixels}x{pixels} images"):
        build(arch, 10, (3, pixels, pixels))


def test_the_small_resnet_has_three_resolutions() -> None:
    network = SmallResNet(1, 10).eval()
    with torch.no_grad():
        assert network.blocks(network.stem(torch.zeros(1, 1, 8, 8))).shape == (1, 64, 2, 2)


# ---- the classifier


class TwoHeads(nn.Module):
    """Logits from the first of two Linear layers of one size; the second is for training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)
        self.auxiliary = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def test_the_classifier_layer_is_the_last_linear_one_unless_named() -> None:
    assert Classifier(mlp()).head_name == "2"
    network = TwoHeads()
    model = Classifier(network, "head")
    assert model.head is network.head
    x = seeded_images(4, 6)
    torch.testing.assert_close(model(x).features, network.body(x).relu())


@pytest.mark.parametrize("head", ["nothing", "1", ""])
def test_a_layer_that_is_not_there_or_not_linear_cannot_be_the_classifier(head: str) -> None:
    with pytest.raises(UserError, match="has no Linear layer"):
        Classifier(mlp(), head)


def test_a_network_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(UserError, match="Sequential has no Linear layer to read features from"):
        Classifier(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()))


def test_a_linear_layer_alone_is_a_classifier_on_its_input() -> None:
    layer = nn.Linear(4, 2)
    x = seeded_images(3, 4)
    outputs = Classifier(layer)(x)
    torch.testing.assert_close(outputs.features, x)
    torch.testing.assert_close(outputs.logits, layer(x))


def test_a_released_network_has_no_hook_and_still_works() -> None:
    network = mlp()
    model = Classifier(network)
    expected = model(seeded_images(2, 6)).logits
    assert model.release() is network
    assert hooks(network) == 0
    assert torch.equal(network(seeded_images(2, 6)), expected)


def test_a_copy_is_released_alone() -> None:
    model = Classifier(mlp())
    other = copy.deepcopy(model)
    assert hooks(other.release()) == 0
    assert hooks(model) == 1
    assert model(seeded_images(2, 6)).features.shape == (2, 5)


def test_features_are_not_kept_beyond_a_pass_and_not_taken_from_the_one_before() -> None:
    model = Classifier(TwoHeads(), "head")
    model(seeded_images(2, 6))
    assert model._features is None
    with pytest.raises(RuntimeError):
        model(seeded_images(2, 7))
    model.network.forward = lambda x: x
    with pytest.raises(UserError, match="takes no part in the forward pass"):
        model(seeded_images(2, 6))


def test_one_network_may_have_several_classifiers() -> None:
    network = TwoHeads()
    one, other = Classifier(network, "head"), Classifier(network, "head")
    x = seeded_images(2, 6)
    assert torch.equal(one(x).features, other(x).features)


def test_gradients_reach_the_network_through_features_and_logits() -> None:
    model = Classifier(mlp())
    outputs = model(seeded_images(2, 6))
    outputs.features.sum().backward(retain_graph=True)
    assert model.network[0].weight.grad is not None
    assert model.head.weight.grad is None
    outputs.logits.sum().backward()
    assert model.head.weight.grad is not None


def test_a_copy_of_a_classifier_shares_nothing_with_it() -> None:
    model = Classifier(mlp())
    other = copy.deepcopy(model)
    before = weights(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert same(model, before)
    assert other.head is not model.head


def test_lower_precision_computes_in_it_and_answers_in_float32() -> None:
    inside: list[torch.dtype] = []
    network = mlp()
    network[2].register_forward_hook(lambda _module, _inputs, output: inside.append(output.dtype))
    outputs = Classifier(network, precision=torch.bfloat16)(seeded_images(2, 6))
    assert inside == [torch.bfloat16]
    assert (outputs.features.dtype, outputs.logits.dtype) == (torch.float32, torch.float32)

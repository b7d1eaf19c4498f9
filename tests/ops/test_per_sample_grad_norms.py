"""Per-sample gradient norms against one backward pass a sample, in float64, layer by layer."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sample_norms import CLASSES, Flat, batch_for, one_by_one
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dau_fast import models
from dau_fast.ops import input_grad_norms, per_sample_grad_norms
from dau_fast.ops._layer_gradients import most_numbers, strided_patches


def trained_batch_norm(norm: nn.Module) -> nn.Module:
    """With statistics and scales that are not the initial zeros and ones."""
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        nn.init.uniform_(tensor, 0.5, 2)
    return norm.eval()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "linear": (lambda: nn.Linear(5, 7), (5,), 7, False),
    "linear without bias": (lambda: nn.Linear(5, 7, bias=False), (5,), 7, False),
    "linear over positions, Gram": (lambda: nn.Linear(19, 23), (4, 19), 23, False),
    "linear over positions, direct": (lambda: nn.Linear(2, 3), (20, 2), 3, False),
    "linear over two axes": (lambda: nn.Linear(6, 7), (3, 5, 6), 7, False),
    "conv1d": (lambda: nn.Conv1d(3, 5, 4, stride=2, padding=3, dilation=2), (3, 17), 5, True),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 7, 6), 5, True),
    "conv2d, few positions": (lambda: nn.Conv2d(8, 12, 3, stride=3), (8, 7, 6), 12, True),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 5, 1), (6, 4, 3), 5, True),
    "conv2d 1x1 with a stride": (lambda: nn.Conv2d(6, 5, 1, stride=2), (6, 5, 4), 5, True),
    "conv2d, all options": (
        lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), padding=(1, 2), dilation=(1, 3), groups=2),
        (4, 9, 11), 6, True,
    ),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5), 8, True),
    "conv2d, padding by name": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same"), (3, 5, 6), 4, True),
    "conv2d, reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 5, 6), 4, True),
    "conv3d": (
        lambda: nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), padding=(1, 0, 1), dilation=(2, 1, 1)),
        (2, 5, 6, 4), 4, True,
    ),
    "layer norm": (lambda: nn.LayerNorm(6), (6,), 6, False),
    "layer norm over positions": (lambda: nn.LayerNorm((5, 6)), (3, 5, 6), 6, False),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6, 4, 3), 6, True),
    "batch norm 1d": (lambda: trained_batch_norm(nn.BatchNorm1d(6)), (6,), 6, False),
    "batch norm 2d": (lambda: trained_batch_norm(nn.BatchNorm2d(6)), (6, 4, 3), 6, True),
    "batch norm 3d": (lambda: trained_batch_norm(nn.BatchNorm3d(6)), (6, 4, 3, 2), 6, True),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name: str) -> None:
    build, shape, width, channels_first = LAYERS[name]
    torch.manual_seed(0)
    model = Flat(build(), width, channels_first).double()
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)):
        nn.init.uniform_(norm.weight, 0.5, 2)
    x, y = batch_for(shape)
    torch.testing.assert_close(per_sample_grad_norms(model, x, y), one_by_one(model, x, y))
    model.layer.bias = None if model.layer.bias is None else model.layer.bias.requires_grad_(False)
    torch.testing.assert_close(per_sample_grad_norms(model, x, y), one_by_one(model, x, y))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}])
def test_embedding(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Flat(nn.Embedding(5, 6, **options), 6, False).double()
    words, y = torch.randint(5, (4, 9)), torch.tensor([0, 1, 2, 0])
    words[0] = 3
    torch.testing.assert_close(per_sample_grad_norms(model, words, y), one_by_one(model, words, y))


def test_small_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["dau_fast.ops._layer_gradients"]
    for name in ("conv2d", "conv2d, few positions", "linear over positions, Gram"):
        build, shape, width, channels_first = LAYERS[name]
        model = Flat(build(), width, channels_first).double()
        x, y = batch_for(shape, batch=7)
        whole = per_sample_grad_norms(model, x, y)
        with monkeypatch.context() as patch:
            patch.setattr(module, "most_numbers", lambda _: 1)
            torch.testing.assert_close(per_sample_grad_norms(model, x, y), whole)


class Tied(nn.Module):
    """A layer that is used twice, and a parameter that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.once = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.same = nn.Linear(4, 4, bias=False)
        self.same.weight = self.once.weight
        self.words = nn.Embedding(CLASSES, 4)
        self.out = nn.Linear(4, CLASSES, bias=False)
        self.out.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words).tanh().mean(1)
        x = self.twice(self.twice(self.once(x)).tanh()).tanh()
        return self.out(self.same(x).tanh())


def test_shared_parameters_and_layers_used_twice() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    words, y = torch.randint(CLASSES, (5, 6)), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(per_sample_grad_norms(model, words, y), one_by_one(model, words, y))


@pytest.mark.parametrize("arch", ["small", "resnet18", "vgg16"])
def test_whole_networks(arch: str) -> None:
    torch.manual_seed(0)
    shape = (3, 32, 32) if arch == "vgg16" else (3, 16, 16)
    model = models.build(arch, CLASSES, shape).double().eval()
    x, y = batch_for(shape, batch=3)
    torch.testing.assert_close(per_sample_grad_norms(model, x, y), one_by_one(model, x, y))


def test_layers_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    model = models.build("small", CLASSES, (1, 8, 8)).double().eval()
    x, y = batch_for((1, 8, 8))
    by_layer = per_sample_grad_norms(model, x, y, per_layer=True)
    trainable = {n for n, m in model.named_modules() if list(m.parameters(recurse=False))}
    assert by_layer.keys() == trainable
    total = torch.stack(list(by_layer.values())).square().sum(0).sqrt()
    torch.testing.assert_close(total, per_sample_grad_norms(model, x, y))


def test_the_model_is_left_as_it_was() -> None:
    model = models.build("small", CLASSES, (1, 8, 8)).double().eval()
    model.stem.train(False)
    before = copy.deepcopy(model.state_dict())
    x, y = batch_for((1, 8, 8))
    with torch.no_grad():
        norms = per_sample_grad_norms(model, x, y)
    assert not norms.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError):
        per_sample_grad_norms(model, x[:, :, :1, :1].expand(-1, 2, -1, -1), y)
    assert all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("between", [nn.Tanh, nn.PReLU])
def test_the_norms_can_be_differentiated(between: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), between(), nn.Linear(5, CLASSES)).double()
    x, y = batch_for((4,))
    weight = model[0].weight

    def total(value: Tensor) -> Tensor:
        with torch.no_grad():
            weight.copy_(value)
        return per_sample_grad_norms(model, x, y).sum()

    (found,) = torch.autograd.grad(per_sample_grad_norms(model, x, y, create_graph=True).sum(), [weight])
    start, step = weight.detach().clone(), 1e-6
    for index in ((0, 0), (3, 2)):
        moved = start.clone()
        moved[index] += step
        above = total(moved)
        moved[index] -= 2 * step
        assert found[index].item() == pytest.approx(((above - total(moved)) / (2 * step)).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast(dtype: torch.dtype) -> None:
    """As autocast rounds the layers' inputs and outputs, so do the norms, and no more."""
    torch.manual_seed(0)
    model = models.build("small", CLASSES, (1, 8, 8)).eval()
    x, y = batch_for((1, 8, 8), batch=6)
    x = x.float()
    plain = per_sample_grad_norms(model, x, y)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        norms = per_sample_grad_norms(model, x, y)
        differentiable = per_sample_grad_norms(model, x, y, create_graph=True)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, plain, rtol=0.05 if dtype == torch.bfloat16 else 1e-6, atol=0)
    torch.testing.assert_close(differentiable, norms, rtol=0.01, atol=0)


def test_in_half_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, CLASSES)).bfloat16()
    x, y = batch_for((40,))
    norms = per_sample_grad_norms(model, x.bfloat16(), y)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), one_by_one(model.double(), x, y), rtol=0.02, atol=0)


def test_losses_of_other_shapes() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y = batch_for((4,))
    wanted = torch.randn(4, 2).double()
    norms = per_sample_grad_norms(model, x, wanted, F.mse_loss)
    torch.testing.assert_close(norms, one_by_one(model, x, wanted, F.mse_loss))
    own = per_sample_grad_norms(model, x, wanted, lambda z, t: (z - t).square().sum(1))
    torch.testing.assert_close(own, norms)
    with pytest.raises(
        ValueError, match=r"loss_fn gives shape \[\] for 4 samples: expected one loss a sample"
    ):
        per_sample_grad_norms(model, x, wanted, lambda z, t: (z - t).square().sum())
    assert y.shape == (4,)


class Functional(nn.Module):
    """Weights that are used outside the layers they belong to."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(CLASSES, 4)
        self.out = nn.Linear(4, CLASSES)
        self.tied = tied

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words).mean(1)
        return x @ self.words.weight.T if self.tied else F.linear(x, self.out.weight, self.out.bias)


@pytest.mark.parametrize(("tied", "name"), [(True, "words.weight"), (False, "out.weight")])
@pytest.mark.parametrize("strict", [True, False])
def test_a_parameter_outside_its_layer_is_refused(tied: bool, name: str, strict: bool) -> None:
    model = Functional(tied)
    words, y = torch.randint(CLASSES, (4, 6)), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=f"{name} is used outside its layer"):
        per_sample_grad_norms(model, words, y, strict=strict)
    model.get_parameter(name).requires_grad_(False)
    if not tied:
        model.out.bias.requires_grad_(False)
        torch.testing.assert_close(per_sample_grad_norms(model, words, y), one_by_one(model, words, y))


def test_batch_norm_in_training_is_refused() -> None:
    model = models.build("small", CLASSES, (1, 8, 8))
    x, y = batch_for((1, 8, 8))
    for function in (per_sample_grad_norms, input_grad_norms):
        with pytest.raises(ValueError, match=r"stem.1 normalises over the batch.*call model.eval\(\)"):
            function(model, x.float(), y)
    with pytest.raises(ValueError, match="no layer with trainable parameters"):
        per_sample_grad_norms(model.eval().requires_grad_(False), x.float(), y)


def test_input_gradients() -> None:
    torch.manual_seed(0)
    model = models.build("small", CLASSES, (1, 8, 8)).double().eval()
    x, y = batch_for((1, 8, 8))
    expected = []
    for i in range(len(x)):
        one = x[i : i + 1].clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(one), y[i : i + 1]), [one])
        expected.append(grad.norm())
    found = input_grad_norms(model, x, y)
    torch.testing.assert_close(found, torch.stack(expected))
    assert not found.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_no_samples_have_no_norms() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES))
    x, targets = torch.zeros(0, 2, 6, 6), torch.zeros(0, dtype=torch.int64)
    assert per_sample_grad_norms(model, x, targets).shape == (0,)
    assert input_grad_norms(model, x, targets).shape == (0,)
    assert {norms.shape for norms in per_sample_grad_norms(model, x, targets, per_layer=True).values()} == {
        (0,)
    }


def test_a_batchnorm_of_several_processes_counts_as_any_other() -> None:
    x, targets = batch_for((2, 4, 4))
    norm = trained_batch_norm(nn.BatchNorm2d(2).double())
    network = nn.Sequential(norm, nn.Flatten(), nn.Linear(32, CLASSES).double())
    expected = per_sample_grad_norms(network, x, targets)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert type(synchronised[0]) is nn.SyncBatchNorm
    torch.testing.assert_close(per_sample_grad_norms(synchronised, x, targets), expected)


# ---- what a GPU is asked for, without one


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "stride"),
    [((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 2), (2, 1), (0, 3), (2, 3)), ((1, 1), (1, 1), (0, 0), (2, 2))],
)
def test_one_strided_copy_holds_what_unfold_gives(
    kernel: tuple[int, int], dilation: tuple[int, int], padding: tuple[int, int], stride: tuple[int, int]
) -> None:
    x = torch.randn(3, 4, 9, 8).to(memory_format=torch.channels_last)
    found = strided_patches(x, kernel, dilation, padding, stride)
    assert torch.equal(found, nn.functional.unfold(x, kernel, dilation, padding, stride))


class Calls(TorchDispatchMode):
    """Counts operations that are launches: not those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not (func.is_view or name.startswith(("prim::", "aten::promote_types", "aten::empty"))):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_on_cuda_a_network_is_some_hundred_launches_and_not_one_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ResNet-18 at 256 images, on tensors without numbers that are taken for CUDA's."""
    memory = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    room = most_numbers.__wrapped__(torch.device("cuda"))
    module = sys.modules["dau_fast.ops._layer_gradients"]
    monkeypatch.setattr(module, "most_numbers", lambda _: room)
    monkeypatch.setattr(module, "on_cuda", lambda _: True)
    with FakeTensorMode():
        model = models.build("resnet18", 10, (3, 32, 32)).eval()
        x = torch.empty(256, 3, 32, 32).to(memory_format=torch.channels_last)
        y = torch.zeros(256, dtype=torch.int64)
        with Calls() as calls:
            found = per_sample_grad_norms(model, x, y)
    assert found.shape == (256,)
    assert calls.seen["aten::im2col"] == 0
    # Twenty convolutions: products of one or another form, each of all samples at once.
    products = calls.seen["dau_fast::gram_squares"] + calls.seen["aten::bmm"]
    assert products == 20
    assert calls.seen.total() < 600


def test_outputs_that_are_no_tensor_need_a_loss_of_their_own() -> None:
    """As those of transformers are."""

    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(x)}

    model, (x, y) = Answering().double(), batch_for((4,))
    with pytest.raises(ValueError, match=r"the model returns a dict: expected logits \[B, C\]; give"):
        per_sample_grad_norms(model, x, y)

    def loss(told: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(told["logits"], y, reduction="none")

    expected = per_sample_grad_norms(model.head, x, y)
    torch.testing.assert_close(per_sample_grad_norms(model, x, y, loss), expected)

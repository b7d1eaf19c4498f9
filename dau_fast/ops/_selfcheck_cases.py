"""What `selfcheck` tries: every op at small and odd sizes, and where grids, blocks and forms change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.ops import (
    apply_masks_,
    attack_features,
    barlow_twins_loss,
    count_kept,
    image_batch,
    linear_sensitivity,
    mask_smallest,
    pack_mask,
    per_sample_grad_norms,
    reference,
    sensitivity,
    unpack_mask,
)
from dau_fast.ops._layer_gradients import gram_op
from dau_fast.ops.batch_norm import batch_norm_backward_op, batch_norm_op
from dau_fast.ops.masked_step import masked_adamw_op, masked_sgd_op

# Largest error, as the root mean square of the difference over that of the exact result: some roundings of
# long sums, and in float32 less than TF32 products would make.
_LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}

# Results of an op and of its definition.
Results = Sequence[Tensor]
Compute = Callable[..., Results]


@dataclass(frozen=True)
class Case:
    """An op on inputs of one kind.

    sizes: what is shown of them. make: from a generator, inputs on the CPU, numbers in float64. compute: the
    op on them in `dtype` on the device; define: the definition on the same numbers in float64 on the CPU.
    exact: whether equal bits are expected. slack: how many of the usual limits pass, for very long sums.
    """

    op: str
    sizes: str
    dtype: torch.dtype
    make: Callable[[torch.Generator], Sequence[Tensor]]
    compute: Compute
    define: Compute
    exact: bool = False
    slack: float = 1.0

    @property
    def limit(self) -> float:
        """The largest error that passes."""
        return 0.0 if self.exact else self.slack * _LIMITS[self.dtype]


def list_cases() -> list[Case]:
    """All of them."""
    makers = (
        _sensitivity_cases, _attack_cases, _linear_cases, _barlow_cases, _gram_cases, _norm_cases,
        _batch_norm_cases, _image_cases, _mask_cases, _apply_cases, _step_cases, _selection_cases,
    )  # fmt: skip
    return list(itertools.chain.from_iterable(maker() for maker in makers))


def _differentiated(function: Callable[..., Tensor], count: int) -> Compute:
    """The function's result, and its gradients in the first `count` inputs, pulled at by fixed numbers."""

    def run(*inputs: Tensor) -> Results:
        leaves = [x.requires_grad_() for x in inputs[:count]]
        result = function(*leaves, *inputs[count:])
        pull = torch.arange(1, result.numel() + 1, device=result.device, dtype=torch.float64).cos()
        return [result, *torch.autograd.grad(result, leaves, pull.view(result.shape).to(result.dtype))]

    return run


def _logits(b: int, c: int, d: int) -> Callable[[torch.Generator], Sequence[Tensor]]:
    def make(generator: torch.Generator) -> Sequence[Tensor]:
        z, h = (torch.randn(b, n, generator=generator, dtype=torch.float64) for n in (c, d))
        return z, h, torch.randint(c, (b,), generator=generator)

    return make


def _sensitivity_cases() -> Iterator[Case]:
    sizes = [(33, 10, 64), (7, 1000, 33), (4, 50257, 64), (3, 131073, 17), (66000, 3, 2)]
    kinds = [torch.bfloat16, torch.float16, torch.float64]
    for (b, c, d), dtype in [(size, torch.float32) for size in sizes] + [(sizes[0], kind) for kind in kinds]:
        yield Case(
            "sensitivity", f"{b}x{c}x{d}", dtype, _logits(b, c, d), _differentiated(sensitivity, 2),
            _differentiated(reference.sensitivity_reference, 2), slack=max(1.0, c / 2**15),
        )  # fmt: skip


def _attack_cases() -> Iterator[Case]:
    for (b, c, d), dtype in [((33, 10, 64), torch.float32), ((5, 5003, 16), torch.float32)]:
        yield Case(
            "attack_features", f"{b}x{c}x{d}", dtype, _logits(b, c, d), _differentiated(attack_features, 2),
            _differentiated(reference.attack_features_reference, 2),
        )  # fmt: skip
    yield Case(
        "attack_features", "33x10x64, predicted", torch.float32, lambda g: _logits(33, 10, 64)(g)[:2],
        _differentiated(lambda z, h: attack_features(z, h, None), 2),
        _differentiated(lambda z, h: reference.attack_features_reference(z, h, None), 2),
    )  # fmt: skip


def _layer(b: int, c: int, d: int) -> Callable[[torch.Generator], Sequence[Tensor]]:
    def make(generator: torch.Generator) -> Sequence[Tensor]:
        h, w, bias = (
            torch.randn(n, generator=generator, dtype=torch.float64) for n in ((b, d), (c, d), (c,))
        )
        return h, w / d**0.5, bias, torch.randint(c, (b,), generator=generator)

    return make


def _linear_cases() -> Iterator[Case]:
    def define(h: Tensor, w: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        return reference.sensitivity_reference(F.linear(h, w, bias), h, y)

    ours, exact = _differentiated(linear_sensitivity, 3), _differentiated(define, 3)
    # Logits that are kept, and more than are.
    for size in ((16, 5000, 32), (65, 65_537, 4)):
        yield Case("linear_sensitivity", "x".join(map(str, size)), torch.float32, _layer(*size), ours, exact)


def _barlow_cases() -> Iterator[Case]:
    float32 = torch.float32
    cases = [(37, 101, float32, "tf32x3"), (64, 512, float32, "tf32x3"), (300, 128, float32, "tf32x3")]
    cases += [(64, 512, float32, "ieee"), (300, 128, float32, "ieee"), (64, 256, torch.bfloat16, "tf32x3")]
    cases += [(128, 64, torch.bfloat16, "tf32x3"), (64, 128, torch.float64, "tf32x3")]
    for n, d, dtype, precision in cases:

        def make(generator: torch.Generator, n: int = n, d: int = d) -> Sequence[Tensor]:
            a, other = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
            return a, 0.5 * a + other

        def ours(a: Tensor, b: Tensor, precision: str = precision) -> Tensor:
            return barlow_twins_loss(a, b, precision=precision)

        yield Case(
            "barlow_twins_loss", f"{n}x{d}, {precision}", dtype, make, _differentiated(ours, 2),
            _differentiated(lambda a, b: reference.barlow_twins_reference(a, b, 5e-3, 1e-5), 2),
        )  # fmt: skip


def _gram_cases() -> Iterator[Case]:
    sizes = [(3, 2, 9, 7, 70), (2, 1, 48, 33, 200), (66000, 1, 2, 2, 3)]
    for (b, groups, d, p, t), dtype in [(s, torch.float32) for s in sizes] + [(sizes[1], torch.bfloat16)]:

        def make(
            generator: torch.Generator, x: Sequence[int] = (b, groups, d, t), g: int = p
        ) -> Sequence[Tensor]:
            shapes = list(x), [*x[:2], g, x[3]]
            return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

        yield Case(
            "gram_squares", "x".join(map(str, (b, groups, d, p, t))), dtype, make,
            lambda x, g: [gram_op(x, g)],
            lambda x, g: [torch.einsum("bgpt,bgdt->bgpd", g, x).square().sum((1, 2, 3))],
        )  # fmt: skip


def _network(generator: torch.Generator) -> nn.Module:
    """One layer of each kind, among them convolutions for either form; float64 weights by `generator`."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, stride=2),
        nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 49, 24), nn.LayerNorm(24), nn.Linear(24, 5),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network


def _norm_cases() -> Iterator[Case]:
    shapes = [tuple(p.shape) for p in _network(torch.Generator()).parameters()]

    def make(generator: torch.Generator) -> Sequence[Tensor]:
        x = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64)
        weights = [p.detach() for p in _network(generator).parameters()]
        return [x, torch.randint(5, (6,), generator=generator), *weights]

    def filled(weights: Sequence[Tensor]) -> nn.Module:
        network = _network(torch.Generator()).to(weights[0].device, weights[0].dtype)
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), weights, strict=True):
                parameter.copy_(value)
        return network

    def define(x: Tensor, y: Tensor, *weights: Tensor) -> Results:
        network, norms = filled(weights), []
        for sample in range(len(x)):
            loss = F.cross_entropy(network(x[sample : sample + 1]), y[sample : sample + 1])
            grads = torch.autograd.grad(loss, list(network.parameters()))
            norms.append(torch.cat([grad.flatten() for grad in grads]).norm())
        return [torch.stack(norms)]

    what = f"6 images, {len(shapes)} parameters"
    yield Case(
        "per_sample_grad_norms", what, torch.float32, make,
        lambda x, y, *weights: [per_sample_grad_norms(filled(weights), x, y)], define,
    )  # fmt: skip


def _batch_norm_cases() -> Iterator[Case]:
    """Of several parts and blocks of columns, and of a few rows."""
    plain, joined = (False, False), (True, True)
    kinds = [(9, 130, 8, 8, torch.float32, *plain), (9, 130, 8, 8, torch.float32, *joined)]
    kinds += [(3, 5, 1, 1, torch.float32, True, False), (9, 130, 8, 8, torch.bfloat16, *joined)]
    for *shape, dtype, relu, add in kinds:

        def make(generator: torch.Generator, shape: Sequence[int] = shape) -> Sequence[Tensor]:
            x, more, pull = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
            weight, bias, mean, away = torch.randn(4, shape[1], generator=generator, dtype=torch.float64)
            images = [x + 5 * away.view(-1, 1, 1), more, pull]
            laid = [image.contiguous(memory_format=torch.channels_last) for image in images]
            return [*laid, weight, bias, mean, mean.square(), torch.tensor(3)]

        def compute(*given: Tensor, relu: bool = relu, add: bool = add) -> Results:
            x, more, pull, *lines, batches = given
            lines = [line.to(torch.promote_types(line.dtype, torch.float32)) for line in lines]
            y, found = batch_norm_op(x, *lines, batches, more if add else None, relu, 0.1, 1e-5)
            # Pulled at less where results are near 0, which a ReLU lets through or not by rounding.
            of_x, of_more, sums = batch_norm_backward_op(pull * y, x, y, found, relu, add)
            return [y, of_x, sums[1], sums[0], *[of_more] * add, *lines[2:], batches]

        def define(*given: Tensor, relu: bool = relu, add: bool = add) -> Results:
            x, more, pull, weight, bias, mean, var, batches = given
            leaves = [leaf.requires_grad_() for leaf in (x, weight, bias, *[more] * add)]
            y = F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
            y = y + more if add else y
            y = y.relu() if relu else y
            grads = torch.autograd.grad(y, leaves, pull * y.detach())
            return [y, *grads, mean, var, batches + 1]

        what = "x".join(map(str, shape)) + ", added to" * add + ", ReLU" * relu
        yield Case("batch_norm", what, dtype, make, compute, define)


def _image_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):

        def make(generator: torch.Generator) -> Sequence[Tensor]:
            pixels = torch.randint(0, 256, (50, 3, 9, 11), dtype=torch.uint8, generator=generator)
            index = torch.randint(50, (13,), generator=generator)
            choices = [torch.randint(most, (13,), generator=generator) for most in (5, 5, 2)]
            return [pixels.contiguous(memory_format=torch.channels_last), index, *choices]

        def run(function: Callable[..., Tensor], dtype: torch.dtype = dtype) -> Compute:
            def compute(*given: Tensor) -> Results:
                pixels, index, rows, columns, flip = given
                mean, std = (
                    torch.tensor(x, device=pixels.device) for x in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
                )
                windows = {"rows": rows, "columns": columns, "flip": flip, "pad": 2}
                found = [function(pixels, index, mean, std, dtype=dtype, **named) for named in ({}, windows)]
                # As bits: equal numbers are expected.
                return [batch.contiguous().view(torch.uint8) for batch in found]

            return compute

        yield Case(
            "image_batch", "13 of 50 images, 3x9x11", dtype, make, run(image_batch),
            run(reference.image_batch_reference), exact=True,
        )  # fmt: skip


def _mask_cases() -> Iterator[Case]:
    def make(generator: torch.Generator) -> Sequence[Tensor]:
        return [torch.rand(1001, generator=generator) < 0.3]

    def compute(mask: Tensor) -> Results:
        packed = pack_mask(mask)
        return [packed, unpack_mask(packed, mask.shape), torch.tensor([count_kept(packed, mask.numel())])]

    def define(mask: Tensor) -> Results:
        return [reference.pack_mask_reference(mask), mask, mask.sum().view(1)]

    yield Case("pack_mask", "1001", torch.float32, make, compute, define, exact=True)


_WEIGHTS = ((1001,), (8, 3, 3, 3), (1,), (70_000,))


def _weights(generator: torch.Generator, families: int) -> list[Tensor]:
    """A mask for each of _WEIGHTS, and `families` families of numbers, 0 where masked."""
    masks = [torch.rand(shape, generator=generator) < 0.4 for shape in _WEIGHTS]
    numbers = [
        torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask
        for _ in range(families)
        for mask in masks
    ]
    return [*masks, *numbers]


def _families(given: Sequence[Tensor]) -> list[list[Tensor]]:
    count = len(_WEIGHTS)
    return [list(given[start : start + count]) for start in range(0, len(given), count)]


def _apply_cases() -> Iterator[Case]:
    def make(generator: torch.Generator) -> Sequence[Tensor]:
        masks = _weights(generator, 0)
        dense = [torch.randn(mask.shape, generator=generator, dtype=torch.float64) for mask in masks]
        return [*masks, *dense]

    def compute(*given: Tensor) -> Results:
        masks, weights = _families(given)
        apply_masks_(weights, [pack_mask(mask) for mask in masks])
        return weights

    def define(*given: Tensor) -> Results:
        masks, weights = _families(given)
        return [weight * mask for mask, weight in zip(masks, weights, strict=True)]

    for dtype in (torch.float32, torch.bfloat16):
        yield Case("apply_masks_", f"{len(_WEIGHTS)} tensors", dtype, make, compute, define, exact=True)


def _step_cases() -> Iterator[Case]:
    """Three steps, the first of all included."""

    def sgd(masks: Sequence[Tensor], step: Callable[..., None], *families: list[Tensor]) -> None:
        weights, grads, momenta = families
        for first in (True, False, False):
            begins = [first] * len(weights)
            step(weights, grads, momenta, masks, begins, 0.1, None, 0.9, 0.0, 5e-4, True, False)

    def adamw(masks: Sequence[Tensor], step: Callable[..., None], *families: list[Tensor]) -> None:
        weights, grads, averages = families
        squares = [torch.zeros_like(weight) for weight in weights]
        counts = [torch.zeros((), device=weight.device) for weight in weights]
        for _ in range(3):
            step(weights, grads, averages, squares, counts, masks, 0.01, None, 0.9, 0.999, 1e-8, 0.1, False)

    def definition(step: Callable[..., None]) -> Callable[..., None]:
        # The ops take a rate twice, as a number and as a tensor; the definitions take one.
        return lambda *given: step(*(list(x) if isinstance(x, list) else x for x in _one_rate(given)))

    rows = {
        "masked_sgd_": (sgd, masked_sgd_op, reference.masked_sgd_reference_),
        "masked_adamw_": (adamw, masked_adamw_op, reference.masked_adamw_reference_),
    }
    for name, (steps, op, define) in rows.items():

        def compute(*given: Tensor, steps: Any = steps, op: Any = op) -> Results:
            masks, *families = _families(given)
            steps([pack_mask(mask) for mask in masks], op, *families)
            return [*families[0], *families[2]]

        def exact(*given: Tensor, steps: Any = steps, define: Any = define) -> Results:
            masks, *families = _families([x.clone() for x in given])
            steps(masks, definition(define), *families)
            return [*families[0], *families[2]]

        what = f"{len(_WEIGHTS)} tensors, 3 steps"
        yield Case(name, what, torch.float32, lambda generator: _weights(generator, 3), compute, exact)


def _one_rate(given: Sequence[Any]) -> list[Any]:
    """The arguments of a step's op without `lr_tensor`, the one after the number `lr`."""
    rate = next(place for place, x in enumerate(given) if isinstance(x, float))
    return [*given[: rate + 1], *given[rate + 2 :]]


def _selection_cases() -> Iterator[Case]:
    def make(generator: torch.Generator) -> Sequence[Tensor]:
        # Few different values: that the first of equal ones are dropped shows.
        return [torch.randint(-9, 10, (n,), generator=generator).double() for n in (1001, 77, 4096)]

    yield Case(
        "mask_smallest", "3 tensors", torch.float32, make,
        lambda *given: [
            unpack_mask(mask, x.shape) for mask, x in zip(mask_smallest(given, 2500), given, strict=True)
        ],
        lambda *given: reference.mask_smallest_reference(given, 2500), exact=True,
    )  # fmt: skip

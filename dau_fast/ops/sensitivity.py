"""How strongly a sample pulls at the classifier layer: the norm of its own gradient, in closed form.

For cross-entropy the gradient of one sample with respect to W is e h^T and with respect to b is e, where
e = p - e_y and p = softmax(z), so its norm needs no backward pass:

    s = pull * length,    pull = ||e||_2,    length = sqrt(||h||^2 + 1), the 1 being the bias

1 - p_y is taken as the sum of the other probabilities, `miss`, which stays exact where p_y rounds to 1:
pull^2 = sum_{i != y} p_i^2 + miss^2. Backward, with g = dL/ds,

    dz_i = g length / pull * p_i (p_i + rest) for i != y,    dz_y = -g length pull p_y
    dh = g pull / length * h,    rest = miss p_y - sum_{i != y} p_i^2

where rest is miss - pull^2, but not as the difference of two numbers near 1.

so that what is kept from forward to backward are five numbers a sample and nothing of size C.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dau_fast.ops._library import check_devices, compute_dtype, define, differentiable_once
from dau_fast.ops._native import array


def sensitivity(logits: Tensor, features: Tensor, targets: Tensor, bias: bool = True) -> Tensor:
    """Norm of the per-sample cross-entropy gradient with respect to the classifier layer, [B].

    logits: [B, C]. features: [B, D], the layer's input. targets: int64 [B]. bias: whether the layer
    has one. Any floating-point dtypes and strides; the result is float32 (float64 for float64 input),
    and so are the sums. Differentiable once in logits and features; where p equals e_y the gradient is
    0. A NaN in a row makes that row's result NaN. torch.func transforms are refused.
    Raises ValueError where shapes do not fit, or for a target outside 0 to C - 1; on CUDA that one is a
    device-side assertion, as in torch.nn.functional.cross_entropy.
    """
    s: Tensor = _Sensitivity.apply(logits, features, targets, bias, False)
    return s


def attack_features(logits: Tensor, features: Tensor, targets: Tensor | None) -> Tensor:
    """What an attacker sees of each sample: softmax and sensitivity, [B, C + 1].

    Arguments, dtype and errors as in `sensitivity`; targets None means the predicted label.
    """
    u: Tensor = _Sensitivity.apply(logits, features, targets, True, True)
    return u


class _Sensitivity(torch.autograd.Function):
    """(logits, features, targets, bias, softmax) -> s [B], or u [B, C + 1] with softmax.

    In the older style, without a setup_context, for the reason that barlow_twins.py gives.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, features: Tensor, targets: Tensor | None, bias: bool, softmax: bool
    ) -> Tensor:
        shown, stats, predicted = forward_op(logits, features, targets, bias, softmax)
        ctx.save_for_backward(logits, features, predicted if targets is None else targets, stats)
        ctx.softmax = softmax
        return shown

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        grads = _backward_once(grad, *ctx.saved_tensors, ctx.softmax, *wanted)
        return grads[0] if wanted[0] else None, grads[1] if wanted[1] else None, None, None, None


# ---- what the ops refuse


def _check_forward(
    logits: Tensor, features: Tensor, targets: Tensor | None, bias: bool, softmax: bool
) -> None:
    if logits.ndim != 2 or features.ndim != 2 or len(logits) != len(features) or logits.shape[1] == 0:
        raise ValueError(
            f"logits have shape {list(logits.shape)}, features {list(features.shape)}: expected [B, C] "
            "and [B, D] with one B and at least one class"
        )
    check_targets(targets, len(logits))
    check_devices(logits=logits, features=features, targets=targets)


def check_targets(targets: Tensor | None, batch: int) -> None:
    """ValueError unless `targets` are None or int64 [batch]."""
    if targets is not None and (targets.shape != (batch,) or targets.dtype != torch.int64):
        raise ValueError(
            f"targets are {targets.dtype} of shape {list(targets.shape)}: expected int64 of shape [{batch}]"
        )


def _check_backward(
    grad: Tensor,
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    stats: Tensor,
    softmax: bool,
    need_logits: bool,
    need_features: bool,
) -> None:
    _check_forward(logits, features, labels, True, softmax)
    check_devices(logits=logits, grad=grad, stats=stats)
    batch, classes = logits.shape
    shown = (batch, classes + 1) if softmax else (batch,)
    if grad.shape != shown or stats.shape != (5, batch) or stats.dtype != compute_dtype(logits, features):
        raise ValueError(
            f"grad has shape {list(grad.shape)}, stats {stats.dtype} {list(stats.shape)}: expected "
            f"{list(shown)} and stats as from the forward op"
        )


# ---- the ops
# stats [5, B]: rest, pull, length; then the largest logit and 1 / sum_i exp(z_i - largest) for C++ and
# Triton, whose backward pass takes p from them (plain PyTorch takes the softmax again and leaves 0).
# predicted: int64 [B] where there are no targets, else [0].


def _forward(
    logits: Tensor, features: Tensor, targets: Tensor | None, bias: bool, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    labels = logits.argmax(1) if targets is None else targets
    p = torch.softmax(logits, 1, dtype=compute_dtype(logits, features))
    u = torch.cat([p, p[:, :1]], 1) if softmax else None
    at_label = without_label(p, labels)
    miss, norm = p.sum(1), torch.linalg.vector_norm(p, dim=1)
    rest = miss * at_label - norm.square()
    pull = norm.hypot_(miss)
    length = feature_lengths(features.to(p.dtype), bias)
    nothing = torch.zeros_like(miss)
    stats = torch.stack([rest, pull, length, nothing, nothing])
    s = pull * length
    if u is not None:
        u[:, -1] = s
    return s if u is None else u, stats, labels if targets is None else labels.new_empty(0)


def without_label(p: Tensor, labels: Tensor) -> Tensor:
    """Set p [B, C] to 0 at labels [B], in place; what was there, [B]. ValueError for one that is no class."""
    try:
        found = p.gather(1, labels.unsqueeze(1)).squeeze(1)
        p.scatter_(1, labels.unsqueeze(1), 0.0)
    except RuntimeError as error:
        raise no_such_class(labels, p.shape[1]) from error
    return found


def no_such_class(labels: Tensor, classes: int) -> ValueError:
    """What to raise where a label is none of `classes`."""
    return ValueError(f"targets lie in {labels.min()} to {labels.max()}: expected 0 to {classes - 1}")


def feature_lengths(features: Tensor, bias: bool) -> Tensor:
    """sqrt(||h||^2 + 1), or ||h|| without a bias, [B]."""
    squares = torch.linalg.vecdot(features, features)
    return (squares.add_(1) if bias else squares).sqrt_()


def _backward(
    grad: Tensor,
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    stats: Tensor,
    softmax: bool,
    need_logits: bool,
    need_features: bool,
) -> tuple[Tensor, Tensor]:
    grad_s = (grad[:, -1] if softmax else grad).to(stats.dtype)
    grad_logits = logits.new_empty(0)
    if need_logits:
        p = torch.softmax(logits, 1, dtype=stats.dtype)
        carried = softmax_backward(p, grad[:, :-1]) if softmax else None
        pulled = logits_gradient(p, labels.unsqueeze(1), grad_s, stats)
        grad_logits = (pulled if carried is None else pulled.add_(carried)).to(logits.dtype)
    if not need_features:
        return grad_logits, features.new_empty(0)
    return grad_logits, feature_gradient(features, grad_s, stats).to(features.dtype)


def softmax_backward(p: Tensor, grad: Tensor) -> Tensor:
    """dL/dz [B, C] from dL/dp and p."""
    return torch.mul(p, grad - torch.linalg.vecdot(p, grad).unsqueeze(1))


def logits_gradient(
    p: Tensor, labels: Tensor, grad_s: Tensor, stats: Tensor, here: Tensor | None = None
) -> Tensor:
    """ds/dz times grad_s, [B, C], from probabilities, which are used up, and labels [B, 1].

    here: bool [B, 1], whether these classes include the label, where they are some of all.
    """
    rest, pull, length = stats[:3]
    try:
        at_label = p.gather(1, labels).mul_((-grad_s * length * pull).unsqueeze(1))
    except RuntimeError as error:
        raise no_such_class(labels, p.shape[1]) from error
    factor = grad_s * length / above_zero(pull)
    # The factor first: p^2 may be below what float32 can hold where the factor is large.
    scaled = p * factor.unsqueeze(1)
    grad = p.add_(rest.unsqueeze(1)).mul_(scaled)
    if here is not None:
        at_label = torch.where(here, at_label, grad.gather(1, labels))
    return grad.scatter_(1, labels, at_label)


def feature_gradient(features: Tensor, grad_s: Tensor, stats: Tensor) -> Tensor:
    """ds/dh times grad_s, [B, D]."""
    pull, length = stats[1:3]
    return features * (grad_s * pull / above_zero(length)).unsqueeze(1)


def above_zero(x: Tensor) -> Tensor:
    """x, but no smaller than what can be squared: what it divides is 0 where it would be 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)


# ---- C++ and Triton, in float32


def _takes_forward(logits: Tensor, features: Tensor, *_: Any) -> bool:
    return compute_dtype(logits, features) == torch.float32


def _takes_backward(grad: Tensor, logits: Tensor, features: Tensor, *_: Any) -> bool:
    return compute_dtype(logits, features) == torch.float32


def _forward_cpp(
    extension: ModuleType, logits: Tensor, features: Tensor, targets: Tensor | None, bias: bool, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    z, h, labels = _float32(logits), _float32(features), None if targets is None else targets.contiguous()
    batch, classes = z.shape
    shown, stats = z.new_empty((batch, classes + 1) if softmax else batch), z.new_empty((5, batch))
    predicted = z.new_empty(batch if targets is None else 0, dtype=torch.int64)
    extension.sensitivity_forward(
        logits=array(z),
        features=array(h),
        targets=array(labels),
        shown=array(shown),
        stats=array(stats),
        predicted=array(predicted),
        batch=batch,
        classes=classes,
        width=h.shape[1],
        bias=bias,
        softmax=softmax,
        threads=torch.get_num_threads(),
    )
    return shown, stats, predicted


def _backward_cpp(
    extension: ModuleType,
    grad: Tensor,
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    stats: Tensor,
    softmax: bool,
    need_logits: bool,
    need_features: bool,
) -> tuple[Tensor, Tensor]:
    grad, z, h = _float32(grad), _float32(logits), _float32(features)
    labels, stats = labels.contiguous(), stats.contiguous()
    grad_logits = z.new_empty(z.shape if need_logits else 0)
    grad_features = h.new_empty(h.shape if need_features else 0)
    extension.sensitivity_backward(
        grad=array(grad),
        logits=array(z),
        features=array(h),
        labels=array(labels),
        stats=array(stats),
        grad_logits=array(grad_logits),
        grad_features=array(grad_features),
        batch=len(z),
        classes=z.shape[1],
        width=h.shape[1],
        softmax=softmax,
        threads=torch.get_num_threads(),
    )
    return grad_logits.to(logits.dtype), grad_features.to(features.dtype)


def _float32(x: Tensor) -> Tensor:
    return (x if x.dtype == torch.float32 else x.float()).contiguous()


# ---- registration


def _forward_fake(
    logits: Tensor, features: Tensor, targets: Tensor | None, bias: bool, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = logits.shape
    stats = logits.new_empty((5, batch), dtype=compute_dtype(logits, features))
    predicted = logits.new_empty(batch if targets is None else 0, dtype=torch.int64)
    return stats.new_empty((batch, classes + 1) if softmax else (batch,)), stats, predicted


def _backward_fake(grad: Tensor, logits: Tensor, features: Tensor, *saved: Any) -> tuple[Tensor, Tensor]:
    need_logits, need_features = saved[-2:]
    return (
        logits.new_empty(logits.shape if need_logits else (0,)),
        features.new_empty(features.shape if need_features else (0,)),
    )


forward_op = define(
    "sensitivity_forward(Tensor logits, Tensor features, Tensor? targets, bool bias, bool softmax)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    check=_check_forward,
    cpp=_forward_cpp,
    triton=("_sensitivity_cuda", "forward"),
    takes=_takes_forward,
)
backward_op = define(
    "sensitivity_backward(Tensor grad, Tensor logits, Tensor features, Tensor labels, Tensor stats,"
    " bool softmax, bool need_logits, bool need_features) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    check=_check_backward,
    cpp=_backward_cpp,
    triton=("_sensitivity_cuda", "backward"),
    takes=_takes_backward,
)
_backward_once = differentiable_once(
    backward_op,
    "sensitivity and attack_features are differentiable once: for a second derivative use their "
    "definitions in dau_fast.ops.reference",
)

"""SGD and AdamW for pruned models: masked weights stay exactly 0 through momentum and weight decay.

`MaskedSGD(model.named_parameters(), masks, lr=0.1, momentum=0.9)` is equivalent to

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step(); apply_masks_(weights, masks); apply_masks_(momenta, masks)

to float rounding, in one pass over memory. State has torch's names, so that a state_dict goes from one to the
other. Construction zeroes what is masked; after loading other weights into the model, call `apply_masks_()`.

A step may be captured in a CUDA graph, after one that is not; replays follow an lr that is a tensor on the
device of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from dau_fast.ops._named_parameters import MasksByName, list_each_once, list_names, pack_in_order
from dau_fast.ops._step_plan import Order, StepPlan, memory_order, permuted
from dau_fast.ops.masked_step import masked_adamw_op, masked_sgd_op
from dau_fast.ops.packed_masks import apply_masks_


class _Kept(NamedTuple):
    """What an optimiser knows of a parameter since it was made.

    order: of its dimensions in memory, None for row by row. mask: packed, in that order; None without one.
    """

    name: str
    shape: torch.Size
    order: Order
    mask: Tensor | None


# A parameter with its gradient, and what is known of it.
_Entry = tuple[Tensor, Tensor, _Kept]


class MaskedOptimizer(Optimizer):
    """What the two optimisers share: masks by parameter, and the walk over groups."""

    # Entries of a parameter's state that have its shape.
    _kept_zero: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, masks: MasksByName, defaults: dict[str, Any]) -> None:
        _check_rates(defaults)
        self._kept: dict[Tensor, _Kept] = {}
        self._plans: dict[int, StepPlan] = {}  # by the place of their group
        super().__init__(list_each_once(params), defaults)
        names = [name for group in self.param_groups for name in list_names(group)]
        if strange := [name for name in masks if name not in names]:
            raise ValueError(
                f"masks has {strange[0]!r}, which is none of the {len(names)} parameters: expected names "
                "from the model's named_parameters(); are these the masks of another model?"
            )
        for group in self.param_groups:
            self._attach(group, masks)
        self.apply_masks_()

    def add_param_group(self, param_group: dict[str, Any], masks: MasksByName | None = None) -> None:
        """torch's, and masks for the new parameters, by name; those without one are not masked."""
        super().add_param_group(param_group)
        self._attach(self.param_groups[-1], masks or {})
        self.apply_masks_()

    @torch.no_grad()
    def apply_masks_(self) -> None:
        """Set masked weights and their state to 0."""
        tensors: list[Tensor] = []
        bits: list[Tensor] = []
        for parameter, kept in self._kept.items():
            _check_unchanged(parameter, kept)
            if kept.mask is None:
                continue
            state = self.state.get(parameter, {})
            found = [parameter, *(state[key] for key in self._kept_zero if state.get(key) is not None)]
            tensors += [permuted(tensor, kept.order) for tensor in found]
            bits += [kept.mask] * len(found)
        apply_masks_(tensors, bits)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, for states of torch.optim as well; what is masked is set to 0.

        Raises ValueError, before anything is changed, for the state of a parameter of another shape.
        """
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        self.apply_masks_()

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """ValueError unless the state's tensors have the shapes of the parameters they are for."""
        saved = [place for group in state_dict["param_groups"] for place in group["params"]]
        ours = [parameter for group in self.param_groups for parameter in group["params"]]
        # Groups of other lengths are torch's to refuse.
        for place, parameter in zip(saved, ours, strict=False):
            state = state_dict["state"].get(place, {})
            for key in self._kept_zero:
                if key in state and state[key] is not None:
                    _check_state_tensor(self._kept[parameter], key, state[key])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": self._kept, "_plans": {}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for place, group in enumerate(self.param_groups):
            plan = self._plans.get(place)
            grads = plan and plan.find_gradients(group["params"], self._list_keys(group), self.state)
            if plan and grads:
                self._run(group, plan.weights, grads, plan.families, [False] * len(grads), plan.masks)
                continue
            for entries in self._with_gradients(group["params"]):
                self._update(place, group, entries)
        return loss

    def _with_gradients(self, parameters: list[Tensor]) -> Iterable[list[_Entry]]:
        """Those that have a gradient, device by device."""
        entries: list[_Entry] = []
        # Names at hand: what is looked up here is what many small tensors cost.
        every, strided = self._kept, torch.strided
        for parameter in parameters:
            grad = parameter.grad
            if grad is None:
                continue
            kept = every[parameter]
            if parameter.shape != kept.shape:
                _check_unchanged(parameter, kept)
            if grad.layout is not strided:
                raise RuntimeError(
                    "a gradient is sparse: expected dense ones; use sparse=False in nn.Embedding"
                )
            entries.append((parameter, grad, kept))
        devices = {parameter.device for parameter, _, _ in entries}
        if len(devices) == 1:
            return [entries]
        return [[entry for entry in entries if entry[0].device == device] for device in devices]

    def _update(self, place: int, group: dict[str, Any], entries: list[_Entry]) -> None:
        """Step the parameters of `entries`, all on one device; what stays the same is kept as a plan."""
        first = [self._begin(group, parameter) for parameter, _, _ in entries]
        orders, keys = [kept.order for _, _, kept in entries], self._list_keys(group)
        masks = [kept.mask for _, _, kept in entries]
        parameters = [parameter for parameter, _, _ in entries]
        weights = [permuted(parameter, kept.order) for parameter, _, kept in entries]
        grads = [permuted(grad, kept.order) for _, grad, kept in entries]
        states = [self.state[parameter] for parameter in parameters] if keys else []
        families = [
            [
                permuted(s[key], o if key in self._kept_zero else None)
                for s, o in zip(states, orders, strict=True)
            ]
            for key in keys
        ]
        self._run(group, weights, grads, families, first, masks)
        if len(parameters) == len(group["params"]):
            self._plans[place] = StepPlan(
                parameters, weights, families, masks, orders, self.state, states, keys
            )

    def _begin(self, group: dict[str, Any], parameter: Tensor) -> bool:
        """Make the parameter's state where there is none; whether this is its first step."""
        raise NotImplementedError

    def _list_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Entries of a parameter's state that a step reads and writes."""
        raise NotImplementedError

    def _run(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        families: list[list[Tensor]],
        first: list[bool],
        masks: list[Tensor | None],
    ) -> None:
        """Call the op. families: states by key; all with dimensions as they lie in memory."""
        raise NotImplementedError

    def _attach(self, group: dict[str, Any], masks: MasksByName) -> None:
        for name, parameter in zip(list_names(group), group["params"], strict=True):
            if not parameter.is_floating_point():
                raise ValueError(f"{name} is {parameter.dtype}: expected floating point")
            order = memory_order(parameter)
            mask = pack_in_order(masks, name, parameter, order) if name in masks else None
            self._kept[parameter] = _Kept(name, parameter.shape, order, mask)

    def _rate(self, group: dict[str, Any]) -> tuple[float, Tensor | None]:
        lr = group["lr"]
        return (0.0, lr) if isinstance(lr, Tensor) else (float(lr), None)


class MaskedSGD(MaskedOptimizer):
    """torch.optim.SGD that keeps masked weights at 0.

    params: model.named_parameters(), or groups of named parameters. masks: by parameter name, True where a
    weight is kept: bool of the parameter's shape, or uint8 [ceil(n / 8)] from `ops.pack_mask`; parameters
    without a mask are ordinary ones. lr: float, or a tensor with one element. Others as in torch.optim.SGD.
    Raises ValueError for parameters without names, and for masks that do not fit.
    """

    _kept_zero = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        masks: MasksByName,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        dampening: float = 0,
        maximize: bool = False,
    ) -> None:
        _at_least_zero("momentum", momentum)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("nesterov needs a momentum above 0 and a dampening of 0")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, masks, defaults)

    def _list_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._kept_zero if group["momentum"] else ()

    def _begin(self, group: dict[str, Any], parameter: Tensor) -> bool:
        if not group["momentum"] or self.state[parameter].get("momentum_buffer") is not None:
            return False
        _refuse_to_begin_in_a_capture()
        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return True

    def _run(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        families: list[list[Tensor]],
        first: list[bool],
        masks: list[Tensor | None],
    ) -> None:
        momenta, first = (families[0], first) if families else ([], [])
        masked_sgd_op(
            weights, grads, momenta, masks, first, *self._rate(group), float(group["momentum"]),
            float(group["dampening"]), float(group["weight_decay"]), group["nesterov"], group["maximize"],
        )  # fmt: skip


class MaskedAdamW(MaskedOptimizer):
    """torch.optim.AdamW, without amsgrad, that keeps masked weights at 0.

    params, masks, lr and errors as in `MaskedSGD`; others as in torch.optim.AdamW.
    """

    _kept_zero = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        masks: MasksByName,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        _at_least_zero("eps", eps)
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas are {betas}: expected numbers from 0 to below 1")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, masks, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, for states of torch.optim as well; what is masked is set to 0. Raises as `MaskedSGD`'s."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:  # torch.optim keeps it on the CPU, or as a number
                step = torch.as_tensor(state["step"], dtype=torch.float32)
                state["step"] = step.to(parameter.device)

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        super()._check_state(state_dict)
        for place, state in state_dict["state"].items():
            if "step" not in state:
                continue
            if torch.as_tensor(state["step"]).numel() != 1 or any(
                state.get(key) is None for key in self._kept_zero
            ):
                raise ValueError(
                    f"the state of parameter {place} is not AdamW's: expected step, one number, with exp_avg "
                    "and exp_avg_sq"
                )

    def _list_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*self._kept_zero, "step")

    def _begin(self, group: dict[str, Any], parameter: Tensor) -> bool:
        state = self.state[parameter]
        if "step" in state:
            return False
        _refuse_to_begin_in_a_capture()
        # On the parameter's device, as torch's capturable: a captured graph counts on.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
        return True

    def _run(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        families: list[list[Tensor]],
        first: list[bool],
        masks: list[Tensor | None],
    ) -> None:
        beta1, beta2 = group["betas"]
        masked_adamw_op(
            weights, grads, *families, masks, *self._rate(group), float(beta1), float(beta2),
            float(group["eps"]), float(group["weight_decay"]), group["maximize"],
        )  # fmt: skip


def _refuse_to_begin_in_a_capture() -> None:
    """RuntimeError in a CUDA graph's capture, every replay of which would begin anew with an empty state."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a parameter's first step is being captured in a CUDA graph, and every replay would be a first "
            "step: call step() once before the capture"
        )


# ---- what is refused before memory is touched


def _check_unchanged(parameter: Tensor, kept: _Kept) -> None:
    if parameter.shape != kept.shape:
        raise ValueError(
            f"{kept.name} had shape {list(kept.shape)} and now has {list(parameter.shape)}: expected the "
            "shape for which its mask was made; make a new optimiser"
        )


def _check_state_tensor(kept: _Kept, key: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.shape != kept.shape or value.layout != torch.strided:
        found = f"has shape {list(value.shape)}" if isinstance(value, Tensor) else f"is {value!r}"
        raise ValueError(
            f"{key} of {kept.name} {found}: expected a dense tensor of shape {list(kept.shape)}; is this the "
            "state of another model?"
        )


# ---- settings


def _check_rates(defaults: dict[str, Any]) -> None:
    if isinstance(defaults["lr"], Tensor) and defaults["lr"].numel() != 1:
        raise ValueError(f"lr has shape {list(defaults['lr'].shape)}: expected one element")
    for name in ("lr", "weight_decay"):
        _at_least_zero(name, defaults[name])


def _at_least_zero(name: str, value: float | Tensor) -> None:
    if not value >= 0:
        raise ValueError(f"{name} is {float(value)}: expected 0 or more")

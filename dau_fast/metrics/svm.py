"""The support vector machine of the membership attacks: exact for few points, of low rank for many.

scikit-learn's solver needs time that grows with the square of the number of points. Above a limit the
same optimisation problem is solved here in time that grows linearly: the points of a cell of a fine grid
become one weighted point (a weight scales the penalty, so for equal points nothing changes), pivoted
Cholesky writes the smooth kernel as a product of two thin matrices, and an interior-point method solves
the dual problem over those (Fine and Scheinberg 2001, JMLR 2:243).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dau_fast.errors import Diverged

_log = logging.getLogger("dau_fast")

# Up to this many points in all the machine is scikit-learn's own.
EXACT_LIMIT = 4000
# Points of one side that agree to this much in every column become one.
_CELL = 1e-3
# The kernel's factor ends where no diagonal entry is further off than this, or at `_rank`.
_RESIDUAL = 1e-6
# The rank follows the columns up to here: time grows with its square.
_MOST_COLUMNS = 2000
# Penalty of a point on the wrong side, the reference implementation's.
_PENALTY = 3.0
# A decision nearer to 0 is 0, which scikit-learn calls member.
_TIE = 1e-6
# What an interior point may miss to be the solution: of the objective, relatively, and of a decision.
_GAP, _SLOPE, _STEPS = 1e-7, 1e-4, 100
# A point's share of its penalty this far from 0 and 1 is free: it lies on the margin.
_FREE = 1e-3
# Rows worked on at a time: what is in between stays in the cache, and is never as large as the scores.
_ROWS = 2048

# Scores [T, K] -> whether each is called non-member [T].
Machine = Callable[[Tensor], Tensor]


def fit(members: Tensor, non_members: Tensor, *, exact_limit: int = EXACT_LIMIT) -> Machine:
    """SVC(C=3, gamma="auto", kernel="rbf") that tells `members` [M, K] from `non_members` [M', K].

    Above exact_limit points in all it is a machine of low rank, with at least 99.5 % of the exact
    machine's verdicts up to 2,000 columns; above those it warns and is rougher. Where decisions all lie
    within 1e-3 of 0, as where only rounding tells scores apart, the exact machine's verdict itself is
    chance: scikit-learn stops that far from the optimum. Raises Diverged, as the machine does, for
    scores that are not finite.
    """
    _check(members, non_members)
    if len(members) + len(non_members) <= exact_limit:
        return _Exact(members, non_members)
    return _LowRank(members, non_members)


def _check(*scores: Tensor) -> None:
    if not all(bool(some.isfinite().all()) for some in scores):
        raise Diverged(
            "the model's outputs hold NaN or infinity, finite ones were expected: lower the learning rate "
            "of what trained it"
        )


class _Exact:
    def __init__(self, members: Tensor, non_members: Tensor) -> None:
        x = torch.cat([members, non_members]).double().cpu().numpy()
        y = np.repeat([1, 0], [len(members), len(non_members)])
        from sklearn.svm import SVC  # only where something is measured: it takes a while to import

        self.svm = SVC(C=_PENALTY, gamma="auto", kernel="rbf").fit(x, y)

    def __call__(self, scores: Tensor) -> Tensor:
        _check(scores)
        if not len(scores):
            return torch.zeros(0, dtype=torch.bool)  # scikit-learn refuses to judge nothing
        return torch.from_numpy(self.svm.predict(scores.double().cpu().numpy()) == 0)


class _LowRank:
    def __init__(self, members: Tensor, non_members: Tensor) -> None:
        if members.shape[1] > _MOST_COLUMNS:
            _log.warning("an attack on %d columns: its verdicts are rough", members.shape[1])
        sides = [_merged(side.double()) for side in (members, non_members)]
        x, weight = (torch.cat(pair) for pair in zip(*sides, strict=True))
        sign = torch.ones_like(weight)
        sign[len(sides[0][0]) :] = -1
        self.gamma = 1 / x.shape[1]
        factor, pivots = _pivoted_cholesky(x, self.gamma, _rank(x.shape[1]))
        # The factor's rows at the pivots are triangular: with them the normal becomes a sum of kernels.
        self.pivots, triangle = x[pivots], factor[pivots].T
        normal, self.offset = _solve(factor.mul_(sign[:, None]), sign, _PENALTY * weight)
        self.weights = torch.linalg.solve_triangular(triangle, normal[:, None], upper=True)[:, 0]

    def decision(self, scores: Tensor) -> Tensor:
        """Positive for members [T]."""
        return torch.cat(
            [
                _kernel(rows.double(), self.pivots, self.gamma) @ self.weights + self.offset
                for rows in scores.split(_ROWS)
            ]
        )

    def __call__(self, scores: Tensor) -> Tensor:
        _check(scores)
        return self.decision(scores) < -_TIE


def _rank(columns: int) -> int:
    """Every class is a direction of the probability vectors, and some bends are needed beside those."""
    return min(max(128, columns + 32), _MOST_COLUMNS + 32)


def _merged(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of every occupied cell of a grid over `x` [M, K] the mean point, and how many points it holds."""
    # A row's cell as one number; that two cells share one has a chance of some 1e-11 for 20,000 points.
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**63), 2**63 - 1, (x.shape[1],), generator=generator).to(x.device)
    keys = torch.cat([((rows / _CELL).round().long() * random).sum(1) for rows in x.split(_ROWS)])
    _, cell, count = keys.unique(return_inverse=True, return_counts=True)
    weight = count.to(x)
    means = x.new_zeros(len(count), x.shape[1]).index_add_(0, cell, x) / weight[:, None]
    return means, weight


def _kernel(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """exp(-gamma |a_i - b_j|^2), [N, N'], of `a` [N, K] and `b` [N', K]."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squares.clamp_min_(0).mul_(-gamma).exp_()


def _pivoted_cholesky(x: Tensor, gamma: float, rank: int) -> tuple[Tensor, list[int]]:
    """F [N, R] with F F^T near the kernel matrix of `x` [N, K], and the R rows that F is exact at."""
    squares = torch.linalg.vector_norm(x, dim=1).square()
    left = torch.ones_like(squares)
    rows = x.new_empty(min(rank, len(x)), len(x))
    pivots: list[int] = []
    for r in range(len(rows)):
        i = int(left.argmax())
        if left[i] <= _RESIDUAL:
            break
        distances = (squares + squares[i]).sub_(x @ x[i], alpha=2).clamp_min_(0)
        column = distances.mul_(-gamma).exp_()
        column -= rows[:r, i] @ rows[:r]
        torch.div(column, left[i].sqrt(), out=rows[r])
        left -= rows[r].square()
        pivots.append(i)
        left[pivots] = 0
    return rows[: len(pivots)].T.contiguous(), pivots


def _solve(y: Tensor, sign: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Normal [R] and offset of the machine: `y` [N, R] features times `sign`, `bound` [N] penalties."""
    dual = _Dual(y, sign, bound)
    try:
        for _ in range(_STEPS):
            if dual.solved():
                break
            dual.step()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass  # so near the bounds that a step cannot be computed: the last point stands
    if not dual.solved():
        _log.warning("an attack's support vector machine has not converged")
    return dual.normal, dual.middle()


class _Dual:
    """An interior point of: minimise |Y^T alpha|^2 / 2 - sum alpha, 0 <= alpha <= bound, sign . alpha = 0.

    Y is [N, R]. The multipliers of the bounds are low and high [N], that of the equation is the
    machine's offset. A step is Mehrotra's predictor and corrector.
    """

    def __init__(self, y: Tensor, sign: Tensor, bound: Tensor) -> None:
        self.y, self.sign, self.bound = y, sign, bound
        self.alpha, self.room = bound / 2, bound / 2
        self.low, self.high = torch.ones_like(bound), torch.ones_like(bound)
        self.offset = bound.new_zeros(())
        self._look()

    def solved(self) -> bool:
        objective = self.alpha.sum() - self.normal.square().sum() / 2
        gap = (self.alpha @ self.low + self.room @ self.high) / (1 + objective.abs())
        errors = torch.stack([gap, self.balance.abs() / self.bound.sum(), self.slope.abs().max()])
        return bool((errors < errors.new_tensor([_GAP, _GAP, _SLOPE])).all())

    def middle(self) -> Tensor:
        """The offset; where a whole interval is optimal its middle, as in scikit-learn.

        That is so where every alpha is at a bound, which is common at many classes.
        """
        share = self.alpha / self.bound
        if bool(((share > _FREE) & (share < 1 - _FREE)).any()):
            return self.offset
        # The offset that puts each point on its margin bounds the interval from above or from below.
        margin = self.sign * (1 - self.y @ self.normal)
        above = (self.sign > 0) == (share > 0.5)
        return (margin[above].min() + margin[~above].max()) / 2

    def step(self) -> None:
        self._factorise()
        aim = torch.zeros_like(self.alpha)
        guess = self._direction(aim, aim)
        length = self._length(guess)
        alpha, low, high, _ = guess
        reached = (self.alpha + length * alpha) @ (self.low + length * low)
        reached += (self.room - length * alpha) @ (self.high + length * high)
        mean = self.alpha @ self.low + self.room @ self.high
        aim += (reached / mean) ** 3 * mean / (2 * len(aim))
        chosen = self._direction(aim - alpha * low, aim + alpha * high)
        # Not all the way to the border, from which the next step could not leave.
        length = (0.995 * self._length(chosen)).clamp_max(1)
        alpha, low, high, offset = (length * change for change in chosen)
        self.alpha = self.alpha + alpha
        self.room = self.room - alpha  # not bound - alpha, which rounds to 0 near the bound
        self.low, self.high, self.offset = self.low + low, self.high + high, self.offset + offset
        self._look()

    def _look(self) -> None:
        """What this point misses: slope of the Lagrangian and the equation."""
        self.normal = self.y.T @ self.alpha
        self.slope = self.y @ self.normal - 1 + self.offset * self.sign - self.low + self.high
        self.balance = self.sign @ self.alpha

    def _factorise(self) -> None:
        self._inverse = 1 / (self.low / self.alpha + self.high / self.room)
        inner = torch.eye(self.y.shape[1]).to(self.y)
        for rows, scale in zip(self.y.split(_ROWS), self._inverse.split(_ROWS), strict=True):
            inner.addmm_((rows * scale[:, None]).T, rows)
        self._triangle = torch.linalg.cholesky(inner)
        self._of_sign = self._solve(self.sign)

    def _solve(self, v: Tensor) -> Tensor:
        """(D + Y Y^T)^-1 v by way of an R x R matrix (Woodbury); D is the diagonal that the bounds add."""
        v = self._inverse * v
        inner = torch.cholesky_solve((self.y.T @ v)[:, None], self._triangle)[:, 0]
        return v - self._inverse * (self.y @ inner)

    def _direction(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of alpha, multipliers and offset, towards alpha * multiplier = `low` and room * other = `high`."""
        low, high = low / self.alpha - self.low, high / self.room - self.high
        free = self._solve(low - high - self.slope)
        offset = (self.sign @ free + self.balance) / (self.sign @ self._of_sign)
        alpha = free - offset * self._of_sign
        low -= self.low / self.alpha * alpha
        high += self.high / self.room * alpha
        return alpha, low, high, offset

    def _length(self, direction: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """How far the direction may be followed, at most 1."""
        alpha, low, high, _ = direction
        now = torch.cat([self.alpha, self.room, self.low, self.high])
        change = torch.cat([alpha, -alpha, low, high])
        return torch.where(change < 0, now / -change, torch.inf).min().clamp_max(1)

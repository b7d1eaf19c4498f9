"""The report as a dictionary: one run's numbers, and the mean and spread of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any, Protocol

from torch import nn

from dau_fast.job.experiment import SeedResult
from dau_fast.metrics.gaps import signed_gaps
from dau_fast.metrics.unlearning import Measures, avg_gap
from dau_fast.prune import Masks
from dau_fast.report.facts import describe_forget_set

SCHEMA = 1


def build_report(run: dict[str, Any], results: Sequence[SeedResult]) -> dict[str, Any]:
    """The whole report: `run` says what ran, `results` holds one entry a seed, at least one.

    The game and the tuning are the first seed's, the latter where there was one. noise_floor needs two
    retrainings a seed, else it is None.
    """
    gaps = [result.retraining_gap for result in results]
    known = [gap for gap in gaps if gap is not None]
    entries = [describe_seed(result) for result in results]
    several = len(results) > 1
    tunings = {name: asdict(tuning) for name, tuning in results[0].tunings.items()}
    return {
        "schema": SCHEMA,
        "run": run,
        "methods": _with_tuning(combine(entries), results[0]),
        "game": results[0].history,
        "noise_floor": fmean(known) if known and len(known) == len(gaps) else None,
        "runs": [_seed_facts(run, *pair) for pair in zip(results, entries, strict=True)] if several else None,
        **({"tuning": tunings} if tunings else {}),
    }


def _with_tuning(methods: dict[str, dict[str, Any]], first: SeedResult) -> dict[str, dict[str, Any]]:
    """The entries, those of methods that were tuned with what that took: "tuning_seconds"."""
    tunings = first.tunings
    return {
        name: entry | ({"tuning_seconds": tunings[name].seconds} if name in tunings else {})
        for name, entry in methods.items()
    }


def _seed_facts(run: dict[str, Any], result: SeedResult, entries: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed": result.seed,
        "forget": describe_forget_set(run["forget"]["spec"], result.split),
        "methods": entries,
        "game": result.history,
        "retraining_gap": result.retraining_gap,
    }


def describe_seed(result: SeedResult) -> dict[str, dict[str, Any]]:
    """What the report says of each method of one seed, the original first."""
    outcome = result.outcome
    measures, finished, masks = outcome.measures, outcome.finished, outcome.masks
    reference = (measures["retrain"], finished["retrain"]) if "retrain" in finished else None
    return {
        name: method_entry(
            measures[name],
            finished.get(name),
            reference,
            fast=finished.get("retrain_fast"),
            clean=measures.get("retrain_clean"),
            sparsity=zero_share(network, masks[name]) if name in masks else None,
        )
        for name, network in result.networks.items()
    }


class Clocked(Protocol):
    """What the making of a model took; seconds None where nobody stood by."""

    @property
    def seconds(self) -> float | None: ...

    @property
    def compile_seconds(self) -> float: ...


def method_entry(
    measures: Measures,
    finished: Clocked | None,
    reference: tuple[Measures, Clocked] | None,
    *,
    fast: Clocked | None = None,
    clean: Measures | None = None,
    sparsity: float | None = None,
) -> dict[str, Any]:
    """What the report says of one method. finished: None where its making was not timed.

    reference: the retrained model's; avg_gap, gaps (signed, of every rate) and speedup are None without it.
    fast: the retraining by the fast recipe, for "speedup_fast". clean: those of the model retrained with
    masks of its own, for "avg_gap_clean". sparsity: of the model, 0 to 1. An entry has these three, balanced
    accuracies, what was measured of earlier requests, and margins with their ROC curve, where they are known.
    """
    seconds = finished.seconds if finished else None
    further = {
        "speedup_fast": _speedup(fast, seconds),
        "sparsity": sparsity,
        "avg_gap_clean": avg_gap(measures, clean) if clean else None,
        "balanced": measures.balanced,
        "earlier": measures.earlier,
        "roc": measures.roc,
        "margins": measures.margins,
    }
    return {
        "ua": measures.ua,
        "ra": measures.ra,
        "ta": measures.ta,
        "mia_efficacy": measures.mia_efficacy,
        "attacks": measures.attacks,
        "seconds": seconds,
        "compile_seconds": finished.compile_seconds if finished else None,
        "avg_gap": avg_gap(measures, reference[0]) if reference else None,
        "gaps": signed_gaps(measures, reference[0]) if reference else None,
        "speedup": _speedup(reference[1] if reference else None, seconds),
        "confidence": measures.confidence,
        **{key: value for key, value in further.items() if value is not None},
    }


def _speedup(retraining: Clocked | None, seconds: float | None) -> float | None:
    return retraining.seconds / seconds if retraining and retraining.seconds and seconds else None


def zero_share(network: nn.Module, masks: Masks) -> float:
    """Share of zeros, 0 to 1, among the weights of `network` that have a mask."""
    weights = masks.find_weights(network).values()
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / masks.weights


# What holds bins and thresholds beside rates, so that its spread would say nothing.
_BINNED = ("confidence", "roc", "margins")


def combine(runs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Method entries of several runs as one: every number the mean, and "spread" beside them."""
    if len(runs) == 1:
        return runs[0]
    combined = {}
    for name in runs[0]:
        entries = [run[name] for run in runs]
        combined[name] = _over(entries, fmean)
        spread = {key: _over(values, stdev) for key, values in _columns(entries).items()}
        combined[name]["spread"] = {k: v for k, v in spread.items() if k not in _BINNED}
    return combined


def _columns(entries: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [entry[key] for entry in entries] for key in entries[0]}


def _over(values: Sequence[Any], statistic: Any) -> Any:
    """Apply `statistic` to numbers that stand at the same place of nested dicts and lists."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, dict):
        return {key: _over(column, statistic) for key, column in _columns(values).items()}
    if isinstance(first, list):
        return [_over(column, statistic) for column in zip(*values, strict=True)]
    return statistic(values)

"""The report as one self-contained HTML page, from the report dictionary and from nothing else.

The words and numbers are put together here; `page.html.jinja` holds the layout and `plots` the
pictures. The page asks for nothing from outside, so it can be mailed, archived and printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dau_fast.errors import printable
from dau_fast.report import curves, plots
from dau_fast.report.drawing import css_color, method_color, write_colors
from dau_fast.report.reading import (
    MEASURES,
    Report,
    attack_labels,
    difference,
    factor_text,
    known,
    method_about,
    method_name,
    method_order,
    number_text,
    seconds_text,
    signed_text,
)
from dau_fast.report.verdict import verdict

_TEMPLATE = "page.html.jinja"
_SENSITIVITY = {
    "none": "the attacker sees outputs alone",
    "classifier": "norm of the per-sample gradient with respect to the classifier layer",
    "input": "norm of the per-sample gradient with respect to the input",
    "full": "norm of the per-sample gradient with respect to all parameters",
}


def render(report: Report) -> str:
    """The HTML page for `report`, the content of report.json; equal reports give equal pages."""
    report = write_out(report)
    floor = report.get("noise_floor")
    return fill_in(
        _TEMPLATE,
        repeats=report["run"].get("repeats", 1),
        title="Unlearning report",
        subject=_subject(report["run"]),
        verdict=verdict(report),
        rows=[_row(report, name) for name in method_order(report)],
        has_reference="retrain" in report["methods"],
        has_spread=any("spread" in measured for measured in report["methods"].values()),
        noise_floor=number_text(floor, 2) if known(floor) else None,
        pictures={name: draw_both_widths(draw, report) for name, draw in PICTURES.items()},
        attacks=_attack_rows(report),
        attack_names=list(attack_labels(report).values()),
        at_risk=_at_risk(report),
        command=report["run"].get("command"),
        facts=_facts(report),
    )


def fill_in(template: str, **values: Any) -> str:
    """The page that `template` makes of `values`, in the colours of the pictures."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
    )
    colors = {"colors": Markup(write_colors()), "dark_colors": Markup(write_colors(dark=True))}
    return environment.get_template(template).render(**colors, **values)


def write_out(value: Any) -> Any:
    """`value` with every text in it as `printable` has it: pages and pictures hold no half characters."""
    if isinstance(value, dict):
        return {write_out(name): write_out(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [write_out(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value


PICTURES: dict[str, Callable[..., str | None]] = {
    "comparison": plots.comparison,
    "cost": curves.gap_against_time,
    "attacks": plots.attacks,
    "roc": curves.roc,
    "confidences": plots.confidences,
    "margins": curves.margins,
    "game": plots.game,
}


def draw_both_widths(draw: Callable[..., str | None], report: Report) -> tuple[Markup, Markup] | None:
    """The picture for a page and for a telephone, of which the style sheet shows one; None of nothing."""
    wide = draw(report)
    return None if wide is None else (Markup(wide), Markup(draw(report, narrow=True)))


# ---- the tables


def _attack_rows(report: Report) -> list[tuple[str, list[str]]]:
    """What each attack calls non-member, in percent, by method."""
    shares = {name: report["methods"][name]["attacks"] for name in method_order(report)}
    return [
        (method_name(report, name), [number_text(found.get(attack)) for attack in attack_labels(report)])
        for name, found in shares.items()
    ]


def _at_risk(report: Report) -> dict[str, Any] | None:
    """The forgotten images that are still known best; their pictures are shown if they are PNGs."""
    found = report.get("at_risk")
    if not found or not found["images"]:
        return None
    rows = [
        {
            "index": entry["index"],
            "label": entry.get("label"),
            "margin": number_text(entry["margin"]),
            "retrained": number_text(entry.get("retrained")),
            "thumbnail": picture if _THUMBNAIL.fullmatch(picture := entry.get("thumbnail") or "") else None,
        }
        for entry in found["images"]
    ]
    shown = any(row["thumbnail"] for row in rows)
    return {
        "method": method_name(report, found["method"]),
        "rows": rows,
        "shown": shown,
        "compared": any(known(entry.get("retrained")) for entry in found["images"]),
        "optional": "options" in report["run"],
    }


# What a page takes for a picture: nothing that is loaded or run.
_THUMBNAIL = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]{1,30000}")


def _row(report: Report, method: str) -> dict[str, Any]:
    measured, spread = report["methods"][method], report["methods"][method].get("spread", {})
    is_reference = method == "retrain"
    cells = [
        {
            "value": number_text(measured.get(measure)),
            "spread": number_text(spread.get(measure)),
            "difference": _difference(report, method, measure),
        }
        for measure in MEASURES
    ]
    gap, floor = measured.get("avg_gap"), report.get("noise_floor")
    compiling = measured.get("compile_seconds")
    return {
        "name": method_name(report, method),
        "about": method_about(report, method),
        "color": css_color(method_color(report, method)),
        "is_reference": is_reference,
        "cells": cells,
        "gap": None if is_reference else number_text(gap, 2),
        "gap_spread": number_text(spread.get("avg_gap"), 2),
        "within_noise": known(gap) and known(floor) and gap <= floor and not is_reference,
        "seconds": seconds_text(measured.get("seconds")),
        "seconds_spread": seconds_text(spread.get("seconds")),
        "compiling": seconds_text(compiling) if known(compiling) and compiling > 0 else None,
        "speedup": factor_text(measured.get("speedup")),
        "speedup_fast": factor_text(measured["speedup_fast"]) if "speedup_fast" in measured else None,
        "speedup_spread": factor_text(spread.get("speedup")),
    }


def _difference(report: Report, method: str, measure: str) -> str | None:
    value = None if method == "retrain" else difference(report, method, measure)
    return None if value is None else signed_text(value)


# ---- how this was run


def _subject(run: Report) -> str:
    count = run["forget"]["count"]
    images = "1 image" if count == 1 else f"{count:,} images"
    return f"{images} forgotten ({run['forget']['spec']}), {run['dataset']}, {run['arch']}"


def _facts(report: Report) -> list[tuple[str, str]]:
    """What a reader needs to run it again, as (term, text); what the report lacks is left out."""
    run = report["run"]
    sets, forget, sensitivity = run.get("sets", {}), run["forget"], run.get("sensitivity")
    facts = [
        ("dataset", run["dataset"]),
        ("architecture", run["arch"]),
        ("images", ", ".join(f"{name} {count:,}" for name, count in sets.items())),
        ("forget set", f"{forget['spec']}, {forget['count']:,} images"),
        ("forget indices, SHA-256", forget.get("sha256")),
        ("normalisation", _normalisation(run.get("normalisation"))),
        ("seed", run.get("seed")),
        ("repeats", run.get("repeats")),
        ("training epochs", run.get("epochs")),
        ("retraining epochs", _each(report, run.get("retrain_epochs", {}))),
        *_pruning_facts(report),
        ("sensitivity", sensitivity and _explained(sensitivity)),
        ("game", _last_game(report.get("game"))),
        ("cost of sensitivities", _costs(run.get("sensitivity_costs"))),
        ("tuning", _tuning(report)),
        ("settings", _settings(run)),
        ("retain images", _sample(run.get("retain_sample"))),
        ("device", run.get("device")),
        ("processes", _processes(run)),
        ("engine", _engine(run.get("engine"))),
        ("batches taken in parts", _parts(run.get("loop_parts", {}))),
        ("versions", ", ".join(f"{name} {v}" for name, v in run.get("versions", {}).items())),
        ("started", run.get("started")),
        ("whole run", f"{seconds_text(run['wall_seconds'])} s" if run.get("wall_seconds") else None),
    ]
    return [(term, str(text)) for term, text in facts if text not in (None, "")]


def _normalisation(found: dict[str, Any] | None) -> str | None:
    if not found:
        return None
    mean, std = (", ".join(f"{value:.4g}" for value in found[key]) for key in ("mean", "std"))
    return f"mean {mean}, standard deviation {std} of pixels / 255, from {found['from']}"


def _last_game(game: dict[str, Any] | None) -> str | None:
    """How the game was played that ruined nothing: longer or with smaller steps than the first."""
    if not game or "turns" not in game:
        return None
    *ruined, turns = game["turns"]
    again = f"; {len(ruined)} before it ruined the model" if ruined else ""
    return f"{turns} turns, learning rate {game['lr']:g} at its start, falling to 0{again}"


def _processes(run: dict[str, Any]) -> str:
    return f"{run.get('processes', '')}{', which shared what was trained' if run.get('sharded') else ''}"


def _parts(loops: dict[str, int]) -> str | None:
    return ", ".join(f"{loop} {parts}" for loop, parts in loops.items() if parts > 1) or None


def _tuning(report: Report) -> str:
    """How many settings of each method were tried, how long that took, and which were chosen."""
    found = []
    for name, tuning in (report.get("tuning") or {}).items():
        chosen = tuning["trials"][tuning["chosen"]]["settings"]
        best = ", ".join(f"{field} {value}" for field, value in chosen.items())
        count, seconds = len(tuning["trials"]), seconds_text(tuning["seconds"])
        found.append(f"{method_name(report, name)}: {count} settings in {seconds} s, best {best}")
    return "; ".join(found)


def _settings(run: dict[str, Any]) -> str:
    """Those of a call from Python, which no command stands for."""
    called = {} if "options" in run or "command" in run else run.get("settings", {})
    return ", ".join(f"{name} {value}" for fields in called.values() for name, value in fields.items())


def _sample(times: float | None) -> str | None:
    return None if times is None else f"a sample for the game, {times:g} for each forget image"


def _pruning_facts(report: Report) -> list[tuple[str, str]]:
    """How the models were pruned, where their masks come from, and what is left of each."""
    prune = report["run"].get("prune")
    if not prune:
        return []
    methods = {name: report["methods"][name] for name in method_order(report)}

    def by_method(values: dict[str, str]) -> str:
        return "; ".join(f"{method_name(report, name)}: {values[name]}" for name in methods if name in values)

    final = {name: _share(entry["sparsity"]) for name, entry in methods.items() if "sparsity" in entry}
    clean = {
        name: number_text(entry["avg_gap_clean"], 2)
        for name, entry in methods.items()
        if "avg_gap_clean" in entry and name != "retrain_clean"
    }
    layers = {
        name: ", ".join(f"{layer} {_share(share)}" for layer, share in shares.items())
        for name, shares in prune["layers"].items()
    }
    return [
        ("pruning", f"{prune['method']}, {_share(prune['sparsity'])} of the convolutions' weights"),
        ("masks from", by_method(prune["mask_from"])),
        ("zeros at the end", by_method(final)),
        ("sparsity of layers", by_method(layers)),
        ("avg gap, clean masks", by_method(clean)),
    ]


def _each(report: Report, values: dict[str, int]) -> str:
    return ", ".join(f"{method_name(report, name)} {value}" for name, value in values.items())


def _share(value: float) -> str:
    """A share from 0 to 1 in percent."""
    return f"{number_text(100 * value)} %"


def _costs(measured: dict[str, Any] | None) -> str | None:
    """Each sensitivity's forward and backward pass, as a multiple of the pass without one."""
    if not measured:
        return None
    seconds = measured["seconds"]
    known = {name: taken for name, taken in seconds.items() if name != "none" and taken is not None}
    if seconds["none"] is None or not known:
        return None
    shown = ", ".join(f"{name} {factor_text(taken / seconds['none'])}" for name, taken in known.items())
    return f"{shown} times the seconds of a pass over {measured['images']} images without one"


def _engine(engine: dict[str, Any] | None) -> str | None:
    """How training steps ran, with the loops where these differ."""
    if not engine:
        return None
    loops: dict[str, list[str]] = {}
    for loop, chosen in engine["loops"].items():
        loops.setdefault(chosen, []).append(loop)
    if len(loops) == 1:
        return next(iter(loops))
    return "; ".join(f"{', '.join(names)}: {chosen}" for chosen, names in loops.items())


def _explained(sensitivity: str) -> str:
    meaning = _SENSITIVITY.get(sensitivity)
    return f"{sensitivity}: {meaning}" if meaning else sensitivity

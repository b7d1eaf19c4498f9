"""`python -m dau_fast verify`: are a folder's files and numbers those that its signed statement tells of?"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import click

from dau_fast.engine.runtime import Runtime, choose_device, choose_precision
from dau_fast.errors import UserError, printable
from dau_fast.job.keeping import digest_code
from dau_fast.job.ledger import read_entries
from dau_fast.job.saving import hash_file
from dau_fast.job.verification import measure_again
from dau_fast.report.envelope import canonical, unseal
from dau_fast.report.manifest import ENVELOPE, OPENING
from dau_fast.report.progress import progress_bars
from dau_fast.report.statement import PREDICATE, STATEMENT, commit, describe_entry, first_seed
from dau_fast.report.terminal import terminal

_RATES = ("ua", "ra", "ta", "mia_efficacy")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("folder", type=Path)
@click.option("--key", type=Path, required=True, help="The signer's public key, a PEM file.")
@click.option("--ledger", type=Path, help="The file of requests that must hold the statement.")
@click.option("--data", type=Path, help="Where the data set is, if not where it was.")
@click.option("--measure/--no-measure", default=True, help="Whether to measure all models again.")
@click.option("--tolerance", type=click.FloatRange(0, 100), default=0.5, help="Points that rates may differ.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
def verify(
    folder: Path,
    key: Path,
    ledger: Path | None,
    data: Path | None,
    measure: bool,
    tolerance: float,
    device: str,
) -> None:
    """Confirm or refute what the statement in FOLDER says, byte by byte and number by number."""
    content = _read(folder / ENVELOPE)
    statement = unseal(content, key)
    predicate = _predicate(statement)
    done = [f"the statement is signed by {key}"]
    done += _check_files(folder, statement, predicate)
    done += _compare_code(predicate)
    report = json.loads(_read(folder / "report.json"))
    done += _check_opening(folder, predicate, report)
    if ledger is not None:
        done += _check_ledger(ledger, describe_entry(statement, content))
    if measure:
        with progress_bars() as bars:
            place = choose_device(device)
            runtime = Runtime(place, choose_precision(report["run"]["precision"], place))
            found = measure_again(folder, report["run"], list(first_seed(report)), runtime, data, bars)
        done += _check_measures(found, predicate, report, tolerance)
    with terminal(folder) as console:
        for line in done:
            console.print(printable(f"confirmed: {line}"), markup=False, highlight=False, soft_wrap=True)
        console.print(f"What this does not prove: {len(predicate['doesNotProve'])} points in the statement.")


def _refute(what: str) -> UserError:
    return UserError(f"refuted: {what}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refute(f"'{path}' cannot be read: {error.strerror}") from error


def _predicate(statement: dict[str, Any]) -> dict[str, Any]:
    if statement.get("_type") != STATEMENT or statement.get("predicateType") != PREDICATE:
        raise _refute(f"the statement is of another kind: expected {PREDICATE}")
    found: dict[str, Any] = statement["predicate"]
    return found


def _check_files(folder: Path, statement: dict[str, Any], predicate: dict[str, Any]) -> list[str]:
    """Every file that the statement names is there, byte by byte."""
    named = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    for name, digest in {**predicate["kept"], **named}.items():
        if Path(name).name != name:
            raise _refute(f"the statement names '{name}', which is not in the folder")
        if not (folder / name).is_file() or hash_file(folder / name) != digest:
            raise _refute(f"'{folder / name}' is missing or was changed")
    strangers = sorted(
        file.name for file in folder.iterdir() if file.name not in {*predicate["kept"], ENVELOPE, OPENING}
    )
    others = f"; {len(strangers)} others are not spoken of" if strangers else ""
    return [f"{len(predicate['kept'])} files are those of the statement{others}"]


def _compare_code(predicate: dict[str, Any]) -> list[str]:
    """Other code is no refutation: a later version may read what an earlier one made."""
    if predicate["code"]["digest"]["sha256"] == digest_code():
        return ["this package is the one that made it, file by file"]
    logging.getLogger("dau_fast").warning("another version of this package made it: numbers may differ")
    return []


def _check_opening(folder: Path, predicate: dict[str, Any], report: dict[str, Any]) -> list[str]:
    if not (folder / OPENING).exists():
        return []
    content = _read(folder / OPENING)
    try:
        opened = json.loads(content)
        salt = bytes.fromhex(opened["salt"])
        # Written anew, so that a capital letter among the digits shows, too.
        sound = canonical({"indices": opened["indices"], "salt": salt.hex()}) == content
        value = commit(opened["indices"], salt)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _refute(f"'{folder / OPENING}' was changed: {error}") from error
    if not sound or value != predicate["forgetSet"]["commitment"]["value"]:
        raise _refute(f"'{folder / OPENING}' does not open the commitment to the forget set")
    if opened["indices"] != report["run"]["forget"]["indices"]:
        raise _refute("the report forgot other images than were committed to")
    return [f"the commitment opens to the {len(opened['indices'])} images that the report names"]


def _check_ledger(ledger: Path, expected: dict[str, Any]) -> list[str]:
    entries = read_entries(ledger)
    if not any({**entry, **expected} == entry and len(entry) == len(expected) + 1 for entry in entries):
        raise _refute(f"ledger '{ledger}' does not hold this statement")
    told = f"the ledger holds it for request {expected['request']}"
    return [f"{told}, and its {len(entries)} lines follow one another"]


def _check_measures(
    found: Any, predicate: dict[str, Any], report: dict[str, Any], tolerance: float
) -> list[str]:
    if found.images != predicate["data"]["digest"]["sha256"]:
        raise _refute("the data are others than those that the run measured on")
    largest = 0.0
    for name, entry in first_seed(report).items():
        for rate in _RATES:
            before, now = entry[rate], getattr(found.measures[name], rate)
            if (before is None) != (now is None):
                raise _refute(f"{rate} of {name} is {now} and was {before}")
            largest = max(largest, abs(now - before) if before is not None else 0.0)
            if before is not None and not abs(now - before) <= tolerance:
                raise _refute(f"{rate} of {name} is {now:.2f} % and was {before:.2f} %")
    models = len(found.measures)
    return [f"rates of {models} models, measured again, differ by {largest:.3f} points at most"]

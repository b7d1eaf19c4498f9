"""A finished run as an in-toto statement: which weights became which, how, and what was measured.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md; docs/evidence.md has the predicate.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from dau_fast.errors import UserError
from dau_fast.job.saving import hash_file

STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "urn:dau-fast:unlearning:v1"

NOT_PROVEN = (
    "That the forget set left no trace: measures and audits tell models apart, or do not; that is no proof.",
    "That the weights were made by the procedure stated here: others may lead to the same measures.",
    "That no other copy of the model, of the data or of backups exists.",
    "That the forget set is complete: it holds what the request named, and not what resembles it.",
    "That retraining elsewhere gives the same numbers: they vary with seed, hardware and versions.",
)


def open_report(folder: Path) -> dict[str, Any]:
    """The report of the run in `folder`. Raises UserError where there is none, or a file of it is another."""
    try:
        report = json.loads((folder / "report.json").read_bytes())
        named = {str(name): str(told["sha256"]) for name, told in report["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"'{folder}' holds no complete report of this version: run again with this `out` ({error})"
        ) from error
    for name, digest in named.items():
        if "/" in name or not (folder / name).is_file() or hash_file(folder / name) != digest:
            raise UserError(f"'{folder / name}' is not the file that report.json names: it was changed")
    return report


def commit(indices: Sequence[int], salt: bytes) -> str:
    """SHA-256 over `salt` and the indices as little-endian int64: without the salt they could be guessed."""
    return hashlib.sha256(salt + np.array(indices, dtype="<i8").tobytes()).hexdigest()


def draw_salt() -> bytes:
    """32 bytes that nobody guesses."""
    return secrets.token_bytes(32)


def build_statement(
    folder: Path, report: Mapping[str, Any], method: str, request_id: str, salt: bytes
) -> dict[str, Any]:
    """The statement that `method` made new weights of the original's in the run in `folder`.

    Raises UserError for a method that the report does not hold.
    """
    run, files = report["run"], report["files"]
    before, after = "original.safetensors", f"{method}.safetensors"
    if method == "original" or method not in report["methods"] or after not in files:
        known = ", ".join(name for name in report["methods"] if name != "original")
        raise UserError(f"`method={method}` is none of the run in '{folder}': expected one of {known}")
    kept = {name: told["sha256"] for name, told in files.items()}
    kept["report.json"] = hash_file(folder / "report.json")
    predicate = {
        "request": {"id": request_id, "stated": datetime.now(UTC).isoformat(timespec="seconds")},
        "forgetSet": _describe_commitment(run["forget"], salt),
        "data": {"name": run["dataset"], "sets": run["sets"], "digest": {"sha256": run["digests"]["images"]}},
        "code": {"name": "dau-fast", "digest": {"sha256": run["digests"]["code"]}},
        "recipe": _describe_recipe(run, method),
        "environment": {name: run[name] for name in _ENVIRONMENT} | {"engine": run["engine"]["asked"]},
        "measures": describe_measures(report),
        "noiseFloor": report["noise_floor"],
        "audits": _list_audits(folder, kept),
        "kept": kept,
        "doesNotProve": list(NOT_PROVEN),
    }
    subject = [{"name": name, "digest": {"sha256": files[name]["sha256"]}} for name in (before, after)]
    return {"_type": STATEMENT, "subject": subject, "predicateType": PREDICATE, "predicate": predicate}


# Of the report's "run".
_ENVIRONMENT = ("device", "hardware", "precision", "processes", "versions")
_RECIPE = ("seed", "repeats", "settings", "started")


def _describe_commitment(forget: Mapping[str, Any], salt: bytes) -> dict[str, Any]:
    algorithm = "sha256(salt || indices as little-endian int64)"
    commitment = {"algorithm": algorithm, "value": commit(forget["indices"], salt)}
    return {"count": forget["count"], "commitment": commitment}


def _describe_recipe(run: Mapping[str, Any], method: str) -> dict[str, Any]:
    given = {"checkpoint": run["checkpoint"]["sha256"]} if "checkpoint" in run else {}
    return {"method": method, "network": run["arch"], **{name: run[name] for name in _RECIPE}, **given}


def describe_entry(statement: Mapping[str, Any], envelope: bytes) -> dict[str, Any]:
    """The ledger's line for `statement` in its `envelope`."""
    request = statement["predicate"]["request"]
    return {
        "request": request["id"],
        "stated": request["stated"],
        "envelope": hashlib.sha256(envelope).hexdigest(),
        "subject": {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]},
    }


def first_seed(report: Mapping[str, Any]) -> dict[str, Any]:
    """The methods' entries of the seed whose weights were written."""
    found: dict[str, Any] = report["runs"][0]["methods"] if report["runs"] else report["methods"]
    return found


def describe_measures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Rates in percent by method, each with its 95 % interval where it counts images (Wilson 1927)."""
    sets = report["run"]["sets"]
    counted = {"ua": sets["forget"], "ra": sets["retain"], "ta": sets["test"], "mia_efficacy": sets["forget"]}
    found = {}
    for name, entry in first_seed(report).items():
        rates = {
            key: {"percent": entry[key], "interval95": _interval(entry[key], count)}
            for key, count in counted.items()
        }
        found[name] = {**rates, "avgGap": entry["avg_gap"], "attacks": entry["attacks"]}
    return found


def _interval(percent: float | None, count: int) -> list[float] | None:
    if percent is None or not count:
        return None
    found = binomtest(round(percent / 100 * count), count).proportion_ci(method="wilson")
    return [round(100 * float(found.low), 3), round(100 * float(found.high), 3)]


def _list_audits(folder: Path, kept: dict[str, str]) -> list[dict[str, Any]]:
    """The audit in `folder`, where there is one, in the words of in-toto's test results."""
    file = folder / "audit.json"
    if not file.is_file():
        return []
    kept[file.name] = hash_file(file)
    found = json.loads(file.read_bytes())
    return [
        {
            "result": "PASSED" if found["verdict"]["inside"] else "FAILED",
            "passedTests": [name for name, entry in found["audits"].items() if not entry["outside"]],
            "failedTests": [name for name, entry in found["audits"].items() if entry["outside"]],
            "falseAlarmRate": found["verdict"]["false_alarm_rate"],
            "checkpoints": found["run"]["checkpoints"],
        }
    ]

"""An audit as one self-contained HTML page, from the content of audit.json and from nothing else."""

from __future__ import annotations

from typing import Any

from dau_fast.report.audit import audit_number, audit_verdict, audit_word
from dau_fast.report.bands import bands
from dau_fast.report.page import draw_both_widths, fill_in, write_out
from dau_fast.report.reading import Report, number_text, seconds_text


def render_audit(report: Report) -> str:
    """The HTML page for `report`, the content of audit.json; equal reports give equal pages."""
    report = write_out(report)
    run = report["run"]
    return fill_in(
        "audit.html.jinja",
        title="Audit",
        subject=f"{', '.join(run['checkpoints'])}: {run['forget']['count']:,} images forgotten "
        f"({run['forget']['spec']}), {run['dataset']}, {run['arch']}",
        verdict=audit_verdict(report),
        bands=draw_both_widths(bands, report),
        rows=[_row(entry) for entry in report["audits"].values()],
        skipped=_group(report["skipped"]),
        facts=_facts(report),
    )


def _group(skipped: dict[str, str]) -> list[str]:
    """The audits that did not run, by why."""
    reasons = dict.fromkeys(skipped.values())
    return [
        f"{', '.join(name for name, why in skipped.items() if why == reason)} ({reason})"
        for reason in reasons
    ]


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": entry["label"],
        "unit": entry["unit"],
        "value": audit_number(entry, "value"),
        "gap": audit_number(entry, "gap", "+"),
        "low": audit_number(entry, "low"),
        "high": audit_number(entry, "high"),
        "original": audit_number(entry, "original"),
        "p_value": number_text(entry["p_value"], 2),
        "word": audit_word(entry),
    }


def _facts(report: Report) -> list[tuple[str, str]]:
    """What a reader needs to audit again, as (term, text)."""
    run, gaps = report["run"], report["gaps"]
    facts = [
        ("audited", ", ".join(run["checkpoints"])),
        ("original", run["original"]),
        ("retrained models", ", ".join(run["references"])),
        ("trained for this audit", run["trained_references"]),
        ("images", ", ".join(f"{name} {count:,}" for name, count in run["sets"].items())),
        ("forget indices, SHA-256", run["forget"]["sha256"]),
        ("seed", run["seed"]),
        ("avg gap to the mean of retrained models", number_text(gaps["audited"]["to_mean"], 2)),
        ("the original's", number_text(gaps["original"]["to_mean"], 2)),
        ("information difference index", number_text(report["information_difference_index"], 2)),
        ("settings", ", ".join(f"{name} {value}" for name, value in run["settings"].items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
        ("started", run["started"]),
        ("whole audit", f"{seconds_text(run['wall_seconds'])} s"),
    ]
    return [(term, str(text)) for term, text in facts]

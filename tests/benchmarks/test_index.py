"""benchmarks/README.md lists every command, record, row file and helper, and where records are quoted."""

from __future__ import annotations

import re

import pytest
from scripts import BENCHMARKS, ROOT

INDEX = (BENCHMARKS / "README.md").read_text()
# Cells: command, rows, record, quoted in.
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in INDEX.splitlines()
    if line.startswith("| `python ")
]
RECORD = re.compile(r"benchmarks/records/([\w.-]+)")


def quoting(record: str) -> set[str]:
    """Files of README and docs that name `record`."""
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    return {
        str(text.relative_to(ROOT)) for text in texts if record in RECORD.findall(text.read_text("utf-8"))
    }


def test_every_command_stands_in_the_index_and_is_there() -> None:
    named = {script for row in ROWS for script in re.findall(r"benchmarks/([\w.]+\.py)", row[0])}
    there = {file.name for file in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in file.read_text()}
    assert named == there


def test_every_file_of_rows_stands_in_the_index_and_is_there() -> None:
    named = {file for row in ROWS for file in re.findall(r"\[(test_\w+\.py)\]", row[1])}
    assert named == {file.name for file in BENCHMARKS.glob("test_*_speed.py")}


def test_every_record_stands_in_the_index_once_and_is_there() -> None:
    named = [record for row in ROWS for record in re.findall(r"\[([\w.-]+)\]", row[2])]
    assert sorted(named) == sorted(folder.name for folder in (BENCHMARKS / "records").iterdir())


def test_every_helper_stands_in_the_index_and_is_there() -> None:
    named = re.findall(r"`(\w+\.py)`", INDEX.partition("`support/`")[2])
    there = {file.name for file in (BENCHMARKS / "support").glob("*.py")} - {"__init__.py"}
    assert {file for file in named if file != "scaling.py"} == there


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", INDEX)
    assert links
    assert [link for link in links if not (BENCHMARKS / link).exists()] == []


@pytest.mark.parametrize("row", ROWS, ids=[row[2].strip("[").partition("]")[0] for row in ROWS])
def test_a_record_is_quoted_where_the_index_says(row: list[str]) -> None:
    found = re.search(r"\[([\w.-]+)\]", row[2])
    where = quoting(found[1]) if found else set()
    assert set(re.findall(r"\[([^\]]+)\]", row[3])) == where, f"the last cell of {row[2]}: name these files"


def test_whatever_record_is_quoted_is_there() -> None:
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {record for text in texts for record in RECORD.findall(text.read_text("utf-8"))}
    assert {record for record in named if not (BENCHMARKS / "records" / record).is_dir()} == set()

"""Which files belong to a report, by name and SHA-256, in the report itself."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dau_fast.job.saving import hash_file

# In the folder of a run that is attested: the signed statement, and what opens its commitment.
ENVELOPE, OPENING = "evidence.dsse.json", "forget-opening.json"
# What a run may write; a report that names anything else is not believed.
_OURS = re.compile(r"[\w-][\w.-]*\.(safetensors|html|json)")


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and bytes of every file in `folder`, by name."""
    return {
        file.name: {"sha256": hash_file(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }


def list_stale(report: Path, keep: Collection[str]) -> list[str]:
    """The files that `report` names as its own, but for those to keep; none where it cannot be read."""
    try:
        content = json.loads(report.read_bytes())
        named = set(content.get("files", {}))
        # Reports without a list: the weights of their methods.
        methods = content.get("methods", {}) if "files" not in content else {}
        named |= {f"{name}{kind}.safetensors" for name in methods for kind in ("", ".sparse")}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return []
    texts = {name for name in named if isinstance(name, str)}
    return sorted(name for name in texts - {report.name, *keep} if _OURS.fullmatch(name))

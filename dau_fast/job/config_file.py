"""Files of options: a report, whose run is then done again, or TOML and JSON written by hand."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dau_fast.errors import UserError, exists


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The options and the settings that the file `path` asks for.

    A report.json gives those of its run. Any other file holds options by name, words joined by an underscore
    or a hyphen, and a table "settings" with fields by method. Raises UserError for a file that is neither.
    """
    content = _parse(path)
    if "run" in content:
        return _options_of_report(content["run"], path)
    settings = content.pop("settings", {})
    if not isinstance(settings, dict) or not all(isinstance(fields, dict) for fields in settings.values()):
        raise UserError(f"'settings' in '{path}' is no table of tables: expected fields by method")
    return {name.replace("-", "_"): value for name, value in content.items()}, settings


def _parse(path: Path) -> dict[str, Any]:
    if not exists(path, "file"):
        raise UserError(f"`config={path}` is not a file: name a report.json or a .toml file")
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"`config={path}` cannot be read as TOML or JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"`config={path}` holds no options: expected names and values")
    return content


def _options_of_report(
    run: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    try:
        computed = {
            "precision": run["precision"],
            "engine": run["engine"]["asked"],
            "accumulate": run["accumulate"],
            "activation_checkpointing": run["activation_checkpointing"],
            "shard": run["sharded"],
            # Where memory was short.
            "loop_parts": {k: v for k, v in run["loop_parts"].items() if v != run["accumulate"]},
        }
        # What tuning chose is among the settings, and what "all" stood for among the methods.
        chosen: dict[str, Any] = {"tune": None}
        if "all" in run["options"]["methods"]:
            chosen["methods"] = list(run["methods"])
        return {**run["options"], **computed, **chosen}, run["settings"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the report '{path}' does not say how it came about (no {error}): give the options themselves"
        ) from error

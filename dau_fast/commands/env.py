"""`dau_fast env`: what this runs on, to be copied into a question."""

from __future__ import annotations

from importlib.util import find_spec

import click
import torch

from dau_fast.commands.help import GroupedCommand
from dau_fast.report.facts import describe_hardware, list_versions


def make_env() -> click.Command:
    """The command."""
    return GroupedCommand(
        "env",
        callback=_env,
        help="Say which versions and what hardware dau_fast finds here.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _env() -> None:
    found = {
        **list_versions(),
        "cpu": describe_hardware(torch.device("cpu")),
        "gpus": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        "cuda of PyTorch": torch.version.cuda or "none",
        "compiled extension": "there" if find_spec("dau_fast._C") else "missing: plain PyTorch runs, slower",
    }
    width = max(map(len, found))
    for name, value in found.items():
        click.echo(f"{name:{width}}  {value}")

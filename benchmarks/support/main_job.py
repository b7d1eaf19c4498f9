"""One run of the command line, for records that are made of its reports."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from support.recording import ROOT


def unlearn(report_file: Path, arguments: list[str], processes: int = 1) -> str:
    """Run the main job on the CPU, keep its report, and return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launch = launch if processes > 1 else []
        command = [sys.executable, *launch, "-m", "dau_fast.unlearn", "--device", "cpu", *arguments]
        done = subprocess.run(
            [*command, "--out", str(out)], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        shutil.copy(out / "report.json", report_file)
        return done.stdout.replace(str(out), "out")

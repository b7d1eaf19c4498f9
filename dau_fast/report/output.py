"""The output folder: everything appears in it at once, or nothing does."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from dau_fast.errors import UserError


class OutputFolder:
    """Collects files in a hidden folder inside `path` and moves them to `path` on success.

    Used as a context: `with OutputFolder(path) as staging`. After an error or an interrupt neither
    the files nor any folder made for them is left. Raises UserError where nothing can be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []

    def __enter__(self) -> Path:
        try:
            missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                self._made.append(folder)
            self._staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=self.path))
        except OSError as error:
            self._remove_folders()
            raise UserError(
                f"output folder '{self.path}' cannot be written: {error.strerror}: choose another `out`"
            ) from error
        return self._staging

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        done, moving = False, "the results"
        try:
            if kind is None:
                for file in sorted(self._staging.iterdir()):
                    moving = file.name
                    os.replace(file, self.path / file.name)
                done = True
        except OSError as problem:
            raise UserError(
                f"output folder '{self.path}' cannot take {moving}: {problem.strerror}: choose another `out`"
            ) from problem
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            if not done:
                self._remove_folders()

    def _remove_folders(self) -> None:
        for folder in reversed(self._made):
            if not any(folder.iterdir()):
                folder.rmdir()

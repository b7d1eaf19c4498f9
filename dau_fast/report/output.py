"""The output folder: everything appears in it at once, or nothing does, whenever the process ends.

While a run lasts, its files are in a hidden folder ".unfinished-*". When all are complete and on the disk,
one rename makes that ".complete-*", from which they are moved to their places, the report last. A process
that is killed before the rename leaves the earlier results; after it, no report, until the next run in the
folder moves what is left. So no report ever stands beside weights of another run.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from dau_fast.engine.starting import ENDING
from dau_fast.errors import UserError
from dau_fast.job.saving import sync_file, sync_folder, write_synced
from dau_fast.report.manifest import ENVELOPE, list_stale

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNFINISHED, _COMPLETE = ".unfinished-", ".complete-"
# What finished parts of a run are kept in, for a later one that resumes it; never moved out.
KEPT = "kept"
_AUDIT, _AUDIT_PAGE = "audit.json", "audit.html"
_REPORTS = ("report.json", _AUDIT)
# In a complete folder: the list of its results, and the report that was there before.
_NAMES, _EARLIER = ".names", ".earlier"
# Errors of a device and not of the program.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class OutputFolder:
    """Collects files in a hidden folder inside `path` and moves them to `path` on success.

    Used as a context: `with OutputFolder(path) as staging`. After an error or an interrupt neither
    the files nor any folder made for them is left. Raises UserError where nothing can be written, and where
    another process writes there; one that died does not hold the folder.

    report: the file that names the others, see `dau_fast.report.manifest`; those that only the earlier one
    names are removed with it. With new results goes an audit of the earlier ones, but not the retrained
    models that it kept. resume: take over what a killed run has left in staging / KEPT, and leave it if this
    one ends early too.
    """

    def __init__(self, path: Path, report: str = "report.json", *, resume: bool = False) -> None:
        self.path, self.report, self.resume = path, report, resume
        self._made: list[Path] = []
        self._lock: int | None = None

    def __enter__(self) -> Path:
        try:
            missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                self._made.append(folder)
            self._lock = _lock(self.path)
            self._check_free()
            self._finish_earlier()
            self._staging = self._take_over() or Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.path))
        except OSError as error:
            self._release()
            raise UserError(
                f"output folder '{self.path}' cannot be written: {error.strerror}: choose another `out`"
            ) from error
        except UserError:
            self._release()
            raise
        return self._staging

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._complete()
                self._made.clear()
            elif isinstance(error, OSError) and error.errno in _REFUSED:
                raise UserError(
                    f"output folder '{self.path}' cannot be written: {error.strerror}: choose another `out`"
                ) from error
        finally:
            kept = self.resume and (self._staging / KEPT).exists()
            if not kept:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._release()

    def _check_free(self) -> None:
        """UserError where there is evidence of an earlier run, which would then be of other files."""
        if (self.path / ENVELOPE).exists():
            raise UserError(
                f"output folder '{self.path}' holds a run that is attested ({ENVELOPE}): choose another `out`"
            )

    def _complete(self) -> None:
        """Make what is in staging the results."""
        moving = "the results"
        try:
            names = sorted(file.name for file in self._staging.iterdir() if file.name != KEPT)
            for name in names:
                moving = name
                sync_file(self._staging / name)
                if (self.path / name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            shutil.rmtree(self._staging / KEPT, ignore_errors=True)
            write_synced(self._staging / _NAMES, json.dumps(names).encode())
            complete = self.path / self._staging.name.replace(_UNFINISHED, _COMPLETE)
            with _undisturbed():
                os.replace(self._staging, complete)
                sync_folder(self.path)
                self._move_from(complete)
        except OSError as problem:
            raise UserError(
                f"output folder '{self.path}' cannot take {moving}: {problem.strerror}: choose another `out`"
            ) from problem

    def _move_from(self, complete: Path) -> None:
        """Move complete results to their places. May be called again after it was killed anywhere."""
        listed = complete / _NAMES  # gone where only removing the folder was left to do
        every = json.loads(listed.read_bytes()) if listed.exists() else []
        names = sorted(name for name in every if (complete / name).exists())
        report = next((name for name in (self.report, *_REPORTS) if name in names), None)
        earlier = complete / _EARLIER
        # Earlier report, page and audit go first. Once the new report is in its place nothing is left to do.
        if report is not None:
            if (self.path / report).exists():
                os.replace(self.path / report, earlier)
                sync_folder(self.path)
            stale = list_stale(earlier, keep=every) if earlier.exists() else []
            if report != _AUDIT and _AUDIT not in every and (self.path / _AUDIT).exists():
                stale += [_AUDIT, _AUDIT_PAGE]
                logging.getLogger("dau_fast").warning(
                    "%s of the results that were there before is removed: audit again", _AUDIT
                )
            for name in [*(name for name in names if name.endswith(".html")), *stale]:
                (self.path / name).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: (name == report, name)):
            os.replace(complete / name, self.path / name)
        sync_folder(self.path)
        shutil.rmtree(complete)

    def _finish_earlier(self) -> None:
        """Move what a run had completed that was killed while it moved it."""
        for complete in sorted(self.path.glob(f"{_COMPLETE}*")):
            self._move_from(complete)

    def _take_over(self) -> Path | None:
        """The folder of a killed run to go on in, if that is asked for; all others of them are removed."""
        # We hold the lock: whoever made them is dead.
        left = sorted(self.path.glob(f"{_UNFINISHED}*"), key=lambda folder: folder.stat().st_mtime)
        found = left.pop() if self.resume and left else None
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        for entry in found.iterdir() if found else ():
            if entry.is_dir() and entry.name != KEPT:
                shutil.rmtree(entry)
            elif entry.name != KEPT:
                entry.unlink()
        return found

    def _release(self) -> None:
        for folder in reversed(self._made):
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(path: Path) -> int | None:
    """Hold the folder `path` until the number is closed or the process dies; UserError where another does."""
    if fcntl is None:
        return None
    number = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(number)
        raise UserError(
            f"output folder '{path}' is in use by another run: wait for its end, or choose another `out`"
        ) from error
    except OSError:  # some network file systems have no locks
        os.close(number)
        return None
    return number


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that would end the process are too late inside: the run is over, but for milliseconds."""
    if threading.current_thread() is not threading.main_thread():  # signals never reach others
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

"""Files and folders that are either whole or absent, whatever interrupts their writing (a kill, a full disk)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Gives `path` to errors of the block that say what went wrong but not where, as a write to a full disk does."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_file(path: Path, content: bytes) -> None:
    """Writes `content` to a temporary neighbour, flushes it to disk and renames it onto `path`.

    Raises:
      OSError: the disk is full or the folder is not writable; `path` is as it was and nothing else is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with naming_path(path), os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files private; data files are not
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary neighbour of `folder`, renamed to `folder` when the block ends well, removed when it does not.

    Where another process made `folder` meanwhile, its copy stays and ours is removed: callers name folders by their content.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        with naming_path(folder):
            yield temporary
        os.chmod(temporary, 0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir() or not any(folder.iterdir()):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

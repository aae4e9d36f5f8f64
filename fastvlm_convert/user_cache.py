"""What this tool keeps between runs: where it lies, what it is called, and who may remove it.

A stage whose results are kept is a `Kind`. Its results lie in `FOLDER/NAME/vVERSION/KEY`: the key is a hash
of what a result depends on, the version that of the code that makes it. What another version made is
therefore never found, and its place alone tells it from what is still of use.
"""

import fcntl
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fastvlm_convert.atomic_file import whole_file

VARIABLE: Final = "FASTVLM_CONVERT_CACHE"
_ABOUT: Final = "about.json"

_temporary: ContextVar[Path | None] = ContextVar("temporary", default=None)
_tally: ContextVar["Tally | None"] = ContextVar("tally", default=None)
_held: dict[Path, int] = {}  # folders in use by this process, until it ends


@dataclass(frozen=True)
class Kind:
    """A stage whose results are kept.

    Attributes:
        name: Of its folder.
        what: What it is, for people.
        version: Of the code that makes the results, and of the stages that they depend on. The first number
            counts up when the same inputs give other results, or the same results another file.
        suffix: Of a result's file; empty where a result is a folder of files.
        digits: Length of a key, which is hexadecimal.
        is_of_checkpoint: Whether the key is a checkpoint's hash itself.
    """

    name: str
    what: str
    version: tuple[int, ...]
    suffix: str
    digits: int = 64
    is_of_checkpoint: bool = False

    @property
    def folder(self) -> Path:
        """Where results of this version are."""
        return cache_folder() / self.name / f"v{'.'.join(map(str, self.version))}"

    def path(self, key: str) -> Path:
        """Where a result is, or would be."""
        return self.folder / f"{key}{self.suffix}"


@dataclass(frozen=True)
class About:
    """What a result is of.

    Attributes:
        checkpoint: Name of the checkpoint's folder.
        checkpoint_sha256: Its hash.
        recipe: Name of the recipe, where the result depends on one.
    """

    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    recipe: str | None = None


class Tally:
    """Which results a run found in the cache, and which it made and put there.

    A result that is asked for again, by a second target for example, counts once, as what it was at first.
    """

    def __init__(self) -> None:
        self._is_found: dict[tuple[str, str], bool] = {}

    def note(self, kind: Kind, key: str, is_found: bool) -> None:
        """Note a result.

        Args:
            kind: Of which stage.
            key: What tells it from the others of this run.
            is_found: Whether it was in the cache.
        """
        self._is_found.setdefault((kind.name, key), is_found)

    def counts(self) -> dict[str, "CacheUse"]:
        """By the kind's name, of kinds that were asked for anything."""
        found = {name: [f for (n, _), f in self._is_found.items() if n == name] for name, _ in self._is_found}
        return {name: CacheUse(sum(each), len(each) - sum(each)) for name, each in sorted(found.items())}


@dataclass(frozen=True)
class CacheUse:
    """What a run found in the cache, and what not.

    Attributes:
        found: Results that an earlier run had made.
        made: Results that this run made.
    """

    found: int
    made: int


@contextmanager
def tallied() -> Iterator[Tally]:
    """Within it, what is found in the cache and what is put there is noted."""
    tally = Tally()
    before = _tally.set(tally)
    try:
        yield tally
    finally:
        _tally.reset(before)


def current_tally() -> Tally:
    """Where results are to be noted; nobody reads it where nobody asked for it."""
    return _tally.get() or Tally()


def cache_folder() -> Path:
    """Where this tool keeps what it measured: the user's cache, or `FASTVLM_CONVERT_CACHE`."""
    if temporary := _temporary.get():
        return temporary
    if own := os.environ.get(VARIABLE):
        return Path(own)
    try:
        home = Path.home()
    except RuntimeError:  # a container's user may have none
        home = Path(tempfile.gettempdir()) / f"fastvlm-convert-{os.getuid()}"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "fastvlm-convert"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "fastvlm-convert"


@contextmanager
def without_cache() -> Iterator[None]:
    """Neither read nor write the user's cache: what stages must put down goes to a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="fastvlm-convert-") as folder:
        before = _temporary.set(Path(folder))
        try:
            yield
        finally:
            _temporary.reset(before)


def is_cache_used() -> bool:
    """Whether a later run will find what is put into the cache now."""
    return _temporary.get() is None


def hold(folder: Path) -> bool:
    """Use a result that is a folder; until this process ends, nobody else removes it.

    Returns:
        False where there is no such folder.
    """
    while True:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_still(folder, descriptor):
            break
        os.close(descriptor)  # removed while we waited
    if folder in _held:
        os.close(_held.pop(folder))
    if is_cache_used():
        _held[folder] = descriptor
    else:
        os.close(descriptor)
    return True


def touch(path: Path) -> None:
    """Note that a result was of use: its time is when it was used last."""
    try:
        os.utime(path)
    except OSError:
        return  # a cache that may only be read serves as well; its times are then those of writing


def about_path(path: Path, kind: Kind) -> Path:
    """Where it is said what a result is of."""
    return path.with_name(f"{path.name.removesuffix(kind.suffix)}.{_ABOUT}") if kind.suffix else path / _ABOUT


def save_about(path: Path, kind: Kind, about: About) -> None:
    """Say what a result is of, beside it."""
    with whole_file(about_path(path, kind)) as partial:
        partial.write_text(json.dumps(asdict(about)), encoding="utf-8")


def _is_still(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False

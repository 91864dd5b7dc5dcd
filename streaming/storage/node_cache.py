"""What copies lie in a node's cache, in a small database (SQLite) that all processes of the node share.

An entry is a folder of the cache, called by its key. Its row tells its bytes, when it was last used, and whether it is
coming (somebody fills it), ready, or going (somebody removes it). Bytes are counted from the moment they are reserved
to the moment they are removed, so their sum never passes the bound. Who fills, removes or holds an entry is told by the
number of a process, which keeps that byte of the file `alive` locked as long as it lives: what a killed one left is
found, and let go of, by the next one that needs room.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from streaming.errors import NodeError, StorageError
from streaming.storage.private_folder import make_private

_DATABASE, _ALIVE = "index.db", "alive"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS holders (id INTEGER PRIMARY KEY AUTOINCREMENT);
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, used_at REAL NOT NULL, state TEXT NOT NULL, holder INTEGER
);
CREATE INDEX IF NOT EXISTS by_use ON entries (state, used_at);
CREATE TABLE IF NOT EXISTS held (key TEXT NOT NULL, holder INTEGER NOT NULL, kept INTEGER NOT NULL);
"""
# Of an entry, of one that is removed, and of what versions before this one left.
_OURS = re.compile(r"[0-9a-f]{32}(\..*)?")
_GONE = ".gone"
# So long another process may have the database to itself.
_BUSY_S = 60
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5
# File systems that other machines see, too.
_SHARED = re.compile(
    r"nfs4?|cifs|smb3|smbfs|9p|afs|beegfs|ceph|glusterfs|gpfs|lustre|ocfs2|pvfs2|fuse\.(?!fuse-overlayfs).*"
)
REMEDY = "set data.staging or TILESTREAM_STAGING to a folder of your own on a local disk"


class NodeCache:
    """The entries of a folder, for this process. Safe to use from several threads.

    Where other machines see the folder, too, this one has a folder of its name in it.

    Raises:
        NodeError: others may write into the folder.
    """

    def __init__(self, folder: str) -> None:
        self._given = Path(folder)
        self._is_shared = is_shared_disk(folder)
        self.folder = self._given / platform.node() if self._is_shared else self._given
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._inode = self._alive = self._holder = 0

    def take(self, key: str, name: str, nbytes: int, max_bytes: int, what: str) -> bool:
        """Waits until an entry that holds a file of that name is ready, and holds it (true); or has it filled.

        In that case (false) its bytes are reserved, and the caller fills the folder, then calls `filled` or `dropped`.
        `what` is what messages call it.

        Raises:
            StorageError: there is no room for it.
            NodeError: the cache can't be used.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            with self._changing() as db:
                state = self._state(db, key)
                if state == "ready":
                    if (self.folder / key / name).exists():
                        db.execute("UPDATE entries SET used_at = ? WHERE key = ?", (time.time(), key))
                        self._hold(db, key, kept=False)
                        return True
                    db.execute("DELETE FROM entries WHERE key = ?", (key,))  # somebody cleaned the folder
                gone = self._of_the_dead(db)
                if not gone and state != "coming" and state != "going":
                    room = self._room(db, nbytes, max_bytes, what)
                    if room is None:
                        self._insert(db, key, nbytes, "coming")
                        return False
                    gone = room
            if gone:
                self._remove(gone)
                continue
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def filled(self, key: str) -> None:
        """Tells that an entry is whole; the caller holds it."""
        with self._changing() as db:
            db.execute("UPDATE entries SET state = 'ready', used_at = ? WHERE key = ?", (time.time(), key))
            self._hold(db, key, kept=False)

    def dropped(self, key: str) -> None:
        """Removes what the caller was to fill."""
        self._remove([key])

    def let_go(self, key: str) -> None:
        """Ends what `take` or `filled` began: the entry may make room for others."""
        with self._changing() as db:
            db.execute(
                "DELETE FROM held WHERE rowid = (SELECT rowid FROM held WHERE key = ? AND holder = ? AND NOT kept)",
                (key, self._holder),
            )

    def keep(self, key: str, make: Callable[[Path], int]) -> None:
        """Keeps an entry that is filled bit by bit (`grow`) until this process ends.

        `make` is called with its folder, which need not be there, while nobody else changes anything; it tells how many
        bytes are in it.

        Raises:
            NodeError: the cache can't be used.
        """
        while True:
            with self._changing() as db:
                gone = self._of_the_dead(db)
                state = self._state(db, key)
                if not gone and state != "going":
                    nbytes = make(self.folder / key)
                    if state is None or not self._keepers(db, key):
                        self._insert(db, key, nbytes, "ready")
                    self._hold(db, key, kept=True)
                    return
            self._remove(gone)
            time.sleep(_FIRST_PAUSE_S)

    def grow(self, key: str, nbytes: int, max_bytes: int, what: str) -> None:
        """Reserves so many bytes more for an entry that is kept.

        Raises:
            StorageError: there is no room for them.
        """
        while True:
            with self._changing() as db:
                gone = self._of_the_dead(db) or self._room(db, nbytes, max_bytes, what)
                if gone is None:
                    values = nbytes, time.time(), key
                    db.execute("UPDATE entries SET nbytes = nbytes + ?, used_at = ? WHERE key = ?", values)
                    return
            self._remove(gone)
            if not gone:
                time.sleep(_FIRST_PAUSE_S)

    def shrink(self, key: str, nbytes: int) -> None:
        """Gives back bytes that `grow` reserved."""
        with self._changing() as db:
            db.execute("UPDATE entries SET nbytes = nbytes - ? WHERE key = ?", (nbytes, key))

    def num_bytes(self) -> int:
        """The bytes that are reserved or taken."""
        with self._changing() as db:
            return _sum(db, "1")

    def _room(self, db: sqlite3.Connection, nbytes: int, max_bytes: int, what: str) -> list[str] | None:
        """What must go before there is room: nothing of it (None), entries, or (an empty list) what others do now."""
        free = shutil.disk_usage(self.folder).free
        coming = [(key, size) for key, size in db.execute("SELECT key, nbytes FROM entries WHERE state = 'coming'")]
        promised = sum(max(0, size - disk_usage(self.folder / key)) for key, size in coming)
        over_bound, over_disk = _sum(db, "1") + nbytes - max_bytes, nbytes + promised - free
        over = max(over_bound, over_disk) - _sum(db, "state = 'going'")
        if max(over_bound, over_disk) <= 0:
            return None
        self._let_go_of_the_dead(db)
        chosen = list[str]()
        for key, size in db.execute(
            "SELECT key, nbytes FROM entries WHERE state = 'ready' AND key NOT IN (SELECT key FROM held) "
            "ORDER BY used_at"
        ).fetchall():
            if over <= 0:
                break
            chosen.append(key)
            over -= size
        if over > 0:
            soon = _sum(db, "state = 'coming' OR key IN (SELECT key FROM held WHERE NOT kept)")
            if soon < over:
                full = _too_small(what, nbytes, max_bytes) if over_bound >= over_disk else self.disk_full(what, nbytes)
                raise StorageError(full)
        for key in chosen:
            db.execute("UPDATE entries SET state = 'going', holder = ? WHERE key = ?", (self._holder, key))
        return chosen

    def disk_full(self, what: str, nbytes: int) -> str:
        """What is said where the disk has no room."""
        free = shutil.disk_usage(self.folder).free
        disk = os.statvfs(self.folder)
        left = "no inodes free" if disk.f_files and not disk.f_favail else f"{free:,} bytes free"
        return (
            f"{what}: its copy of {nbytes:,} bytes does not fit the disk of {self.folder} on {platform.node()}, "
            f"{left}; free some, or set data.staging or TILESTREAM_STAGING to another"
        )

    def _let_go_of_the_dead(self, db: sqlite3.Connection) -> None:
        for (holder,) in db.execute("SELECT DISTINCT holder FROM held").fetchall():
            if not self._lives(holder):
                db.execute("DELETE FROM held WHERE holder = ?", (holder,))

    def _keepers(self, db: sqlite3.Connection, key: str) -> int:
        self._let_go_of_the_dead(db)
        return db.execute("SELECT count(*) FROM held WHERE key = ? AND kept", (key,)).fetchone()[0]

    def _state(self, db: sqlite3.Connection, key: str) -> str | None:
        row = db.execute("SELECT state FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def _insert(self, db: sqlite3.Connection, key: str, nbytes: int, state: str) -> None:
        values = key, nbytes, time.time(), state, self._holder
        db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)", values)

    def _hold(self, db: sqlite3.Connection, key: str, *, kept: bool) -> None:
        db.execute("INSERT INTO held VALUES (?, ?, ?)", (key, self._holder, kept))

    def _of_the_dead(self, db: sqlite3.Connection) -> list[str]:
        """Entries that a process was filling or removing when it died; they are the caller's to remove."""
        found = db.execute("SELECT DISTINCT holder FROM entries WHERE state != 'ready'").fetchall()
        gone = list[str]()
        for (holder,) in found:
            if not self._lives(holder):
                rows = db.execute("SELECT key FROM entries WHERE state != 'ready' AND holder = ?", (holder,))
                gone += [key for (key,) in rows.fetchall()]
        for key in gone:
            db.execute("UPDATE entries SET state = 'going', holder = ? WHERE key = ?", (self._holder, key))
        return gone

    def _remove(self, keys: Sequence[str]) -> None:
        """Removes entries that are this process's to remove. Whoever has a file of them open keeps reading that."""
        if not keys:
            return
        for key in keys:
            # Renamed first, so that nobody finds a part of it.
            shutil.rmtree(self.folder / (key + _GONE), ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.folder / key, self.folder / (key + _GONE))
            shutil.rmtree(self.folder / (key + _GONE), ignore_errors=True)
        with self._changing() as db:
            for key in keys:
                db.execute("DELETE FROM entries WHERE key = ?", (key,))

    def _lives(self, holder: int) -> bool:
        """Whether a process still is, by the lock that it has as long as it lives."""
        if holder == self._holder or not self._try_lock(holder):
            return True
        fcntl.lockf(self._alive, fcntl.LOCK_UN, 1, holder)
        return False

    def _try_lock(self, number: int) -> bool:
        """Locks a process's byte, and says whether nobody else has."""
        try:
            fcntl.lockf(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise NodeError(f"{self.folder}: files can't be locked there ({error.strerror}); {REMEDY}") from error
        return True

    @contextlib.contextmanager
    def _changing(self) -> Generator[sqlite3.Connection]:
        """What is seen and done meanwhile is one: no other process changes anything."""
        with self._lock:
            try:
                db = self._connected()
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if "full" in str(error):
                    raise StorageError(self.disk_full(f"{self.folder}/{_DATABASE}", 2**16)) from error
                raise NodeError(
                    f"{self.folder}: the database of this cache can't be used ({error}); files must be lockable there: "
                    f"{REMEDY}"
                ) from error
            except sqlite3.DatabaseError as error:
                raise NodeError(f"{self.folder}: the database of this cache is damaged ({error}); remove it") from error

    def _connected(self) -> sqlite3.Connection:
        path = self.folder / _DATABASE
        if self._db is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == self._inode:
                    return self._db
            # Somebody removed the cache.
            self._db.close()
            os.close(self._alive)
            self._db = None
        for folder in (self._given, self.folder):
            make_private(folder, REMEDY)
        self._alive = self._opened(_ALIVE)
        try:
            self._try_lock(0)  # SQLite would wait a minute, and then call the database busy
        except NodeError:
            os.close(self._alive)
            raise
        is_new = not path.exists()
        if is_new:
            os.close(self._opened(_DATABASE))
        db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        # The faster journal needs memory that processes share, which those of several machines do not have.
        db.execute(f"PRAGMA journal_mode = {'DELETE' if self._is_shared else 'WAL'}")
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        self._db, self._inode = db, os.stat(path).st_ino
        self._holder = self._number()
        if is_new:
            db.execute("BEGIN IMMEDIATE")  # another process that is new, too, may be making an entry
            self._remove_unknown(db)
            db.execute("COMMIT")
        return db

    def _opened(self, name: str) -> int:
        try:
            return os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise StorageError(self.disk_full(f"{self.folder}/{name}", 0)) from error
            raise NodeError(f"{self.folder}/{name}: can't be written ({error.strerror}); {REMEDY}") from error

    def _number(self) -> int:
        """A number for this process, that no other has or had."""
        assert self._db is not None
        while True:
            number = self._db.execute("INSERT INTO holders DEFAULT VALUES").lastrowid
            assert number is not None
            self._db.execute("DELETE FROM holders WHERE id < ?", (number,))
            # Else it is of a process that has yet to notice that the database is another one.
            if self._try_lock(number):
                return number

    def _remove_unknown(self, db: sqlite3.Connection) -> None:
        """Removes what a cache left whose database is gone."""
        known = {key for (key,) in db.execute("SELECT key FROM entries")}
        for entry in list(os.scandir(self.folder)):
            if _OURS.fullmatch(entry.name) and entry.name not in known:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.remove(entry.path)


_CACHES: dict[tuple[str, int], NodeCache] = {}
_LOCK = threading.Lock()


def cache_at(folder: str) -> NodeCache:
    """The cache in a folder, one a process: two would take each other's locks for their own, and a fork has none."""
    with _LOCK:
        known = os.path.realpath(folder), os.getpid()
        if known not in _CACHES:
            _CACHES[known] = NodeCache(known[0])
        return _CACHES[known]


def is_shared_disk(folder: str) -> bool:
    """Whether a folder, which need not be there yet, lies on a disk that other machines may see, too."""
    path, kinds = os.path.realpath(folder), dict[str, str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, what = line.partition(" - ")
            kinds[re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount.split()[4])] = what.split()[0]
    above = [mount for mount in kinds if f"{path}/".startswith(mount.rstrip("/") + "/")]
    return bool(above) and bool(_SHARED.fullmatch(kinds[max(above, key=len)]))


def disk_usage(folder: Path) -> int:
    """Bytes of disk that the files below a folder take."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(at, name)).st_blocks * 512
    return total


def _sum(db: sqlite3.Connection, condition: str) -> int:
    return db.execute(f"SELECT coalesce(sum(nbytes), 0) FROM entries WHERE {condition}").fetchone()[0]


def _too_small(what: str, nbytes: int, max_bytes: int) -> str:
    return f"{what}: {nbytes:,} bytes don't fit the staging cache of {max_bytes:,}; raise staging_gb"

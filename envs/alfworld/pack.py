"""All games of a download in one file, for a fast start on many hosts: 1 GB of files becomes about
13 MB, and any game is read alone.

The file is an SQLite database that is only ever read after it was written. What games share (rules,
text grammar, and a sample of a problem, as the dictionary of the compressor) is stored once; of
each game there is what is its own, and the sha256 of its key and whole content, checked on every
read; the index and the shared texts have a sha256 of their own.

A pack may come from anywhere, so nothing in it decides how much memory reading takes: its tables
have to be the ones written here, and sizes are looked at before anything is read or unpacked.
"""

import functools
import hashlib
import json
import os
import pathlib
import sqlite3
import zlib
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from envs.alfworld.index import MAX_GAME_BYTES, Index, Source, check_game, check_key
from envs.files import replacing

_FORMAT = "ictjax alfworld pack 2"
_MAX_SHARED_BYTES = 64 << 20  # of all shared texts, and of the index; a whole download has 1 MB
_TASK = "Your task is to: "
_DICTIONARY_BYTES = 32 * 1024  # what zlib can look back
# what data can raise that is not as it was written
_DAMAGES = (zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_SCHEMA = """
    CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE shared (id INTEGER PRIMARY KEY, body BLOB NOT NULL UNIQUE);
    CREATE TABLE games (
        key TEXT PRIMARY KEY, domain INTEGER NOT NULL, grammar INTEGER NOT NULL, body BLOB NOT NULL,
        sha256 TEXT NOT NULL
    );
"""


class Pack:
    """A packed file, opened for every read (so any thread and process may); implements
    `envs.alfworld.index.Source`.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path

    @property
    def path(self) -> pathlib.Path:
        """The file."""
        return self._path

    def index(self) -> Index:
        """The index of the tree that was packed."""
        return _about(str(self._path.absolute()))[0]

    def load(self, key: str) -> dict[str, Any]:
        """The content of one game. Raises ValueError, naming it, when it is missing or its hash
        does not match.
        """
        check_key(key)
        shared = _about(str(self._path.absolute()))[1]
        rows = _query(
            self._path,
            "SELECT domain, grammar, body, sha256 FROM games WHERE key = ? LIMIT 1",
            (key,),
        )
        if not rows:
            raise ValueError(
                f"There is no game {key} in {self._path}: pack a complete download again with"
                " `ictjax games pack`."
            )
        domain, grammar, body, digest = rows[0]
        try:
            own = json.loads(_unpacked(body, shared[0]))
            before, mark, after = shared[grammar].decode().partition(_mark())
            if not mark or _mark() in after:
                raise ValueError("its grammar has not one task")
            content = {
                "pddl_domain": shared[domain].decode(),
                "grammar": f"{before}{own.pop('task')}{after}",
                **own,
            }
            check_game(content)
        except _DAMAGES as error:
            raise ValueError(
                f"The game {key} in {self._path} is damaged ({_cause(error)}): copy the file again."
            ) from error
        if _digest(key, content) != digest:
            raise ValueError(
                f"The game {key} in {self._path} is damaged (its sha256 does not match): copy the"
                " file again."
            )
        return content


def write_pack(
    source: Source,
    path: pathlib.Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Packs all playable games of a source into one file, whole or not at all; returns their
    number.

    `progress` is called with (done, total). Raises ValueError when the source has no games, a game
    is damaged, or the file cannot be written.
    """
    index = source.index()
    keys = sorted(key for of in index.games.values() for family in of.values() for key in family)
    if not keys:
        raise ValueError(f"There are no playable games in {source.path}: nothing to pack.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            _write(source, index, keys, temporary, progress)
    except (OSError, sqlite3.Error) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"Cannot write {path} ({cause}): free some space or choose another place."
        ) from error
    _about.cache_clear()
    return len(keys)


def _write(
    source: Source,
    index: Index,
    keys: list[str],
    path: pathlib.Path,
    progress: Callable[[int, int], None],
):
    dictionary = source.load(keys[len(keys) // 2])["pddl_problem"].encode()[:_DICTIONARY_BYTES]
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.executescript(
            "PRAGMA page_size = 1024; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            f" {_SCHEMA} BEGIN;"
        )
        shared = {dictionary: 0}

        def number(text: str) -> int:
            return shared.setdefault(text.encode(), len(shared))

        for done, key in enumerate(keys, 1):
            content = source.load(key)
            own = {
                name: value
                for name, value in content.items()
                if name not in ("pddl_domain", "grammar")
            }
            grammar, own["task"] = _split_task(content["grammar"])
            packer = zlib.compressobj(9, zdict=dictionary)
            text = json.dumps(own).encode()
            if len(text) > MAX_GAME_BYTES:
                raise ValueError(
                    f"The game {key} in {source.path} has {len(text):,} bytes, more than the"
                    f" {MAX_GAME_BYTES:,} that are played: remove its folder."
                )
            body = packer.compress(text) + packer.flush()
            row = (
                key,
                number(content["pddl_domain"]),
                number(grammar),
                body,
                _digest(key, content),
            )
            database.execute("INSERT INTO games VALUES (?, ?, ?, ?, ?)", row)
            progress(done, len(keys))
        database.executemany(
            "INSERT INTO shared VALUES (?, ?)",
            ((position, body) for body, position in shared.items()),
        )
        about = {"format": _FORMAT, "index": json.dumps(index.to_json())}
        about["sha256"] = _digest_all(about["index"].encode(), *shared)
        database.executemany("INSERT INTO about VALUES (?, ?)", about.items())
        database.execute("COMMIT")
    finally:
        database.close()


@functools.cache
def _about(path: str) -> tuple[Index, Mapping[int, bytes]]:
    """The index and the shared texts of a file, read once. Raises ValueError when it is no pack, of
    another format, cut short, damaged or too large.
    """
    file = pathlib.Path(path)
    damaged = f"{path} is no packed file of ALFWorld games, or is damaged"
    try:
        tables = _query(file, "SELECT type, name, tbl_name, sql FROM sqlite_schema")
        texts = _query(file, "SELECT sum(length(CAST(value AS BLOB))) FROM about")
        blobs = _query(file, "SELECT sum(length(CAST(body AS BLOB))) FROM shared")
    except ValueError as error:
        raise ValueError(f"{damaged}: write it with `ictjax games pack`.") from error
    if sorted(map(str, tables)) != _tables():
        raise ValueError(f"{damaged} (it has other tables): write it with `ictjax games pack`.")
    for ((size,),) in (texts, blobs):
        if size is not None and size > _MAX_SHARED_BYTES:
            raise ValueError(
                f"{path} claims {size:,} bytes that its games share, more than the"
                f" {_MAX_SHARED_BYTES:,} that are read: write it with `ictjax games pack`."
            )
    about = dict(_query(file, "SELECT name, value FROM about"))
    if about.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is of another format ({about.get('format')!r}, wanted {_FORMAT!r}): pack the"
            " download again with `ictjax games pack`."
        )
    shared = dict(_query(file, "SELECT id, body FROM shared ORDER BY id"))
    try:
        if _digest_all(about["index"].encode(), *shared.values()) != about["sha256"]:
            raise ValueError("its sha256 does not match")
        index = Index.from_json(json.loads(about["index"]))
    except _DAMAGES as error:
        raise ValueError(
            f"The index of {path} is damaged ({_cause(error)}): copy the file again."
        ) from error
    return index, shared


@functools.cache
def _tables() -> list[str]:
    """What a pack's own description of its tables is, sorted."""
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(_SCHEMA)
        rows = database.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()
    finally:
        database.close()
    return sorted(map(str, rows))


def _query(path: pathlib.Path, statement: str, values: tuple[str, ...] = ()) -> list[Any]:
    try:
        # Immutable: nothing is locked, so a read-only or a network file system will do.
        place = quote(os.fsencode(path.absolute()))
        database = sqlite3.connect(f"file:{place}?mode=ro&immutable=1", uri=True)
        try:
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_SHARED_BYTES)
            return database.execute(statement, values).fetchall()
        finally:
            database.close()
    except (sqlite3.Error, OverflowError) as error:
        raise ValueError(
            f"The packed file {path} cannot be read ({error}): copy it again."
        ) from error


def _unpacked(body: bytes, dictionary: bytes) -> bytes:
    """Raises ValueError before more than MAX_GAME_BYTES are unpacked, zlib.error for a damaged
    body.
    """
    unpacker = zlib.decompressobj(zdict=dictionary)
    text = unpacker.decompress(body, MAX_GAME_BYTES)
    if not unpacker.eof:
        raise ValueError(f"it is cut short, or unpacks to more than {MAX_GAME_BYTES:,} bytes")
    return text


def _cause(error: BaseException) -> str:
    """What an exception says, for a sentence about a file."""
    return "its parts do not fit" if isinstance(error, LookupError) else str(error)


def _mark() -> str:
    return f"{_TASK}\0"


def _split_task(grammar: str) -> tuple[str, str]:
    """The grammar with a mark for its task sentence, and that sentence with what announces it."""
    start = grammar.find(_TASK)
    end = grammar.find('"', start)
    if start < 0 or end < 0 or _mark() in grammar:
        return grammar + _mark(), ""
    return grammar[:start] + _mark() + grammar[end:], grammar[start:end]


def _digest(key: str, content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([key, content], sort_keys=True).encode()).hexdigest()


def _digest_all(*texts: bytes) -> str:
    whole = hashlib.sha256()
    for text in texts:
        whole.update(hashlib.sha256(text).digest())
    return whole.hexdigest()

"""Keeps the accounts of the dashboard, and slows down those who guess passwords."""

import hashlib
import json
import math
import os
import secrets
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import Argon2Error, InvalidHashError

from storage.ownership import as_owner
from storage.paths import home

ROLES = ("viewer", "editor")
MINIMUM_PASSWORD, LONGEST_PASSWORD = 10, 1000  # characters
_HASHER = PasswordHasher()  # argon2id, with the parameters that RFC 9106 recommends for little memory


class AccountError(ValueError):
    """An account cannot be made, changed or read. The message is one line and says what to do next."""


@dataclass(frozen=True)
class Account:
    """Somebody who can log in."""

    name: str
    role: str  # viewer or editor
    hash: str

    @property
    def stamp(self) -> str:
        """Changes with the password and the role, which ends the sessions that have the old stamp."""
        return hashlib.sha256(f"{self.role}:{self.hash}".encode()).hexdigest()[:16]


class Accounts:
    """The accounts of a home, in `dashboard.json` (mode 600)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or home()) / "dashboard.json"

    def all(self) -> dict[str, Account]:
        """The accounts by name. Raises AccountError."""
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))
            accounts = {name: Account(name, row["role"], row["hash"]) for name, row in rows.items()}
            for account in accounts.values():
                _check_name(account.name)
                _check_role(account.role)
                extract_parameters(account.hash)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise AccountError(
                f"{self.path} cannot be read ({error!r}); mend it, or delete it and add the users again"
            ) from None
        return accounts

    def put(self, name: str, role: str, password: str) -> None:
        """Add an account, or change its role and password. Raises AccountError."""
        _check_name(name)
        _check_role(role)
        if len(password) < MINIMUM_PASSWORD:
            raise AccountError(f"the password is too short; take at least {MINIMUM_PASSWORD} characters")
        if len(password) > LONGEST_PASSWORD:
            raise AccountError(f"the password is too long; take at most {LONGEST_PASSWORD} characters")
        self._write({**self.all(), name: Account(name, role, _HASHER.hash(_composed(password)))})

    def remove(self, name: str) -> None:
        """Remove an account. Raises AccountError if there is none of this name."""
        accounts = self.all()
        if name not in accounts:
            raise AccountError(f"no user {name!r}; there are: {', '.join(accounts) or 'none'}")
        self._write({key: account for key, account in accounts.items() if key != name})

    def check(self, name: str, password: str) -> Account | None:
        """The account, if the password is right. An unknown name takes as long as a wrong password."""
        account = self.all().get(name)
        try:
            _HASHER.verify(account.hash if account else _NOBODY, _composed(password))
        except (Argon2Error, InvalidHashError):
            return None
        return account

    def _write(self, accounts: dict[str, Account]) -> None:
        rows = {name: {"role": a.role, "hash": a.hash} for name, a in sorted(accounts.items())}
        with _private_file(self.path.parent, json.dumps(rows, indent=2).encode()) as new:
            os.replace(new, self.path)


def _composed(password: str) -> str:
    """The password in NFC (RFC 8265), because a Mac may send letters and accents separately."""
    return unicodedata.normalize("NFC", password)


def _check_name(name: str) -> None:
    if not name or not name.isprintable() or name != name.strip():
        raise AccountError(f"name {name!r} is empty or has unprintable characters; choose another")


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise AccountError(f"role {role!r}; allowed are {' and '.join(ROLES)}")


@contextmanager
def _private_file(folder: Path, data: bytes) -> Iterator[str]:
    """Write a temporary file of mode 600. It is removed afterwards, unless the caller has moved it."""
    with as_owner(folder):
        folder.mkdir(parents=True, exist_ok=True)
        number, path = tempfile.mkstemp(dir=folder, prefix="dashboard.")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
            yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


_NOBODY = _HASHER.hash(secrets.token_urlsafe())


def session_key(folder: Path | None = None) -> bytes:
    """The key that signs sessions. It is made once per home, and only the home's owner can read it."""
    path = (folder or home()) / "dashboard.key"
    with suppress(FileNotFoundError):
        return path.read_bytes()
    with _private_file(path.parent, secrets.token_bytes(32)) as new, suppress(FileExistsError):
        os.link(new, path)  # unlike a rename, a link fails if another process was first
    return path.read_bytes()


class Throttle:
    """Slows down guessing: after some failures a name or an address has to wait, longer each time.

    Failures are forgotten after the longest wait, and when the server ends. Flask-Limiter would not do:
    its waits do not grow with each failure, and a right password does not end them.
    """

    FREE, LONGEST, KEYS = 5, 900.0, 10_000  # failures without a wait; seconds; keys that are remembered

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: dict[str, tuple[int, float]] = {}  # by key: how many, and when the last was

    def wait(self, *keys: str) -> int:
        """Seconds until the next attempt is allowed, 0 for now. The longest wait of the keys counts."""
        with self._lock:
            return max(math.ceil(self._left(key)) for key in keys)

    def _count(self, key: str) -> tuple[int, float]:
        count, last = self._failures.get(key, (0, -math.inf))
        return (count, last) if self._clock() - last < self.LONGEST else (0, last)

    def _left(self, key: str) -> float:
        count, last = self._count(key)
        if count < self.FREE:
            return 0.0
        return max(last + min(2.0 ** (count - self.FREE + 1), self.LONGEST) - self._clock(), 0.0)

    def failed(self, *keys: str) -> None:
        """Count a failure."""
        with self._lock:
            for key in keys:
                count, _ = self._count(key)
                self._failures.pop(key, None)  # so that it goes to the end, as the newest
                self._failures[key] = (count + 1, self._clock())
            while len(self._failures) > self.KEYS:  # the oldest go
                self._failures.pop(next(iter(self._failures)))

    def succeeded(self, *keys: str) -> None:
        """Forget the failures."""
        with self._lock:
            for key in keys:
                self._failures.pop(key, None)


class OneTimeLink:
    """A link that logs in whoever can read the terminal, as long as there are no accounts."""

    def __init__(self, show: Callable[[str], Any]) -> None:
        self._show = show  # is called with each new token
        self.stamp = f"link {secrets.token_urlsafe(8)}"  # of the sessions that it opens
        self._lock = threading.Lock()
        self._renew()

    def _renew(self) -> None:
        self._token = secrets.token_urlsafe(24)
        self._show(self._token)

    def use(self, token: str) -> bool:
        """Whether this is the current token. If so, a new token replaces it."""
        with self._lock:
            if not secrets.compare_digest(token.encode(), self._token.encode()):
                return False
            self._renew()
            return True

"""Serve the embedded server to other machines: its address, password, certificate and access rules.

The files lie in the home folder. Every machine that shares the folder connects to the URL in
`database.url`. That file holds no secret: it names `database.pass` (mode 600), which libpq reads.
"""

import os
import re
import secrets
import shutil
import subprocess
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

ROLE = "atelier"
VIEWER, WORKER = "atelier_viewer", "atelier_worker"  # roles without a login: see storage.roles
DATABASE = "atelier"
# The socket needs no password: its folder has mode 0700. From the network only one role may log in.
ACCESS = """\
local all all trust
{kind} {database} {role} all scram-sha-256
"""


class NetworkError(ValueError):
    """The server cannot be set up for the network; the message is one line."""


class Network:
    """The network settings of one home's server."""

    def __init__(self, home: Path) -> None:
        self._url, self._passfile = home / "database.url", home / "database.pass"
        self._certificate, self._key = home / "database.crt", home / "postgres.key"
        self._files = {"passfile": self._passfile, "sslrootcert": self._certificate}  # of the URL

    @property
    def url(self) -> URL | None:
        """The URL for other machines; None if the server serves this machine only.

        Raises NetworkError.
        """
        try:
            url = make_url(self._url.read_text(encoding="utf-8").strip())
        except FileNotFoundError:
            return None
        except (ArgumentError, ValueError):
            raise NetworkError(
                f"{self._url}: holds no URL; delete it, then: atelier db start --listen ADDRESS"
            ) from None
        # The home may have moved: use the present paths. Earlier versions wrote no sslmode for --no-tls.
        files = {key: str(self._files[key]) for key in self._files.keys() & url.query}
        return url.update_query_dict({"sslmode": "disable", **url.query, **files})

    @staticmethod
    def check(address: str, tls: bool) -> None:
        """Raises NetworkError if `set_up` could not use this address, or make a certificate."""
        if not re.fullmatch(r"[A-Za-z0-9.:_-]+", address) or address in ("0.0.0.0", "::"):
            raise NetworkError(
                f"--listen {address!r}: allowed is one address or host name that other machines reach"
            )
        if tls and shutil.which("openssl") is None:
            raise NetworkError(
                "no openssl on this machine to make a certificate; install it, or say --no-tls"
            )

    def set_up(self, address: str, port: int, tls: bool) -> str:
        """Write the files. Returns the password: the earlier one, if there was one.

        Raises NetworkError.
        """
        self.check(address, tls)
        if tls:
            self._make_certificate(address)
        if self._passfile.exists():
            password = self._passfile.read_text("utf-8").strip().rpartition(":")[2]
        else:
            password = secrets.token_urlsafe(32)
            _write_private(self._passfile, f"*:*:{DATABASE}:{ROLE}:{password}\n")
        query = {"passfile": str(self._passfile), "sslmode": "verify-full" if tls else "disable"}
        if tls:
            query["sslrootcert"] = str(self._certificate)
        self.set_url(URL.create("postgresql", ROLE, None, address, port, DATABASE, query))
        return password

    def set_url(self, url: URL | None) -> None:
        """Write the URL for other machines; None makes the server serve this machine only."""
        if url is None:
            self._url.unlink(missing_ok=True)
        else:
            names = {key: Path(str(url.query[key])).name for key in self._files.keys() & url.query}
            # Other machines may read the file at any moment.
            new = self._url.with_name(f".{self._url.name}")
            new.write_text(url.update_query_dict(names).render_as_string() + "\n", "utf-8")
            new.replace(self._url)

    def server_settings(self) -> dict[str, str]:
        """The settings that PostgreSQL is started with for the network."""
        url = self.url
        if url is None:
            return {"listen_addresses": ""}
        settings = {"listen_addresses": str(url.host), "port": str(url.port)}
        if self._is_encrypted(url):
            settings |= {
                "ssl": "on",
                "ssl_cert_file": str(self._certificate),
                "ssl_key_file": str(self._key),
                "ssl_min_protocol_version": "TLSv1.2",
            }
        return settings

    def access_rules(self) -> str:
        """The text of pg_hba.conf."""
        tls = self.url is not None and self._is_encrypted(self.url)
        return ACCESS.format(kind="hostssl" if tls else "host", database=DATABASE, role=ROLE)

    @staticmethod
    def _is_encrypted(url: URL) -> bool:
        return url.query.get("sslmode") == "verify-full"

    @property
    def server_files(self) -> list[Path]:
        """Files that the server's user must be able to read; it must own the key."""
        return [path for path in (self._certificate, self._key) if path.exists()]

    def _make_certificate(self, address: str) -> None:
        kind = "IP" if re.fullmatch(r"[0-9.]+|.*:.*", address) else "DNS"
        _write_private(self._key, "")
        result = subprocess.run(
            [
                *("openssl", "req", "-x509"),
                *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
                *("-nodes", "-days", "3650", "-subj", "/CN=atelier"),
                *("-addext", f"subjectAltName={kind}:{address}"),
                *("-keyout", str(self._key), "-out", str(self._certificate)),
            ],
            capture_output=True,
            text=True,
        )
        if result.returncode != 0:
            raise NetworkError(f"openssl made no certificate: {result.stderr.strip().splitlines()[-1]}")


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)

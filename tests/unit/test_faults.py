"""What an error of the database says, by its SQLSTATE or by what libpq says of a connection."""

import optuna
import psycopg2
import pytest
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from storage.faults import ErrorKind, classify, explain, is_transient, is_worth_waiting

AGAIN, FINAL, OURS = ErrorKind.AGAIN, ErrorKind.FINAL, ErrorKind.OURS


class Coded(psycopg2.DatabaseError):
    """Of a class that says nothing: the driver's `pgcode` cannot be set."""

    def __init__(self, code):
        super().__init__(f"what the server says of {code}\nDETAIL: more")
        self.code = code

    pgcode = property(lambda self: self.code)


def wrapped(error):
    """As it comes out of a session of Optuna's."""
    outer = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    outer.__cause__ = DBAPIError.instance("SELECT 1", {}, error, psycopg2.Error)
    return outer


@pytest.mark.parametrize(
    ("verdict", "codes"),
    [
        (AGAIN, "08000 08003 08006 08P01 25006 25P03 25P04 40001 40P01 40003 53100 53200 53300 53400"),
        (AGAIN, "55000 55006 55P03 57000 57014 57P01 57P02 57P03 57P05 58000 58030"),
        (FINAL, "0P000 22021 22P05 28000 28P01 3D000 3F000 42501 42703 42704 42P01 57P04 XX001 XX002"),
        (OURS, "22003 23502 23505 25P02 42601 42883 42P07 54001 XX000"),
    ],
)
def test_an_error_with_a_code(verdict, codes):
    for code in codes.split():
        for error in (Coded(code), wrapped(Coded(code))):
            assert classify(error) is verdict, code
            assert is_transient(error) == (verdict is AGAIN)
            assert explain(error).startswith(f"what the server says of {code}")
            assert (";" in explain(error)) == (verdict is FINAL), code  # what to do


SERVER = 'connection to server at "10.0.0.5", port 5432 failed: '
REFUSED = (
    'connection to server at "::1", port 5432 failed: Connection refused\n\tIs the server running?\n'
)


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (AGAIN, SERVER + "Connection refused"),
        (AGAIN, SERVER + "FATAL:  the database system is starting up"),
        (AGAIN, SERVER + "FATAL:  the database system is shutting down"),
        (AGAIN, SERVER + "FATAL:  the database system is in recovery mode"),
        (AGAIN, SERVER + "FATAL:  the database system is not yet accepting connections"),
        (AGAIN, SERVER + "FATAL:  sorry, too many clients already"),
        (AGAIN, SERVER + 'FATAL:  too many connections for role "a"'),
        (AGAIN, SERVER + 'FATAL:  too many connections for database "x\' does not exist"'),
        (AGAIN, SERVER + "FATAL:  remaining connection slots are reserved for superusers"),
        (AGAIN, SERVER + 'FATAL:  database "a" is not currently accepting connections'),
        (AGAIN, SERVER + "session is read-only"),
        (AGAIN, SERVER + "server closed the connection unexpectedly"),
        (AGAIN, SERVER + "FATAL:  server login has been failing, try again later (server_login_retry)"),
        (AGAIN, SERVER + "FATAL:  Datenbank »a« existiert nicht"),  # not understood
        (AGAIN, 'could not translate host name "db" to address: Name or service not known'),
        (AGAIN, "timeout expired"),
        (AGAIN, ""),
        (FINAL, SERVER + 'FATAL:  database "a" does not exist'),
        (FINAL, REFUSED + SERVER + 'FATAL:  database "a" does not exist'),
        (FINAL, SERVER + 'FATAL:  role "a" does not exist'),
        (FINAL, SERVER + 'FATAL:  role "a" is not permitted to log in'),
        (FINAL, SERVER + 'FATAL:  password authentication failed for user "a"'),
        (FINAL, SERVER + 'FATAL:  Peer authentication failed for user "a"'),
        (FINAL, SERVER + "fe_sendauth: no password supplied"),
        (FINAL, SERVER + 'FATAL:  no pg_hba.conf entry for host "10.0.0.9", user "a", database "b"'),
        (FINAL, SERVER + 'FATAL:  pg_hba.conf rejects connection for host "10.0.0.9", user "a"'),
        (FINAL, SERVER + 'FATAL:  permission denied for database "a"'),
        (FINAL, SERVER + 'FATAL:  permission denied to set role "atelier_worker"'),
        (FINAL, SERVER + "FATAL:  unsupported startup parameter: options"),
        (FINAL, SERVER + "FATAL:  no such user: a"),
        (FINAL, SERVER + "server does not support SSL, but SSL was required"),
        (FINAL, SERVER + "SSL error: certificate verify failed"),
        (FINAL, SERVER + "SSL error: tlsv1 alert unknown ca"),
        (FINAL, SERVER + "SSL error: tlsv13 alert certificate required"),
        (FINAL, SERVER + 'could not read certificate file "/c": no start line'),
        (FINAL, SERVER + 'could not load private key file "/k": bad'),
        (FINAL, SERVER + 'private key file "/k" has group or world access'),
        (FINAL, SERVER + 'certificate present, but not private key file "/k"'),
        (FINAL, SERVER + "channel binding is required, but server did not offer it"),
        (FINAL, SERVER + 'authentication method requirement "password" failed: it did not ask'),
        (FINAL, SERVER + "expected authentication request from server, but received H"),
        (FINAL, SERVER + "received invalid response to SSL negotiation: H"),
        (FINAL, 'connection to server on socket "/s/.s.PGSQL.5432" failed: Permission denied'),
        (FINAL, 'could not parse network address "db": Name or service not known'),
        (FINAL, 'invalid port number: "99999"'),
        (FINAL, 'invalid integer value "x" for connection option "port"'),
        (FINAL, 'invalid sslmode value: "maybe"'),
        (FINAL, 'definition of service "a" not found'),
        (FINAL, 'Unix-domain socket path "/x" is too long (maximum 107 bytes)'),
        (FINAL, "could not match 3 port numbers to 2 hosts"),
        (AGAIN, SERVER + "SSL error: unexpected eof while reading"),
        (AGAIN, SERVER + "SSL SYSCALL error: Connection reset by peer"),
    ],
)
def test_a_connection_that_does_not_come_about(verdict, text):
    for error in (psycopg2.OperationalError(text), wrapped(psycopg2.OperationalError(text))):
        assert classify(error) is verdict
        assert len(explain(error).splitlines()) == 1
        assert "refused\n" not in explain(error)


NOT_KNOWN = 'could not translate host name "db" to address: '
NO_SOCKET = 'connection to server on socket "{}/.s.PGSQL.5432" failed: No such file or directory'


@pytest.mark.parametrize(
    ("waits", "text"),
    [
        (False, NOT_KNOWN + "Name or service not known"),
        (False, NOT_KNOWN + "No address associated with hostname"),
        (True, NOT_KNOWN + "Temporary failure in name resolution"),
        (True, NOT_KNOWN + "Name or service not known\n" + REFUSED),  # of two hosts
        (False, NO_SOCKET.format("/no/such/folder")),
        (True, NO_SOCKET.format("/")),  # the server is not there yet
        (True, REFUSED),
        (True, "timeout expired"),
        (False, SERVER + 'FATAL:  database "a" does not exist'),
    ],
)
def test_who_was_never_there_waits_only_for_what_may_come(waits, text):
    error = psycopg2.OperationalError(text)
    assert is_worth_waiting(error) is waits
    assert is_transient(error) is (classify(error) is not FINAL)  # who was there goes on trying


def test_every_address_that_was_tried_is_said():
    error = psycopg2.OperationalError(REFUSED + SERVER + "timeout expired")
    assert explain(error) == f"{REFUSED.splitlines()[0]} | {SERVER}timeout expired"


@pytest.mark.parametrize(
    ("verdict", "error"),
    [
        (AGAIN, PoolTimeoutError("QueuePool limit reached")),
        (AGAIN, PendingRollbackError("Can't reconnect until invalid transaction is rolled back.")),
        (AGAIN, InvalidRequestError("This connection is closed")),
        (
            AGAIN,
            DBAPIError("SELECT 1", {}, psycopg2.InterfaceError("closed"), connection_invalidated=True),
        ),
        (OURS, InvalidRequestError("A transaction is already begun")),
        (OURS, DBAPIError("SELECT 1", {}, psycopg2.InterfaceError("no cursor"))),
        (OURS, DBAPIError("SELECT %s", {}, psycopg2.ProgrammingError("can't adapt type 'set'"))),
        (OURS, optuna.exceptions.StorageInternalError("without a cause")),
        (OURS, ValueError("server closed the connection unexpectedly")),
    ],
)
def test_an_error_that_is_not_the_servers(verdict, error):
    assert classify(error) is verdict

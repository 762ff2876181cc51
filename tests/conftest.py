"""What the tests share: the real data where they are, a tiny drawn dataset, a real PostgreSQL."""

import os
import shutil
import socket
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import psutil
import psycopg2
import pytest
import sqlalchemy as sa
import typer
from argon2 import PasswordHasher
from sqlalchemy.engine import make_url

from dashboards.web.accounts import Accounts
from search.cli import VERBS
from storage import database, schema
from storage.embedded import EmbeddedPostgres
from trainer.config import TrainConfig
from trainer.demo import write_demo

SHARED = Path(os.environ.get("ATELIER_TEST_DATA", Path(__file__).parents[2] / "shared"))


PASSWORD = "correct horse battery"
MEMORY, ROOM = Path("/dev/shm"), 4 << 30  # bytes


def all_verbs() -> set[str]:
    """Every verb as it is typed, those of groups too, as in "db start"."""
    verbs = set()
    for name, (target, _) in VERBS.items():
        verb = resolve_name(target)
        group = verb.registered_commands if isinstance(verb, typer.Typer) else None
        verbs |= {name} if group is None else {f"{name} {command.name}" for command in group}
    return verbs


def pytest_configure() -> None:
    """Keep temporary files in memory where there is room.

    Each test's database is hundreds of files, and some disks take 10 ms to delete one.
    """
    if "PYTEST_DEBUG_TEMPROOT" in os.environ or not MEMORY.is_dir():
        return
    disk = os.statvfs(MEMORY)
    free = min(disk.f_bavail * disk.f_frsize, psutil.virtual_memory().available // 2)
    if free > ROOM and not disk.f_flag & os.ST_NOEXEC:  # compiled code is loaded from there
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("ATELIER_HOME", str(folder))
    return folder


@pytest.fixture
def accounts(home: Path, monkeypatch: pytest.MonkeyPatch) -> Accounts:
    """One account for each role of the dashboard."""
    return give_accounts(home, monkeypatch)


def give_accounts(home: Path, monkeypatch: pytest.MonkeyPatch) -> Accounts:
    """One account for each role. Their passwords' hashes are argon2 as always, but quick ones."""
    quick = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    monkeypatch.setattr("dashboards.web.accounts._HASHER", quick)
    accounts = Accounts(home)
    accounts.put("vera", "viewer", PASSWORD)
    accounts.put("ed", "editor", PASSWORD)
    return accounts


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = SHARED / "data" / "FashionDataset"
    if not folder.is_dir():
        pytest.skip(f"needs FashionDataset in {folder}; set ATELIER_TEST_DATA to the folder above data/")
    return folder


@pytest.fixture(scope="session")
def real_weights() -> Path:
    path = SHARED / "weights" / "tf_efficientnet_lite0_in1k.safetensors"
    if not path.is_file():
        pytest.skip(f"needs the weights file {path}")
    return path


@pytest.fixture(scope="session")
def compiler() -> None:
    """What torch.compile needs on a CPU."""
    if not any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++"])):
        pytest.skip("needs a C++ compiler; on Debian and Ubuntu: apt install g++")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("needs Python.h; on Debian and Ubuntu: apt install python3-dev")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "demo"
    write_demo(folder, train=300, val=80, test=10)
    return folder


@pytest.fixture
def tiny(demo: Path) -> TrainConfig:
    """A run of a second or two that uses every part: trunk, trained stage, dropout, augmentation."""
    return TrainConfig(
        data=str(demo),
        backbone="test_resnet",  # timm's smallest
        weights="none",
        trainable="layer4",
        image_size=32,
        epochs=3,
        warmup_epochs=1,
        batch_size=64,
        lr=0.001,
    )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL for all tests of this process. Its data need not outlive the machine."""
    embedded = EmbeddedPostgres(tmp_path_factory.mktemp("pg"))
    url = embedded.acquire()
    # Its vacuum would visit every test's database in turn.
    for setting in ("fsync", "synchronous_commit", "full_page_writes", "autovacuum"):
        as_superuser(url, f"ALTER SYSTEM SET {setting} = off")
    as_superuser(url, "SELECT pg_reload_conf()")
    yield url
    embedded.stop()


def as_superuser(server: str, *statements: str) -> None:
    """Run statements on the server, outside of any test's database."""
    connection = psycopg2.connect(
        host=make_url(server).query["host"], user="postgres", dbname="postgres"
    )
    connection.autocommit = True
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
    connection.close()


def empty_database(server: str, name: str) -> str:
    """The URL of a database that has just been made, in place of one of that name."""
    url = make_url(server)
    as_superuser(
        server,
        f"DROP DATABASE IF EXISTS {name} WITH (FORCE)",
        f"CREATE DATABASE {name} OWNER {url.username}",
    )
    return url.set(database=name).render_as_string(hide_password=False)


def copied_database(server: str, name: str, original: str) -> str:
    """The URL of a copy of a database, rights included, in place of one of that name."""
    url = make_url(server)
    as_superuser(
        server,
        f"ALTER DATABASE {original} ALLOW_CONNECTIONS false",
        f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{original}'",
        f"DROP DATABASE IF EXISTS {name} WITH (FORCE)",
        f"CREATE DATABASE {name} TEMPLATE {original} STRATEGY FILE_COPY OWNER {url.username}",
        # The one thing that a copy lacks: it belongs to the role and this database.
        f"ALTER ROLE {url.username} IN DATABASE {name} SET search_path = public",
    )
    return url.set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def template(server: str) -> str:
    """The name of a database with all tables. To copy it takes a tenth of the time."""
    engine = database.connect(make_url(empty_database(server, "made_once")))
    schema.ensure_tables(engine)
    engine.dispose()
    return "made_once"


@pytest.fixture
def database_name(server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of this test's database, which goes with the test."""
    name = f"test_{abs(hash(request.node.nodeid)):x}"
    yield name
    as_superuser(server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
def database_url(server: str, database_name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty database of this test's own, and the environment variable that names it."""
    text = empty_database(server, database_name)
    monkeypatch.setenv("ATELIER_DATABASE_URL", text)
    return text


@pytest.fixture
def prepared_url(server: str, template: str, database_name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same with all tables in it."""
    text = copied_database(server, database_name, template)
    monkeypatch.setenv("ATELIER_DATABASE_URL", text)
    return text


@pytest.fixture
def engine(prepared_url: str) -> Iterator[sa.Engine]:
    engine = database.connect()
    yield engine
    engine.dispose()


STUDY = """
[study]
name = "{name}"
max_trials = {trials}
strategy = "none"

[space]
lr = {{ low = 1e-3, high = 2e-3, log = true }}
batch_size = [32, 64]

[train]
data = "{data}"
backbone = "resnet10t"
weights = "none"
trainable = "layer4"
image_size = {size}
epochs = {epochs}
warmup_epochs = 1
"""


@pytest.fixture
def study_text(demo: Path) -> str:
    text = STUDY.format(name="tiny", trials=2, size=32, epochs=3, data=demo)
    return text.replace("resnet10t", "test_resnet")  # timm's smallest

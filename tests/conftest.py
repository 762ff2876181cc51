"""What the tests share: the real data where they are, a tiny drawn dataset, a real PostgreSQL."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from dashboards.accounts import Accounts
from storage import database
from storage.embedded import EmbeddedPostgres
from trainer.config import TrainConfig
from trainer.demo import write_demo

SHARED = Path(os.environ.get("ATELIER_TEST_DATA", Path(__file__).parents[2] / "shared"))


PASSWORD = "correct horse battery"


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
def accounts(home: Path) -> Accounts:
    """One account for each role of the dashboard."""
    accounts = Accounts()
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
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "demo"
    write_demo(folder, train=300, val=80, test=10)
    return folder


@pytest.fixture
def tiny(demo: Path) -> TrainConfig:
    """A run of a second or two that uses every part: trunk, trained stage, dropout, augmentation."""
    return TrainConfig(
        data=str(demo),
        backbone="resnet10t",
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
    embedded = EmbeddedPostgres(tmp_path_factory.mktemp("pg"))
    yield embedded.acquire()
    embedded.stop()


def empty_database(server: str, name: str) -> str:
    """The URL of a database that has just been made, in place of one of that name."""
    url = make_url(server)
    connection = psycopg2.connect(host=url.query["host"], user="postgres", dbname="postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        cursor.execute(f"CREATE DATABASE {name} OWNER {url.username}")
    connection.close()
    return url.set(database=name).render_as_string(hide_password=False)


@pytest.fixture
def database_url(server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty database of this test's own, and the environment variable that names it."""
    text = empty_database(server, f"test_{abs(hash(request.node.nodeid)):x}")
    monkeypatch.setenv("ATELIER_DATABASE_URL", text)
    return text


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = database.connect()
    database.prepare(engine)
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
    return STUDY.format(name="tiny", trials=2, size=32, epochs=3, data=demo)

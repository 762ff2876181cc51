"""Run Alembic's migrations: the only file that imports it, beside the migrations themselves."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config


def config(folder: Path, connection: sa.Connection) -> Config:
    """Alembic's configuration for the migrations in a folder, and a connection with a transaction."""
    made = Config()
    made.set_main_option("script_location", str(folder).replace("%", "%%"))
    made.attributes["connection"] = connection
    return made


def upgrade(folder: Path, connection: sa.Connection, revision: str) -> None:
    """Upgrade the tables to that revision."""
    command.upgrade(config(folder, connection), revision)

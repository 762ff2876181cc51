"""Alembic's entry point: runs the migrations on the connection that storage.database lends it."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, version_table_schema="atelier")
with context.begin_transaction():
    context.run_migrations()

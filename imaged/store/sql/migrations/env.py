"""Run by alembic inside the transaction that `Database.migrate` opened."""

from alembic import context

from imaged.store.sql.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()

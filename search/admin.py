"""`atelier data`, `db` and `user`: what a search needs to have, and to keep."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dashboards.terminal import printable
from search.console import (
    Verbs,
    errors_in_one_line,
    find_study,
    say,
)
from storage.ownership import with_users_umask

if TYPE_CHECKING:
    from storage.embedded import EmbeddedPostgres

data_app = typer.Typer(cls=Verbs, help="Make or check a dataset.", no_args_is_help=True)
db_app = typer.Typer(cls=Verbs, help="The database.", no_args_is_help=True)
user_app = typer.Typer(cls=Verbs, help="Who may log in to the dashboard.", no_args_is_help=True)


@data_app.command("check")
def data_check(folder: Path) -> None:
    """Check a dataset; list what is wrong, and what may mislead, with file and line.

    Exit codes: 0 nothing is wrong, though there may be warnings, 2 it cannot be used as it is.
    """
    with errors_in_one_line():
        from trainer.check import check_dataset, summary
        from trainer.dataset import DatasetError

        dataset, findings = check_dataset(folder)
        for one in findings:
            typer.echo(printable(f"{'error' if one.is_error else 'warning'}: {one}"))
        if dataset is None or any(one.is_error for one in findings):
            raise DatasetError(f"{folder} has {summary(findings)}; mend what is marked error")
        counts = ", ".join(f"{len(split)} {name}" for name, split in dataset.splits.items())
        typer.echo(f"{folder}: {counts}; {len(dataset.attributes)} attributes; {summary(findings)}")
        if all(split.labels is None for split in dataset.splits.values()):
            able = " or ".join(dataset.splits)
            typer.echo(f"without labels it is good for: atelier predict --split {able}")


@data_app.command("demo")
def data_demo(
    folder: Path,
    train_images: Annotated[int, typer.Option("--train", min=1)] = 1000,
    val_images: Annotated[int, typer.Option("--val", min=1)] = 400,
    test_images: Annotated[int, typer.Option("--test", min=1)] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a small generated dataset of drawn garments."""
    with errors_in_one_line():
        from trainer.demo import write_demo

        with with_users_umask():
            write_demo(folder, train_images, val_images, test_images, seed)
        typer.echo(f"wrote {folder}; check it with: atelier data check {folder}")


@user_app.command("add")
def user_add(
    name: str,
    role: Annotated[
        str, typer.Option(help="viewer: looks; editor: also changes and deletes.")
    ] = "viewer",
    password_file: Annotated[
        Path | None, typer.Option(help="Read the password from the first line; default: ask.")
    ] = None,
) -> None:
    """Add somebody, or give a new role and password; older sessions end."""
    with errors_in_one_line():
        from dashboards.web.accounts import Accounts
        from trainer.text import read_text

        if password_file is None:
            password = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
        else:
            password = read_text(password_file).partition("\n")[0]
        Accounts().put(name, role, password)
        typer.echo(f"{name} may log in as {role}")


@user_app.command("remove")
def user_remove(name: str) -> None:
    """Let somebody in no longer; their sessions end."""
    with errors_in_one_line():
        from dashboards.web.accounts import Accounts

        Accounts().remove(name)
        typer.echo(f"{name} may not log in any more")


@user_app.command("list")
def user_list() -> None:
    """Show who may log in."""
    with errors_in_one_line():
        from dashboards.web.accounts import Accounts

        accounts = Accounts().all()
        for account in accounts.values():
            typer.echo(f"{account.name}: {account.role}")
        if not accounts:
            say("nobody yet; add somebody with: atelier user add NAME")


@db_app.command("start")
def db_start(
    listen: Annotated[
        str | None, typer.Option(help="Serve other machines too, at this address or host name.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="With --listen; 5432.")] = None,
    tls: Annotated[
        bool | None, typer.Option("--tls/--no-tls", help="With --listen: encrypt, the default, or not.")
    ] = None,
    postgres: Annotated[
        Path | None, typer.Option(help="Folder of another PostgreSQL's programs, for a new home.")
    ] = None,
) -> None:
    """Start the embedded server and leave it running."""
    with errors_in_one_line():
        from search.errors import InputError

        server = _embedded()
        if listen is None:
            if (port, tls, postgres) != (None, None, None):
                raise InputError("--port, --no-tls and --postgres go with --listen ADDRESS")
            typer.echo(server.start())
        else:
            typer.echo(server.listen(listen, port or 5432, tls is not False, postgres))
            say("commands that share this home use it; elsewhere set ATELIER_DATABASE_URL")


@db_app.command("stop")
def db_stop(
    force: Annotated[bool, typer.Option("--force", help="Even if a search uses it.")] = False,
) -> None:
    """Stop the embedded server."""
    with errors_in_one_line():
        typer.echo("stopped" if _embedded().stop(force) else "it was not running")


def _embedded() -> "EmbeddedPostgres":
    from search.errors import InputError
    from storage.embedded import EmbeddedPostgres
    from storage.paths import home

    if os.environ.get("ATELIER_DATABASE_URL"):
        raise InputError(
            "ATELIER_DATABASE_URL names an external server, which its own tools start and stop; "
            "unset it to use the embedded one"
        )
    return EmbeddedPostgres(home())


@db_app.command("status")
def db_status() -> None:
    """Say where the database is and what it holds."""
    with errors_in_one_line():
        from storage import database, paths, schema, url
        from storage.prune import forgotten
        from storage.studies import study_names

        if url.configured_url() is None and not (
            _embedded().exists()
            and _embedded().is_running()  # the first raises where the home may not be read
        ):
            typer.echo(f"embedded, in {paths.home()}: not running")
            return
        engine = database.look()
        revision = schema.schema_revision(engine)
        typer.echo(f"{url.shown(engine.url)}: running, schema {revision or 'none yet'}")
        for name in study_names(engine) if revision else []:
            typer.echo(f"  study {name}")
        if revision == schema.head_revision() and (left := forgotten(engine)):
            typer.echo(f"  run folders of no study here: {len(left)}; see: atelier db prune")


@db_app.command("backup")
def db_backup(
    file: Annotated[Path, typer.Argument(help="The archive to write, as in atelier.tar.")],
) -> None:
    """Write the database and the files of its studies into one archive, while workers run."""
    with errors_in_one_line():
        from storage import backup, database

        manifest = backup.back_up(database.look(), file)
        files = len(manifest.members) - len(manifest.columns)
        typer.echo(
            f"{file}: {file.stat().st_size / 1e6:.1f} MB, {files} files beside the tables; verified"
        )


@db_app.command("restore")
def db_restore(
    file: Annotated[Path, typer.Argument(help="An archive that `atelier db backup` wrote.")],
) -> None:
    """Fill an empty database and home from an archive; workers of the time before get nothing more."""
    with errors_in_one_line():
        from storage import archive, backup, database, url

        archive.read_backup(file)  # before a server is started for it
        engine = database.connect()
        manifest = backup.restore(engine, file)
        typer.echo(
            f"restored into {url.shown(engine.url)} as of {manifest.created}; new workers go on "
            "(atelier search, submit or worker), those of the time before get nothing"
        )


@db_app.command("prune")
def db_prune(
    study: Annotated[str | None, typer.Argument(help="Study name, or its study file.")] = None,
    keep: Annotated[
        int, typer.Option(min=0, help="How many of the best trials keep their predictions.")
    ] = 100,  # search.confirm.evidence.MOST_RIVALS, whose import takes its time
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing; list the files.")] = False,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="Remove the folders of studies that are not on record.")
    ] = False,
) -> None:
    """Remove files of a study that no longer matter; whatever can be resumed stays.

    Without STUDY: list the run folders of studies that the database does not have, as after their
    deletion in optuna-dashboard, and in which nothing was written for a day; --deleted removes them.
    """
    with errors_in_one_line():
        if study is None:
            _prune_deleted(deleted and not dry_run)
            return
        from search.confirm.plan import SUFFIX, recorded
        from search.errors import InputError
        from storage import prune
        from storage.paths import RunFolder, total_size
        from storage.studies import study_entry

        if deleted:
            raise InputError("--deleted is for studies that are not on record: leave out STUDY")
        engine, entry = find_study(study)
        runs = RunFolder(entry.name, entry.created)
        # A confirmation is made of all its predictions.
        kept = None if recorded(entry) else keep
        linked = study_entry(engine, entry.name + SUFFIX)
        confirmation = linked and recorded(linked)
        candidates = [one["number"] for one in confirmation.candidates] if confirmation else []
        files = sorted(prune.superfluous(engine, entry.study_id, runs, kept, candidates))
        size = total_size(files) / 1e6
        if dry_run:
            for path in files:
                typer.echo(path)
        else:
            prune.remove(files)
        typer.echo(f"{len(files)} files, {size:.1f} MB: {'would be ' if dry_run else ''}removed")


def _prune_deleted(remove: bool) -> None:
    import shutil

    from search.errors import InputError
    from storage import database, paths, prune, schema, url
    from storage.embedded import EmbeddedPostgres
    from storage.paths import files_in, total_size

    engine = database.look()
    schema.require_schema(engine)
    own = EmbeddedPostgres(paths.home()).data
    if remove and os.environ.get("ATELIER_DATABASE_URL") and own.is_dir():
        raise InputError(
            f"the folders may be those of the database in {own}, which shares this home; unset "
            "ATELIER_DATABASE_URL to ask that one, or remove by hand what is listed without --deleted"
        )
    folders = prune.forgotten(engine)
    size = total_size(path for folder in folders for path in files_in(folder)) / 1e6
    for folder in folders:
        typer.echo(folder)
        if remove:
            shutil.rmtree(folder)
    end = (
        "removed"
        if remove
        else "atelier db prune --deleted removes them"
        if folders
        else "nothing to do"
    )
    where = url.shown(engine.url)
    typer.echo(f"{len(folders)} folders of no study in {where}, {size:.1f} MB: {end}")


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Bring the tables up to this version of Atelier."""
    with errors_in_one_line():
        from storage import database, schema

        engine = database.connect()
        before = schema.schema_revision(engine)
        schema.upgrade(engine)
        typer.echo(f"schema {before or 'none'} -> {schema.head_revision()}")


@db_app.command("check")
def db_check() -> None:
    """Say of everything about the database whether a search can be made with it, and what to do."""
    with errors_in_one_line():
        from dataclasses import replace

        from storage import database, schema, url

        engine = database.look(replace(database.WORK, checked=False))
        problems = []
        for one in schema.examine(engine):
            typer.echo(f"{'BAD' if one.problem else 'OK '} {one.name}: {one.found}")
            problems += [one.problem] if one.problem else []
        if problems:
            raise url.DatabaseError(f"the database at {url.shown(engine.url)} {'; it '.join(problems)}")

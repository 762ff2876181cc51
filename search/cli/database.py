"""`atelier db`: start, stop, back up, prune, upgrade and check the database."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dashboards.terminal import say
from search.cli import group_of_verbs
from search.cli.finding import OptionalStudyName, find_study
from search.confirm.evidence import MOST_RIVALS
from search.confirm.plan import SUFFIX, recorded
from search.errors import InputError
from search.json_output import AsJson, print_json
from storage import archive, backup, database, prune, schema, url
from storage.embedded import EmbeddedPostgres
from storage.paths import RunFolder, files_in, home, total_size
from storage.studies import study_entry, study_names
from storage.words import counted

db_app = group_of_verbs("db")


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
    typer.echo("stopped" if _embedded().stop(force) else "it was not running")


def _embedded() -> EmbeddedPostgres:
    if os.environ.get("ATELIER_DATABASE_URL"):
        raise InputError(
            "ATELIER_DATABASE_URL names an external server, which its own tools start and stop; "
            "unset it to use the embedded one"
        )
    return EmbeddedPostgres(home())


@db_app.command("status")
def db_status(as_json: AsJson = False) -> None:
    """Show where the database is and which studies it has."""
    if url.configured_url() is None and not (
        _embedded().exists()
        and _embedded().is_running()  # `exists` raises first if the home may not be read
    ):
        if as_json:
            print_json(url=None, home=home(), schema=None, studies=[], forgotten=[])
        else:
            typer.echo(f"embedded, in {home()}: not running")
        return
    engine = database.look()
    revision, shown = schema.schema_revision(engine), url.shown(engine.url)
    names = study_names(engine) if revision else []
    left = prune.forgotten(engine) if revision == schema.head_revision() else []
    if as_json:
        print_json(url=shown, home=home(), schema=revision, studies=names, forgotten=left)
        return
    typer.echo(f"{shown}: running, schema {revision or 'none yet'}")
    for name in names:
        typer.echo(f"  study {name}")
    if left:
        typer.echo(f"  run folders of no study here: {len(left)}; see: atelier db prune")


@db_app.command("backup")
def db_backup(
    file: Annotated[Path, typer.Argument(help="The archive to write, as in atelier.tar.")],
) -> None:
    """Write the database and the files of its studies into one archive, while workers run."""
    manifest = backup.back_up(database.look(), file)
    files = counted(len(manifest.members) - len(manifest.columns), "file")
    typer.echo(f"{file}: {file.stat().st_size / 1e6:.1f} MB, {files} beside the tables; verified")


@db_app.command("restore")
def db_restore(
    file: Annotated[Path, typer.Argument(help="An archive that `atelier db backup` wrote.")],
) -> None:
    """Fill an empty database and home from an archive. Workers that ran before get no more trials."""
    archive.read_backup(file)  # before a server is started for it
    engine = database.connect()
    manifest = backup.restore(engine, file)
    typer.echo(
        f"restored into {url.shown(engine.url)} as of {manifest.created}; start new workers "
        "(atelier search, submit or worker): those that ran before get no more trials"
    )


@db_app.command("prune")
def db_prune(
    study: OptionalStudyName = None,
    keep: Annotated[
        int, typer.Option(min=0, help="How many of the best trials keep their predictions.")
    ] = MOST_RIVALS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing; list the files.")] = False,
    deleted: Annotated[
        bool,
        typer.Option("--deleted", help="Remove the folders of studies that the database does not have."),
    ] = False,
) -> None:
    """Remove a study's superfluous files. What a trial needs to be resumed stays.

    Without STUDY: list the run folders of studies that the database does not have, for example because
    they were deleted in optuna-dashboard. --deleted removes these folders. A folder in which something
    was written during the last day is left alone.
    """
    if study is None:
        _prune_deleted(deleted and not dry_run)
        return
    if deleted:
        raise InputError("--deleted is for studies that the database does not have: leave out STUDY")
    engine, entry = find_study(study)
    runs = RunFolder(entry.name, entry.created)
    # A confirmation is computed from the predictions of all its trials.
    kept = None if recorded(entry) else keep
    linked = study_entry(engine, entry.name + SUFFIX)
    confirmation = linked and recorded(linked)
    candidates = [candidate["number"] for candidate in confirmation.candidates] if confirmation else []
    files = sorted(prune.superfluous(engine, entry.study_id, runs, kept, candidates))
    size = total_size(files) / 1e6
    if dry_run:
        for path in files:
            typer.echo(path)
    else:
        prune.remove(files)
    typer.echo(f"{counted(len(files), 'file')}, {size:.1f} MB: {'would be ' if dry_run else ''}removed")


def _prune_deleted(remove: bool) -> None:
    """List, or remove, the run folders of studies that the database does not have."""

    engine = database.look()
    schema.require_schema(engine)
    embedded = EmbeddedPostgres(home()).data
    if remove and os.environ.get("ATELIER_DATABASE_URL") and embedded.is_dir():
        raise InputError(
            f"the folders may be those of the database in {embedded}, which shares this home; unset "
            "ATELIER_DATABASE_URL to use that one, or remove by hand what is listed without --deleted"
        )
    folders = prune.forgotten(engine)
    size = total_size(path for folder in folders for path in files_in(folder)) / 1e6
    for folder in folders:
        typer.echo(folder)
        if remove:
            shutil.rmtree(folder)
    if not folders:
        end = "nothing to do"
    else:
        end = "removed" if remove else "atelier db prune --deleted removes them"
    where = url.shown(engine.url)
    typer.echo(f"{counted(len(folders), 'folder')} of no study in {where}, {size:.1f} MB: {end}")


@db_app.command("upgrade")
def db_upgrade() -> None:
    """Upgrade the tables to this version of Atelier."""
    engine = database.connect()
    before = schema.schema_revision(engine)
    schema.upgrade(engine)
    typer.echo(f"schema {before or 'none'} -> {schema.head_revision()}")


@db_app.command("check")
def db_check(as_json: AsJson = False) -> None:
    """Check whether the database can serve a search, and say what to change."""
    engine = database.look(replace(database.WORK, checked=False))
    checks = [*schema.examine(engine)]
    if as_json:
        print_json(url=url.shown(engine.url), checks=[check._asdict() for check in checks])
    else:
        for check in checks:
            remark = f"; {check.remark}" if check.remark else ""
            typer.echo(f"{'BAD' if check.problem else 'OK '} {check.name}: {check.value}{remark}")
    if problems := [check.problem for check in checks if check.problem]:
        raise url.DatabaseError(f"the database at {url.shown(engine.url)} {'; it '.join(problems)}")

"""The `atelier` command: the table of its verbs. A verb's module is imported when the verb is called."""

import gc
import logging
import os
import sys
from functools import partial
from pkgutil import resolve_name
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from search.cli.errors import errors_in_one_line
from search.cli.examples import epilog
from search.cli.process import check_arguments, check_threads, ready_streams, run
from search.cli.version import show_versions
from search.slurm.granted import take_granted
from storage.ownership import private

# Name: the function or the group of verbs, and its line in `atelier --help`.
VERBS = {
    "init": ("search.cli.beginning:init", "Write a study file for this site or this machine."),
    "demo": ("search.cli.searching:demo", "Draw a small dataset, and search it: one minute."),
    "example": ("search.cli.beginning:example", "Write a ready study file, to be edited."),
    "search": ("search.cli.searching:search", "Run a whole search on this machine."),
    "worker": ("search.cli.searching:worker", "Run one worker, as a SLURM array task does."),
    "confirm": ("search.cli.searching:confirm", "Rerun the best trials on fresh seeds."),
    "submit": ("search.cli.submitting:submit", "Start workers as a SLURM array job."),
    "stop": ("search.cli.watching:stop", "Ask all workers of a study to end."),
    "logs": ("search.cli.watching:logs", "Show the workers' logs and the last traceback."),
    "status": ("search.cli.watching:status", "Show a study: progress, trials, workers, GPU-hours."),
    "trials": ("search.cli.watching:trials", "List a study's trials, one a row."),
    "efficiency": ("search.cli.watching:efficiency", "Show what workers used, and what to ask for."),
    "verify": ("search.cli.verifying:verify", "Check that all holds what is promised of a study."),
    "doctor": ("search.cli.doctor:doctor", "Check what a search needs here, and what to do."),
    "plot": ("search.cli.plotting:plot", "Draw the figures of the dashboard into a file."),
    "report": ("search.cli.winning:report", "Write a study's results with figures as one page."),
    "dashboard": ("search.cli.dashboard:dashboard", "Serve the dashboard, behind a login."),
    "export": ("search.cli.winning:export", "Write the best configuration, for atelier train."),
    "train": ("search.cli.winning:train", "Train one configuration to its end."),
    "replay": ("search.cli.winning:replay", "Train a trial again, and compare every number."),
    "predict": ("search.cli.winning:predict", "Predict a split's attributes with a trained model."),
    "export-model": ("search.cli.winning:export_model", "Write a trained model for use elsewhere."),
    "model": ("search.cli.winning:model", "Print the network's stages and their sizes."),
    "data": ("search.cli.data:data_app", "Make or check a dataset."),
    "db": ("search.cli.database:db_app", "Start, check, back up, clean or upgrade the database."),
    "user": ("search.cli.users:user_app", "Who may log in to the dashboard."),
}


class Verbs(TyperGroup):
    """A group of verbs. Here, and nowhere else, an error becomes one line and an exit code."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Read the options that stand before the verb."""
        with errors_in_one_line():
            check_arguments(args)
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Read the verb's options and arguments, and run it."""
        with errors_in_one_line(ctx), private():
            check_threads()
            take_granted()
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find what is about to run, and put its example below its help."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = self.load(name, command)
            command.epilog = epilog(f"{ctx.info_name} {name}" if ctx.parent else name)
        return name, command, rest

    def load(self, name: str, command: Any) -> Any:
        """The verb of this name, ready to run."""
        return command


class LazyVerbs(Verbs):
    """The verbs of the table. `atelier --help` and the completion of a verb read only the table."""

    def load(self, name: str, command: Any) -> Any:
        """Import the verb of this name."""
        loaded = load_verb(name)
        gc.enable()  # atelier_command.py has stopped it for the imports
        return loaded


typer_app = partial(
    typer.Typer,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # else [slurm.*] is taken for markup
)


def group_of_verbs(name: str) -> typer.Typer:
    """A group like `atelier db`, with its line of the table."""
    return typer_app(cls=Verbs, help=VERBS[name][1], add_completion=False)


def load_verb(name: str) -> Any:
    """The command of a verb, imported. A group has its verbs in `commands`."""
    target = resolve_name(VERBS[name][0])
    if isinstance(target, typer.Typer):
        return get_command(target)
    alone = typer_app(add_completion=False)
    alone.command(name, no_args_is_help=False)(target)
    return get_command(alone)


app = typer_app(
    cls=LazyVerbs, help="Hyperparameter search for a fashion-attribute model.", epilog=epilog("")
)


@app.callback()
def _before_the_verb(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=show_versions,
            help="Show the versions that a report of an issue needs.",
        ),
    ] = False,
) -> None:
    """Take the options that belong to no verb."""


for _name, (_, _line) in VERBS.items():
    app.command(_name, help=_line)(lambda: None)  # `load_verb` puts the verb in its place


def main(arguments: list[str] | None = None) -> None:
    """Run the command, or the one with these arguments, with its log on stderr."""
    # OpenBLAS makes a thread for each core as numpy is imported, and where it may not, it ends the
    # process. Nothing here is faster for them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    ready_streams()
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S%z",  # logs are read far from the machine's clock
        stream=sys.stderr,
    )
    quiet = ("optuna", "alembic", "timm", "httpx", "huggingface_hub", "matplotlib", "onnxscript")
    for name in (*quiet, "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its import sets the level anew
    # torch's import sets this too, unless it is cut short.
    logging.getLogger("torch").setLevel(logging.WARNING)
    run(app, arguments)

"""Errors of this package that end a command with one line and an exit code."""

from search.exit_codes import ExitCode


class SearchError(Exception):
    """The message is one line: what was found, what is allowed, what to do next."""

    exit_code = ExitCode.FAILED


class InputError(SearchError, ValueError):
    """The user's input is wrong."""

    exit_code = ExitCode.WRONG_INPUT


def no_trial(study: str, number: int, trials: int) -> InputError:
    """The error of a study that has no trial of this number, but so many trials."""
    return InputError(f"study {study!r} has no trial {number}; it has {trials}, from 0")

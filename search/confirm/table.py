"""Show a confirmation: a table, and the verdict in words."""

import math

from rich.console import Group, RenderableType
from rich.text import Text

from dashboards.terminal import Grid
from search.confirm.evidence import WINNING_IMAGES, WINNING_RERUNS, Candidate, Confirmation
from storage.words import counted

COLUMNS = (
    "trial",
    "reruns",
    "search",
    "score",
    "95 % interval",
    "behind",
    "95 % interval",
    "best",
    "within",
)


def render(confirmation: Confirmation) -> RenderableType:
    """The confirmation as a table, and its verdict in words."""
    table = Grid(COLUMNS)
    for candidate in confirmation.candidates:
        table.add(*cells(candidate))
    return Group(table, *(Text(line, style="bold") for line in verdict(confirmation)))


def cells(candidate: Candidate) -> list[str]:
    """A row of the table, in percent and percentage points."""
    notes = [f"{candidate.failed} failed"] * (candidate.failed > 0) + ["out"] * candidate.passed_over
    row = [
        str(candidate.number),
        str(candidate.seeds) + (f" ({', '.join(notes)})" if notes else ""),
        "" if candidate.searched is None else f"{100 * candidate.searched:.2f}",
    ]
    if candidate.estimate is None:
        return [*row, *[""] * (len(COLUMNS) - len(row))]
    score, behind = candidate.estimate.score, candidate.estimate.behind
    return [
        *row,
        f"{100 * score.value:.2f} ± {100 * score.error:.2f}",
        f"{100 * score.low:.2f} to {100 * score.high:.2f}",
        f"{100 * behind.value:.2f}",
        f"{100 * behind.low:.2f} to {100 * behind.high:.2f}" if behind.error else "",
        percent(candidate.estimate.best),
        f"{100 * candidate.estimate.within:.2f}",
    ]


def verdict(confirmation: Confirmation) -> list[str]:
    """What follows, in sentences."""
    lines = [_who_is_best(confirmation)]
    why = no_winner(confirmation.seeds, confirmation.folds, confirmation.rarest)
    if confirmation.choice and why:
        lines.append(why)
    if confirmation.left_out:
        lines.append(
            f"{counted(confirmation.left_out, 'rerun')} left out, as "
            f"--within {confirmation.within or 0:g} is remembered; to train more, "
            "give a smaller one (0 for none) and more --seeds"
        )
    if confirmation.optimism is not None:
        points = 100 * confirmation.optimism
        lines.append(
            "the search's figure for the trial that it puts first is expected to be too "
            f"{'low' if points < 0 else 'high'} by {abs(points):.2f} points"
        )
    if confirmation.overtaken:
        numbers = ", ".join(map(str, confirmation.overtaken))
        lines.append(
            f"among the best of the search are by now, too: {numbers}; to confirm these, first delete "
            f"{confirmation.linked!r} in the dashboard"
        )
    if confirmation.difference:
        lines.append(f"{confirmation.linked}: {confirmation.difference}")
    return lines


def no_winner(seeds: int, folds: int | None, images: int) -> str | None:
    """Why a confirmation with so many seeds of each candidate, in each fold, cannot have a winner.

    `images` are those of the rarest attribute. None if it can have one.
    """
    reruns = seeds * (folds or 1)
    if reruns < WINNING_RERUNS:
        return (
            f"with {counted(reruns, 'rerun')} of each candidate none can be declared the best; that "
            f"takes {WINNING_RERUNS} or more: --seeds {math.ceil(WINNING_RERUNS / (folds or 1))}"
        )
    if images < WINNING_IMAGES:
        return (
            f"with {counted(images, 'image')} of an attribute none can be declared the best; that takes "
            f"{WINNING_IMAGES} or more{'' if folds else ', and --folds judges by those of train too'}"
        )
    return None


def _who_is_best(confirmation: Confirmation) -> str:
    leader, winner = confirmation.leader, confirmation.winner
    if leader is None or leader.estimate is None or not confirmation.finished:
        return f"no verdict yet: {confirmation.reruns} of {confirmation.max_reruns} reruns have ended"
    if winner is not None:
        return (
            f"take trial {winner.number}: with {percent(leader.estimate.best)} it is the best of "
            f"{field(confirmation)}"
        )
    if (choice := confirmation.choice) is not None and choice.estimate is not None:
        near = in_points(choice.estimate.within, confirmation)
        return f"take trial {choice.number}: with 95 % it is {near}"
    if len(confirmation.candidates) == 1:
        return "one candidate alone has nobody to win against"
    unknown = ", ".join(str(one.number) for one in confirmation.candidates if not one.estimate)
    return (
        f"no verdict: too few reruns of {unknown or 'any candidate'} have ended well; see why with: "
        f"atelier logs {confirmation.linked}"
    )


def percent(probability: float) -> str:
    """A probability that is not said to be higher than it is."""
    return f"{math.floor(100 * probability)} %"


def in_points(within: float, confirmation: Confirmation) -> str:
    """How far a candidate is behind the best one at most, in words."""
    return f"at most {100 * within:.2f} points behind the best of {field(confirmation)}"


def field(confirmation: Confirmation) -> str:
    """Of whom a candidate is the best, in words."""
    these, folds = f"these {len(confirmation.candidates)} candidates", confirmation.folds
    return f"{these}, each trained on {folds - 1}/{folds} of train and val" if folds else these

"""What sacct prints, in the forms of several versions, and what `efficiency` makes of it.

The texts follow sacct's manual. No test here has a slurmdbd; tests/cluster has a SLURM without one.
"""

from datetime import UTC, datetime

import pytest

from search.efficiency import OUR_RECORDS, advice, costs, with_accounting
from search.slurm.accounting import Run, read_runs
from search.slurm.commands import SlurmError
from storage.efficiency import WorkerUse
from storage.outcome import WALL_TIME

SINCE = datetime(2026, 11, 1, tzinfo=UTC)
GIB = 1 << 30
# An array of four: 0 was requeued at its wall time and ended, 1 was out of memory, 2 was cancelled by
# its user, 3 works. Then tasks that wait, and a job that was cancelled before it began.
TEXTS = {
    "22.05": """\
12_0|1795724000|1795724060|28800|480|REQUEUED|billing=7,cpu=7,gres/gpu=1,mem=12288M,node=1|
12_0.batch||1795724060|28800||CANCELLED||5123.50M
12_0.extern||1795724060|28800||COMPLETED||0
12_0|1795752860|1795753460|3600|480|COMPLETED|billing=7,cpu=7,gres/gpu=1,mem=12288M,node=1|
12_0.batch||1795753460|3600||COMPLETED||2048M
12_0.extern||1795753460|3600||COMPLETED||1M
12_1|1795724000|1795724060|120|480|OUT_OF_MEMORY|billing=7,cpu=7,gres/gpu=1,mem=12G,node=1|
12_1.batch||1795724060|120||OUT_OF_MEMORY||12288M
12_2|1795724000|1795724060|300|480|CANCELLED by 1000|billing=7,cpu=7,gres/gpu=1,mem=12288M,node=1|
12_2.batch||1795724060|300||CANCELLED||1G
12_3|1795724000|1795724100|200|480|RUNNING|billing=7,cpu=7,gres/gpu=1,mem=12288M,node=1|
12_3.batch||1795724100|200||RUNNING||
12_3.extern||1795724100|200||RUNNING||
12_[4-7%4]|1795724000|Unknown|0|480|PENDING||
13|1795724000|None|0|480|CANCELLED by 1000||
""",
    # From 23.02 on a GPU has its type beside it; without SLURM_TIME_FORMAT times are as in ISO 8601.
    "24.11": """\
12_0|2026-11-26T20:53:20|2026-11-26T20:54:20|28800|480|REQUEUED|billing=7,cpu=7,gres/gpu:a100=1,gres/gpu=1,mem=12G,node=1|
12_0.batch|2026-11-26T20:54:20|2026-11-26T20:54:20|28800||CANCELLED|cpu=7,gres/gpu=1,mem=12G,node=1|5246464K
12_0.extern|2026-11-26T20:54:20|2026-11-26T20:54:20|28800||COMPLETED|billing=7,cpu=7,mem=12G,node=1|0
12_0|2026-11-27T04:54:20|2026-11-27T05:04:20|3600|480|COMPLETED|billing=7,cpu=7,gres/gpu:a100=1,gres/gpu=1,mem=12G,node=1|
12_0.batch|2026-11-27T05:04:20|2026-11-27T05:04:20|3600||COMPLETED|cpu=7,gres/gpu=1,mem=12G,node=1|2147483648
12_1|2026-11-26T20:53:20|2026-11-26T20:54:20|120|480|OUT_OF_MEMORY|billing=7,cpu=7,gres/gpu=1,mem=0.01171875T,node=1|
12_1.batch|2026-11-26T20:54:20|2026-11-26T20:54:20|120||OUT_OF_MEMORY|cpu=7,mem=12G,node=1|12G
12_2|2026-11-26T20:53:20|2026-11-26T20:54:20|300|480|CANCELLED by 1000|cpu=7,gres/gpu=1,mem=12G|
12_2.batch|2026-11-26T20:54:20|2026-11-26T20:54:20|300||CANCELLED|cpu=7,mem=12G,node=1|1024M
12_3|2026-11-26T20:53:20|2026-11-26T20:55:00|200|480|RUNNING|billing=7,cpu=7,gres/gpu=1,mem=12G,node=1|
12_3.batch|2026-11-26T20:55:00|2026-11-26T20:55:00|200||RUNNING|cpu=7,mem=12G,node=1|
12_[4-7%4]|2026-11-26T20:53:20|Unknown|0|480|PENDING||
13|2026-11-26T20:53:20|None|0|480|CANCELLED by 1000||
""",
}


def use(task, restarts=0, **changes):
    """A worker of the array: what its own record says."""
    values = {
        "worker": f"node:{task}",
        "job": None if task is None else f"12_{task}",
        "restarts": restarts,
        "gpu": "A100",
        "ended": None,
        "is_alive": False,
        "pack": 4,
        "trials": 1,
        "epochs": 3,
        "seconds": 100.0,
        "seconds_training": 60.0,
        "waits": dict.fromkeys(("database", "disk", "trials", "images"), 0.0),
        "wall_seconds": None,
        "memory": None,
        "peak_memory": 2.5 * GIB,
        "busy": 0.9,
    }
    return WorkerUse(**values | changes)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_the_versions_print(command, text):
    arguments = command("sacct", text)
    runs = read_runs(["12", "13", "12"], SINCE, "other")
    assert runs == {
        "12_0": [
            Run("REQUEUED", 60, 28800, 28800, 12 * GIB, 5123.5 * (1 << 20)),
            Run("COMPLETED", 600, 3600, 28800, 12 * GIB, 2 * GIB),
        ],
        "12_1": [Run("OUT_OF_MEMORY", 60, 120, 28800, 12 * GIB, 12 * GIB)],
        "12_2": [Run("CANCELLED by 1000", 60, 300, 28800, 12 * GIB, GIB)],
        "12_3": [Run("RUNNING", 100, 200, 28800, 12 * GIB, None)],
    }
    words = arguments.read_text().split()
    assert {"--jobs=12,13", "--duplicates", "--clusters=other"} <= {*words}


@pytest.mark.parametrize("limit", ["UNLIMITED", "Partition_Limit", ""])
def test_without_a_limit_or_a_grant(command, limit):
    command("sacct", f"12_0|Unknown|1795724060|60|{limit}|TIMEOUT||\n")
    assert read_runs(["12"], SINCE) == {"12_0": [Run("TIMEOUT", None, 60, None, None, None)]}


@pytest.mark.parametrize(
    "text",
    [
        "The accounting is away on Monday.\n",
        "12_0|1|2|3|4|COMPLETED|mem=1G\n",
        "12_0|1|2|a while|4|COMPLETED|mem=1G|\n",
        "12_0|1|yesterday|3|4|COMPLETED|mem=1G|\n",
        "12+0|1|2|3|4|COMPLETED|mem=1G|\n",
    ],
)
def test_what_is_not_understood_is_said(command, text):
    command("sacct", text)
    with pytest.raises(SlurmError, match="not understood"):
        read_runs(["12"], SINCE)
    uses, source = with_accounting([use(0)], ["12"], SINCE)
    assert uses == [use(0)]
    assert source.startswith(OUR_RECORDS)
    assert "not understood" in source


def test_sacct_knows_better(command):
    command("squeue", "")
    command("sacct", TEXTS["22.05"])
    given = [
        use(0, ended=WALL_TIME),
        use(0, restarts=1, ended="nothing left to claim"),
        use(1),
        use(3, is_alive=True),
        use(None),
    ]
    uses, source = with_accounting(given, ["12"], SINCE)
    first, again, starved, at_work, elsewhere, cancelled = uses
    assert (first.seconds, first.queued, first.ended) == (28800, 60, WALL_TIME)
    assert first.peak_memory == 5123.5 * (1 << 20)
    assert (again.seconds, again.queued, again.peak_memory) == (3600, 600, 2.5 * GIB)  # ours is more
    assert (starved.ended, starved.memory, starved.wall_seconds) == ("OUT_OF_MEMORY", 12 * GIB, 28800)
    assert (at_work.ended, at_work.seconds, at_work.peak_memory) == (None, 200, 2.5 * GIB)
    assert elsewhere == given[-1]
    # No worker has signed for this task.
    assert (cancelled.job, cancelled.ended, cancelled.epochs) == ("12_2", "CANCELLED by 1000", 0)
    assert source == (
        "sacct of slurm 99.11.1 for time, memory and the queue, of 4 of 5 workers; "
        f"{OUR_RECORDS} for the rest"
    )
    assert advice(uses) == [
        "more memory than 12 GiB (--mem): SLURM killed 1 of 6 workers for it",
        "a longer time (--time): it ended 1 of 4 workers, and each starts anew",
    ]
    assert costs(uses) == (
        "14 min 40 s in the queue, before 5 starts; 1 of 6 began anew, which cost 1 h 09 min: "
        "the queue, starting and saving"
    )


def test_several_workers_of_one_job_keep_their_own_figures(command):
    command("sacct", TEXTS["22.05"])
    both = [use(0), use(0)]
    assert with_accounting(both, ["12"], SINCE)[0][:2] == both


def test_jobs_that_sacct_does_not_know(command):
    command("sacct", "")
    uses, source = with_accounting([use(0)], ["12"], SINCE)
    assert uses == [use(0)]
    assert source == f"{OUR_RECORDS}; sacct says nothing of these jobs"


def test_without_slurm_nobody_is_asked():
    assert with_accounting([use(None)], [], SINCE) == ([use(None)], OUR_RECORDS)
    assert costs([use(None)]) is None

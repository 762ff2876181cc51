"""What sacct prints, in the forms of several versions, and what `efficiency` makes of it.

The texts were recorded from real ones, with a slurmdbd. tests/cluster/test_accounting.py asks one.
"""

from datetime import UTC, datetime

import pytest

from search.efficiency import OUR_RECORDS, advice, costs, with_accounting
from search.slurm.accounting import Run, read_runs
from search.slurm.commands import SlurmError
from search.slurm.sizes import size
from storage.efficiency import WorkerUse
from storage.outcome import WALL_TIME

SINCE = datetime(2026, 11, 1, tzinfo=UTC)
GIB = 1 << 30
MIB = 1 << 20
# Job 1 is an array: 0 was requeued, 1 ended, 2 was cancelled by its user, 3 works, 4 ran out of time.
# 3 and 5 were cancelled before they began (one has a start all the same), 4 failed, 6 and 9 wait.
TEXTS = {
    "22.05": """\
3|1795870954|1795870954|0|Partition_Limit|CANCELLED by 0||
4|1795870954|1795870965|0|480|FAILED|billing=1,cpu=1,mem=100M,node=1|
4.batch|1795870965|1795870965|0||FAILED|cpu=1,mem=100M,node=1|
1_0|1795870954|1795870955|7|10|REQUEUED|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_0.batch|1795870955|1795870955|7||CANCELLED|cpu=2,gres/gpu=1,mem=1200M,node=1|1.64M
1_1|1795870954|1795870955|7|10|COMPLETED|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_1.batch|1795870955|1795870955|7||COMPLETED|cpu=2,gres/gpu=1,mem=1200M,node=1|306.47M
1_1.0|1795870958|1795870958|4||COMPLETED|cpu=2,gres/gpu=1,mem=1200M,node=1|504.73M
1_2|1795870954|1795870955|10|10|CANCELLED by 0|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_2.batch|1795870955|1795870955|10||CANCELLED|cpu=2,gres/gpu=1,mem=1200M,node=1|44.68M
1_3|1795870954|1795870962|85|10|RUNNING|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_3.batch|1795870962|1795870962|85||RUNNING|cpu=2,gres/gpu=1,mem=1200M,node=1|
1_4|1795870954|1795870955|88|1|TIMEOUT|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_4.batch|1795870955|1795870955|88||CANCELLED|cpu=2,gres/gpu=1,mem=1200M,node=1|44.78M
1_0|1795870962|1795871043|4|10|RUNNING|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_0.batch|1795871043|1795871043|4||RUNNING|cpu=2,gres/gpu=1,mem=1200M,node=1|
5|1795869651|None|0|Partition_Limit|CANCELLED by 0||
6_[0,2-3]|1795869651|Unknown|0|Partition_Limit|PENDING||
9_[0-2,4%1]|1795869651|Unknown|0|UNLIMITED|PENDING||
""",
    # Without SLURM_TIME_FORMAT times are as in ISO 8601.
    "24.11": """\
3|2026-11-28T13:02:36|None|0|Partition_Limit|CANCELLED by 0||
4|2026-11-28T13:02:36|2026-11-28T13:02:47|0|480|FAILED|billing=1,cpu=1,mem=100M,node=1|
4.batch|2026-11-28T13:02:47|2026-11-28T13:02:47|0||FAILED|cpu=1,mem=100M,node=1|
1_0|2026-11-28T13:02:36|2026-11-28T13:02:36|8|10|REQUEUED|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_0.batch|2026-11-28T13:02:36|2026-11-28T13:02:36|8||CANCELLED|cpu=2,gres/gpu=1,mem=1200M,node=1|1.71M
1_1|2026-11-28T13:02:36|2026-11-28T13:02:36|7|10|COMPLETED|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_1.batch|2026-11-28T13:02:36|2026-11-28T13:02:36|7||COMPLETED|cpu=2,gres/gpu=1,mem=1200M,node=1|306.47M
1_1.0|2026-11-28T13:02:40|2026-11-28T13:02:40|3||COMPLETED|cpu=2,gres/gpu=1,mem=1200M,node=1|504.83M
1_2|2026-11-28T13:02:36|2026-11-28T13:02:36|11|10|CANCELLED by 0|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_2.batch|2026-11-28T13:02:36|2026-11-28T13:02:36|11||CANCELLED|cpu=2,gres/gpu=1,mem=1200M,node=1|44.87M
1_3|2026-11-28T13:02:36|2026-11-28T13:02:44|85|10|RUNNING|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_3.batch|2026-11-28T13:02:44|2026-11-28T13:02:44|85||RUNNING|cpu=2,gres/gpu=1,mem=1200M,node=1|
1_4|2026-11-28T13:02:36|2026-11-28T13:02:36|89|1|TIMEOUT|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_4.batch|2026-11-28T13:02:36|2026-11-28T13:02:36|89||CANCELLED|cpu=2,gres/gpu=1,mem=1200M,node=1|45.11M
1_0|2026-11-28T13:02:44|2026-11-28T13:04:05|4|10|RUNNING|billing=2,cpu=2,gres/gpu=1,mem=1200M,node=1|
1_0.batch|2026-11-28T13:04:05|2026-11-28T13:04:05|4||RUNNING|cpu=2,gres/gpu=1,mem=1200M,node=1|
6_[0,2-3]|2026-11-28T12:52:12|Unknown|0|Partition_Limit|PENDING||
9_[0-2,4%1]|2026-11-28T12:52:12|Unknown|0|UNLIMITED|PENDING||
""",  # noqa: E501
}
STARVED = TEXTS["22.05"].replace("|TIMEOUT|", "|OUT_OF_MEMORY|")


def use(task, restarts=0, **changes):
    """A worker of the array: what its own record says."""
    values = {
        "worker": f"node:{task}",
        "job": None if task is None else f"1_{task}",
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


def runs(first, *, queued, seconds, peaks):
    """What both versions say of the array, with small differences."""
    granted = 1200 * MIB
    requeued, ended, cancelled, timed_out = (peak * MIB for peak in peaks)
    return {
        "1_0": [
            Run("REQUEUED", queued, first, 600, granted, requeued),
            Run("RUNNING", 81, 4, 600, granted, None),
        ],
        "1_1": [Run("COMPLETED", queued, 7, 600, granted, ended)],  # the step used more than the batch
        "1_2": [Run("CANCELLED by 0", queued, seconds[0], 600, granted, cancelled)],
        "1_3": [Run("RUNNING", 8, 85, 600, granted, None)],
        "1_4": [Run("TIMEOUT", queued, seconds[1], 60, granted, timed_out)],
        "4": [Run("FAILED", 11, 0, 28800, 100 * MIB, None)],
    }


RUNS = {
    "22.05": runs(7, queued=1, seconds=(10, 88), peaks=(1.64, 504.73, 44.68, 44.78)),
    "24.11": runs(8, queued=0, seconds=(11, 89), peaks=(1.71, 504.83, 44.87, 45.11)),
}


@pytest.mark.parametrize(
    ("text", "bare", "expected"),
    [
        ("1500", 1, 1500),
        ("1500", MIB, 1500 * MIB),
        ("2.5G", MIB, 2.5 * GIB),
        ("2gb", 1, 2 * GIB),
        ("3K", 1, 3 << 10),
        ("3B", 1, None),
        ("2 G", 1, None),
        ("", 1, None),
    ],
)
def test_sizes_in_slurms_forms(text, bare, expected):
    assert size(text, bare=bare) == expected


@pytest.mark.parametrize("version", TEXTS)
def test_what_the_versions_print(command, version):
    arguments = command("sacct", TEXTS[version])
    assert read_runs(["1", "3", "1"], SINCE, "other") == RUNS[version]
    words = arguments.read_text().split()
    assert {"--jobs=1,3", "--duplicates", "--clusters=other"} <= {*words}


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
    command("sacct", STARVED)
    given = [
        use(0, ended=WALL_TIME),
        use(0, restarts=1, is_alive=True),
        use(1, peak_memory=300 * MIB),
        use(3, is_alive=True),
        use(4),
        use(None),
    ]
    uses, source = with_accounting(given, ["1"], SINCE)
    first, again, ended, at_work, starved, elsewhere, cancelled = uses
    assert (first.seconds, first.queued, first.ended) == (7, 1, WALL_TIME)
    assert first.peak_memory == 2.5 * GIB  # ours is more
    assert (again.seconds, again.queued, again.ended) == (4, 81, None)
    assert (ended.ended, ended.peak_memory) == ("COMPLETED", 504.73 * MIB)
    assert (at_work.ended, at_work.seconds, at_work.peak_memory) == (None, 85, 2.5 * GIB)
    assert (starved.ended, starved.memory, starved.wall_seconds) == ("OUT_OF_MEMORY", 1200 * MIB, 60)
    assert elsewhere == given[-1]
    # No worker has signed for this task.
    assert (cancelled.job, cancelled.ended, cancelled.epochs) == ("1_2", "CANCELLED by 0", 0)
    assert source == (
        "sacct of slurm 99.11.1 for time, memory and the queue, of 5 of 6 workers; "
        f"{OUR_RECORDS} for the rest"
    )
    assert advice(uses) == [
        "more memory than 1.17 GiB (--mem): SLURM killed 1 of 7 workers for it",
        "a longer time (--time): it ended 1 of 4 workers, and each starts anew",
    ]
    assert costs(uses) == (
        "1 min 33 s in the queue, before 6 starts; 1 of 7 began anew, which cost 1 min 21 s: "
        "the queue, starting and saving"
    )


def test_several_workers_of_one_job_keep_their_own_figures(command):
    command("sacct", TEXTS["22.05"])
    both = [use(0), use(0)]
    assert with_accounting(both, ["1"], SINCE)[0][:2] == both


def test_jobs_that_sacct_does_not_know(command):
    command("sacct", "")
    uses, source = with_accounting([use(0)], ["12"], SINCE)
    assert uses == [use(0)]
    assert source == f"{OUR_RECORDS}; sacct says nothing of these jobs"


def test_without_slurm_nobody_is_asked():
    assert with_accounting([use(None)], [], SINCE) == ([use(None)], OUR_RECORDS)
    assert costs([use(None)]) is None

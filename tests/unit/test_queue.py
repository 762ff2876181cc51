"""What SLURM's commands print, in the words of several versions, and what is made of it."""

import math
import os
from datetime import datetime

import pytest

from search.errors import InputError
from search.slurm import job as job_module
from search.slurm.commands import SlurmError
from search.slurm.job import own_job
from search.slurm.queue import Tasks, jobs, probe_liveness, task_states
from search.slurm.script import about_environment
from search.slurm.submit import check_script, submit_script
from storage.liveness import Holder

# As these versions of squeue printed it: of an array a task that ended with code 3, one that is at work
# and one that waits, and a job without a time limit that waits.
RECORDED = {
    "22.05.8": """\
3|FAILED|768|0|1795724588|1|0|
1|PENDING|0|0|N/A|1|2|
2|PENDING|0|0|N/A|2|N/A|
4|RUNNING|0|0|1795724649|1|1|
""",
    "24.11.5": """\
3|FAILED|3:0|0|1795724227|1|0|
1|PENDING|0:0|0|1795724348|1|2|
2|PENDING|0:0|0|N/A|2|N/A|
4|RUNNING|0:0|0|1795724288|1|1|
""",
    "25.11.2": """\
3|FAILED|3:0|0|1795724527|1|0|
1|PENDING|0:0|0|1795724648|1|2|
2|PENDING|0:0|0|N/A|2|N/A|
4|RUNNING|0:0|0|1795724588|1|1|
""",
    "26.05.5": """\
3|FAILED|3:0|0|1795724537|1|0|
1|PENDING|0:0|0|1795724658|1|2|
2|PENDING|0:0|0|N/A|2|N/A|
4|RUNNING|0:0|0|1795724598|1|1|
""",
}


def test_why_tasks_wait(command):
    waits = "4|PENDING|0:0|0|N/A|4|{}|{}|\n"
    reasons = ["Resources", "JobArrayTaskLimit", "JobArrayTaskLimit", "None", "ReqNodeNotAvail, n1"]
    works = "9|RUNNING|0:0|0|1795724648|4|5|None|\n"
    command("squeue", "".join(waits.format(*one) for one in enumerate(reasons)) + works)
    tasks = task_states(["4"])
    assert tasks.states == {"PENDING": 5, "RUNNING": 1}
    assert tasks.pending == {"Resources": 1, "JobArrayTaskLimit": 2, "ReqNodeNotAvail, n1": 1}


@pytest.mark.parametrize("recorded", RECORDED.values(), ids=RECORDED)
def test_what_the_versions_print(command, recorded):
    command("squeue", recorded)
    listing = jobs(["1", "2"])
    assert listing.strange is None
    ended, waits, endless, works = listing.jobs
    assert (ended.state, ended.exit_code, ended.array, ended.task) == ("FAILED", 3, "1", "0")
    assert (waits.state, waits.exit_code, waits.array, waits.task) == ("PENDING", 0, "1", "2")
    assert (endless.state, endless.end, endless.array, endless.task) == ("PENDING", math.inf, "2", "")
    assert (works.state, works.number, works.restarts) == ("RUNNING", "4", 0)
    assert 1.79e9 < works.end < 1.80e9
    assert task_states(["1", "2"]) == Tasks({"RELEASED": 1, "PENDING": 2, "RUNNING": 1})


OWN = "7|RUNNING|0:0|0|1795505788|7|N/A|"
FOREIGN = "This cluster is down on Monday.\n"


def holder(job="5", restarts=0, cluster="here"):
    return Holder("w", "another-machine:ns:1:1", cluster, job, restarts)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (f"{OWN}\n5|RUNNING|0:0|0|1|", True),
        (f"{OWN}\n5|RUNNING|0|0|1|", True),  # 22.05
        (f"{OWN}\n5|RUNNING|?|0|?|?|?|and more|", True),  # what is not needed spoils nothing
        (f"{OWN}\n5|RUNNING|0:0|0|", True),
        (f"{FOREIGN}{OWN}\n5|RUNNING|0:0|0|1|", True),
        (f"CLUSTER: here\n{OWN}\n5|RUNNING|0:0|0|1|", True),
        (f"{OWN}\n5|RUNNING+SIGNALING|0:0|0|1|", True),
        (f"{OWN}\n5|SUSPENDED|0:0|0|NONE|", True),
        (f"{OWN}\n5|RUNNING|0:0|1|1|", False),  # its id has begun anew
        (f"{OWN}\n5|PENDING|0:0|1|NONE|", False),
        (f"{OWN}\n5|COMPLETING|0:0|1|1|", None),  # it may be saving its work
        (f"{OWN}\n5|CANCELLED+COMPLETING|0:15|1|1|", None),
        (f"{OWN}\n5|FAILED,COMPLETING|1:0|0|1|", None),
        (f"{OWN}\n5|CONFIGURING|0:0|0|1|", None),
        (f"{OWN}\n5|CANCELLED|0:0|0|1|", False),
        (f"{OWN}\n5|CANCELLED by 1000|0:15|0|1|", False),
        (f"{OWN}\n5|NODE_FAIL|0:0|0|1|", False),
        (f"{OWN}\n5|OUT_OF_MEMORY|0:125|0|1|", False),
        (f"{OWN}\n5|REQUEUE_HOLD|0:0|0|1|", False),
        (f"{OWN}\n5|SOMETHING_NEW|0:0|0|1|", None),  # not understood
        (f"{OWN}\n5||0:0|0|1|", None),
        (f"{OWN}\n5|RUNNING|0:0|many|1|", None),
        (f"{OWN}\n5|FAILED|0:0|many|1|", False),
        (OWN, False),  # forgotten
        (f"{FOREIGN}{OWN}", None),  # perhaps forgotten, perhaps the line above
        ("", None),  # not even our own job: it hides jobs
        ("5|RUNNING|0:0|0|1|", None),
        (FOREIGN, None),
        ("\udcff\udcfe|".encode("utf-8", "surrogatepass").decode("latin-1"), None),
    ],
)
def test_what_slurm_says_of_a_holder(command, answer, verdict):
    command("squeue", answer + "\n")
    assert probe_liveness([holder()]).get("w") is verdict


@pytest.mark.parametrize(
    "answer",
    [FOREIGN, f"{OWN}\n5|SOMETHING_NEW|0:0|0|1|", f"{OWN}\n5|RUNNING|0:0|many|1|", f"{FOREIGN}{OWN}"],
)
def test_what_is_not_understood_is_said(command, answer, caplog):
    command("squeue", answer + "\n")
    assert probe_liveness([holder()]) == {}
    assert "not understood" in caplog.text


def test_one_bad_row_spoils_no_other(command):
    command("squeue", f"{OWN}\n5|SOMETHING_NEW|0:0|0|1|\n6|RUNNING|0:0|0|1|\n")
    other = Holder("v", "another-machine:ns:2:2", "here", "6", 0)
    assert probe_liveness([holder(), other]) == {"v": True}


def test_a_requeued_task_does_not_vouch_for_its_predecessor(command):
    command("squeue", f"{OWN}\n5|RUNNING|0:0|1|1|\n")
    before, now = holder(restarts=0), Holder("v", "another-machine:ns:2:2", "here", "5", 1)
    assert probe_liveness([before, now]) == {"w": False, "v": True}


def test_without_an_answer_the_lease_decides(command, monkeypatch):
    command("squeue", "", 1, "slurm_load_jobs error: Unable to contact slurm controller")
    assert probe_liveness([holder()]) == {}
    command("squeue", f"{OWN}\n5|CANCELLED|0:0|0|1|\n")
    assert probe_liveness([holder(cluster="there")]) == {}  # another cluster's job 5
    assert probe_liveness([holder(cluster=None)]) == {}  # a process that is not the job
    monkeypatch.setenv("PATH", "/nowhere")
    assert probe_liveness([holder()]) == {}
    monkeypatch.delenv("SLURM_JOB_ID")
    assert probe_liveness([holder()]) == {}


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("1795505788", 1795505788.0),
        ("2026-11-26T20:06:02", datetime(2026, 11, 26, 20, 6, 2).timestamp()),
        ("NONE", None),
        ("N/A", None),
    ],
)
def test_when_the_own_job_ends(command, text, end):
    command("squeue", f"7|RUNNING|0:0|0|{text}|7|N/A|\n")
    assert own_job().end == end


@pytest.mark.parametrize(
    ("answer", "code", "error"),
    [
        ("7|RUNNING|0:0|0|soon|7|N/A|\n", 0, ""),
        (FOREIGN, 0, ""),
        ("\n\n", 0, "squeue: error: Invalid job format specification: exit_code\n"),
        ("", 1, "slurm_load_jobs error: Unable to contact slurm controller\n"),
        ("", 1, "slurm_load_jobs error: Invalid job id specified\n"),
    ],
)
def test_the_end_that_slurmd_knows_serves_too(command, answer, code, error, monkeypatch, caplog):
    command("squeue", answer, code, error)
    assert own_job().end is None
    assert "SLURM does not say" in caplog.text
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1795505788")  # from SLURM 23.11 on
    assert own_job().end == 1795505788.0


@pytest.mark.parametrize(
    "error",
    [
        "Unable to contact slurm controller (connect failure)",
        "Socket timed out on send/recv operation",
        "Zero Bytes were transmitted or received",
    ],
)
def test_a_busy_controller_is_asked_again(command, error):
    asked = command("squeue", "", 1, f"slurm_load_jobs error: {error}\n")
    own_job()
    assert len(asked.read_text().splitlines()) == job_module.TRIES


def test_an_answer_that_is_one_is_not_waited_for(command):
    asked = command("squeue", "", 1, "slurm_load_jobs error: Invalid job id specified\n")
    own_job()
    command("squeue", "\n\n", 0, "squeue: error: Invalid job format specification: exit_code\n")
    own_job()
    assert len(asked.read_text().splitlines()) == 2


def test_outside_slurm_there_is_no_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert own_job() is None


def test_a_job_is_what_slurm_says_and_not_what_came_along(command, monkeypatch):
    """The environment of the job from which it was submitted: another array, another count."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))
    command("squeue", "7|RUNNING|0:0|0|N/A|7|N/A|\n")
    requeued = command("scontrol", "")
    job = own_job()
    assert job.columns() == {"slurm_job": "7", "slurm_restarts": 0, "slurm_cluster": "here"}
    assert job.requeue()
    assert requeued.read_text() == "requeue 7\n"


def test_a_task_is_requeued_by_its_name(command, monkeypatch):
    """One task of an array has the array's own id, which would requeue all of them."""
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))
    command("squeue", "7|RUNNING|0:0|2|N/A|7|3|\n")
    requeued = command("scontrol", "")
    job = own_job()
    assert job.columns() == {
        "slurm_job": "7",
        "slurm_restarts": 2,
        "slurm_cluster": "here",
        "slurm_array_job": "7",
        "slurm_array_task": "3",
    }
    assert job.requeue()
    assert requeued.read_text() == "requeue 7_3\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (1, "Invalid job id specified for job 7\n"),
        (1, "Requested operation is presently disabled for job 7\n"),
        (0, "7_3: Job is no longer pending execution\n"),
    ],
)
def test_a_requeue_that_was_refused_is_none(command, code, error, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))
    command("squeue", OWN + "\n")
    command("scontrol", "", code, error)
    assert not own_job().requeue()
    assert "not requeued" in caplog.text
    assert error.strip() in caplog.text


@pytest.mark.parametrize(
    ("variable", "value"), [("SLURM_TASK_PID", "1"), ("SLURM_STEP_ID", "0"), ("SLURM_JOB_ID", None)]
)
def test_what_is_not_the_job_requeues_none(command, variable, value, monkeypatch):
    """A command in the shell of a job, a step of one, and no job at all."""
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    command("squeue", OWN + "\n")
    requeued = command("scontrol", "")
    job = own_job()
    assert job is None or not job.requeue()
    assert job is None or "slurm_cluster" not in job.columns()
    assert not requeued.exists()


@pytest.mark.parametrize("rest", ["", "7|", "7||", "7|?|", "?|3|"])
def test_a_job_that_is_not_known_is_not_requeued(command, monkeypatch, rest):
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "2")
    command("squeue", f"7|RUNNING|0:0|0|N/A|{rest}\n")
    requeued = command("scontrol", "")
    assert not own_job().requeue()
    assert not requeued.exists()


def test_tasks_are_counted_by_state(command):
    command(
        "squeue",
        "5|RUNNING|0:0|0|1|\n6|RUNNING|0:0|0|1|\n4|PENDING|0:0|0|N/A|\n4|PENDING|0:0|0|N/A|\n"
        "8|FAILED|1:0|0|1|\n9|FAILED|3:0|0|1|\n10|FAILED|4:0|0|1|\n11|FAILED|0:9|0|1|\n12|FAILED|?|0|1|\n",
    )
    assert task_states(["4"]) == Tasks({"RUNNING": 2, "PENDING": 2, "FAILED": 3, "RELEASED": 2})
    command("squeue", "", 1, "slurm_load_jobs error: Invalid job id specified")
    assert task_states(["4"]) == Tasks({})
    assert task_states([]) == Tasks({})


def test_arrays_of_clusters_are_asked_for_where_they_are(command):
    """4711 of another cluster is a stranger's job here."""
    asked = command("squeue", "CLUSTER: gpucluster\n4711|PENDING|0:0|0|N/A|\n")
    assert task_states(["4711;gpucluster"]).states == {"PENDING": 1}
    assert "--clusters=gpucluster" in asked.read_text()
    asked.unlink()
    assert task_states(["12"]).states == {"PENDING": 1}
    assert "--clusters" not in asked.read_text()


@pytest.mark.parametrize("bad", ["sbatch: welcome\n17", "", "x", "-1", "12 34"])
def test_a_bad_id_on_record_hides_no_other_array(command, bad):
    asked = command("squeue", "4|RUNNING|0:0|0|N/A|\n")
    tasks = task_states([bad, "4"])
    assert tasks.states == {"RUNNING": 1}
    assert "is no id of a job" in tasks.problem
    assert "--jobs=4 " in asked.read_text()


def test_what_squeue_did_not_say_is_no_count(command):
    command("squeue", FOREIGN)
    tasks = task_states(["4"])
    assert tasks.states is None
    assert "squeue of slurm 99.11.1 answered what is not understood" in tasks.problem
    assert "down on Monday" in tasks.problem


@pytest.mark.parametrize(
    ("printed", "id_"),
    [
        ("4711\n", "4711"),
        ("4711;gpucluster\n", "4711;gpucluster"),
        ("sbatch: lua: your quota is 90 % used\n4711\n", "4711"),
        ("Welcome to 2 clusters\n\n  4711 \n\n", "4711"),
    ],
)
def test_the_id_of_a_submitted_job(command, printed, id_):
    command("sbatch", printed)
    assert submit_script("#!/bin/bash\n") == id_


@pytest.mark.parametrize(
    "printed",
    ["", "Submitted batch job\n", "job 4711 is in the queue\n", "42\n4711\n", "99999999999999999999\n"],
)
def test_a_submission_without_an_id_is_said(command, printed):
    command("sbatch", printed)
    with pytest.raises(InputError, match=r"not understood.*squeue --me"):
        submit_script("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("submits", "advice"), [(check_script, r"change the \[slurm"), (submit_script, "squeue --me")]
)
def test_what_sbatch_refuses_is_quoted_in_one_line(command, submits, advice):
    command("sbatch", "", 1, "sbatch: error: Batch job submission failed:\n Invalid qos\n")
    with pytest.raises(InputError, match=f"submission failed: . Invalid qos; .*{advice}") as error:
        submits("#!/bin/bash\n")
    assert "\n" not in str(error.value)


def environment_of(path):
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)


SCRIPT = "#!/bin/bash\n#SBATCH --time=8:00:00\n#SBATCH -A lab\n"


def test_sbatch_gets_nothing_that_would_beat_the_profile(command, tmp_path, monkeypatch):
    """Nor what another job has left there, as the new one would take it for its own."""
    given = {
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_ARRAY_JOB_ID": "3",
        "SLURM_MEM_PER_CPU": "100",
        "SBATCH_TIMELIMIT": "00:01:00",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_ACCOUNT": "other",  # the script has one
        "SBATCH_PARTITION": "gpu",  # the script leaves it open
        "BASH_FUNC_module%%": "() {  echo loaded; }",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    command("sbatch", "4711\n")
    submit_script(SCRIPT)
    seen = environment_of(tmp_path / "sbatch.environment")
    slurms = {name for name in seen if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))}
    assert slurms == {"SLURM_CONF", "SBATCH_PARTITION"}
    assert seen["BASH_FUNC_module%%"].startswith("() {")
    told = "\n".join(about_environment(SCRIPT))
    assert "sbatch gets SBATCH_PARTITION=gpu" in told
    assert "does not get SBATCH_ACCOUNT, SBATCH_EXPORT, SBATCH_NO_REQUEUE, SBATCH_TIMELIMIT" in told


@pytest.mark.parametrize(
    ("line", "left_open"),
    [
        ("--mem=12G", True),
        ("--partition=a100", False),
        ("--partition a100", False),
        ("-pa100", False),
        ("-N1 --partition=a100", False),
        ("-N 1 -p a100", False),
        ("--part=a100", False),
    ],
)
def test_what_a_script_says_itself_is_not_left_open(monkeypatch, line, left_open):
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    told = "\n".join(about_environment(f"#!/bin/bash\n#SBATCH {line}\n"))
    assert ("sbatch gets SBATCH_PARTITION=gpu" in told) is left_open


def test_without_slurm_it_is_said_where_to_go(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"no sbatch on this machine.*login node"):
        check_script("#!/bin/bash\n")
    with pytest.raises(SlurmError, match="no squeue"):
        jobs(["1"])

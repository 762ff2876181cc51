"""What `atelier doctor` asks of SLURM: whether it is there and answers, and what it allows."""

import re
from collections.abc import Iterator
from functools import partial

from search.doctor.check import Check, ask, not_asked, note, ok, wrong
from search.slurm.commands import NoClusterError, SilenceError, SlurmError
from search.slurm.environment import job_id
from search.slurm.job import KILL_SECONDS
from search.slurm.script import array_script
from search.slurm.site import COMMANDS, absent_commands, configuration
from search.slurm.submit import check_script
from search.study_config import StudyConfig

LEAST_ARRAY = 8  # tasks of the array that `submit` asks for by default


def slurm(file: StudyConfig | None = None, profile: str = "", given: bool = False) -> Iterator[Check]:
    """SLURM's commands, its answer, its settings that matter, and whether it takes a study's jobs.

    `given` tells whether somebody named the profile.
    """
    absent = absent_commands()
    if len(absent) == len(COMMANDS):
        yield not_asked("slurm", "no SLURM here")
        return
    if absent:
        yield wrong("slurm", f"no {', '.join(absent)} on this machine", "use a login node, or mend PATH")
        return
    try:
        settings = configuration()
    except NoClusterError:
        yield not_asked(
            "slurm",
            "SLURM's commands are here, but no cluster",
            "a slurm.conf may be missing: set SLURM_CONF",
        )
        return
    except SilenceError as error:
        yield wrong("slurm", str(error), "try again; ask the site whether slurmctld is up")
        return
    except SlurmError as error:
        yield wrong("slurm", str(error), "report this line as an issue")
        return
    name = settings.get("ClusterName", "without a name")
    yield ok("slurm", f"{settings['version']}, cluster {name}")
    yield _array(settings)
    yield _requeue(settings)
    yield _kill_wait(settings)
    yield _accounting(settings)
    if file is not None:
        yield from ask("job", partial(_job, file, profile, given))


def _number(name: str, settings: dict[str, str]) -> int | None:
    found = re.match(r"\d+", settings.get(name, ""))
    return int(found[0]) if found else None


def _unknown(check: str, name: str, settings: dict[str, str]) -> Check:
    return not_asked(check, f"{name} = {settings.get(name, 'absent')!r} is not understood")


def _array(settings: dict[str, str]) -> Check:
    most = _number("MaxArraySize", settings)
    if most is None:
        return _unknown("arrays", "MaxArraySize", settings)
    if most < 2:
        return wrong("arrays", f"MaxArraySize = {most}: no arrays here", "ask the site for arrays")
    found = f"task numbers up to {most - 1} (MaxArraySize = {most})"
    if most < LEAST_ARRAY:
        return wrong("arrays", found, f"submit with --array 0-{most - 1}, or ask the site for more")
    return ok("arrays", found)


def _requeue(settings: dict[str, str]) -> Check:
    allowed = _number("JobRequeue", settings)
    if allowed is None:
        return _unknown("requeue", "JobRequeue", settings)
    if allowed:
        return ok("requeue", "allowed (JobRequeue = 1)")
    remedy = "give the same submit again if a study's tasks have ended with code 4"
    return note("requeue", "jobs are not requeued by default (JobRequeue = 0); ours ask for it", remedy)


def _kill_wait(settings: dict[str, str]) -> Check:
    seconds = _number("KillWait", settings)
    if seconds is None:
        return _unknown("signals", "KillWait", settings)
    found = f"SIGKILL comes {seconds} s after SIGTERM (KillWait)"
    if seconds < KILL_SECONDS:
        remedy = "give a longer `warning` in [slurm.*]: it comes before SIGTERM"
        return note("signals", f"{found}; a worker plans with {KILL_SECONDS:.0f}", remedy)
    return ok("signals", found)


def _accounting(settings: dict[str, str]) -> Check:
    kind = settings.get("AccountingStorageType", "(null)")
    none = kind in ("(null)", "accounting_storage/none")
    return ok("accounting", "none, and none is needed" if none else kind)


def _job(file: StudyConfig, profile: str, given: bool) -> Iterator[Check]:
    """Whether SLURM would take a job of this profile."""
    if job_id():
        yield not_asked("job", "this is a job")
    elif profile not in file.slurm and not given:
        yield not_asked("job", f"the study file has no [slurm.{profile}]", "name another with --profile")
    else:
        check_script(array_script(file, profile, "0", []))
        yield ok("job", f"sbatch accepts the profile {profile}")

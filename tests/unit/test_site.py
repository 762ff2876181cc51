"""What is made of a site: accounts, QOS, groups, nodes that are away, and answers nobody understands.

tests/cluster/test_init.py asks real SLURMs, and tests/cluster/test_accounting.py one with accounting.
What sacctmgr prints here has the form of SLURM 22.05 and 24.11, which is the same.
"""

import math
import os

import pytest

from search.errors import InputError
from search.init import draft_for_machine, draft_for_site
from search.slurm.commands import SlurmError
from search.slurm.site import Limits, Nodes, read_site, tightest
from search.toml_file import READY, load_study_file

CONFIG = """Configuration data as of 2026-11-28T09:17:41
AccountingStorageEnforce = {enforce}
AccountingStorageType   = {accounting}
ClusterName             = atelier
JobRequeue              = {requeue}
MaxArraySize            = {array}
MaxMemPerNode           = UNLIMITED
SLURM_VERSION           = 23.11.4
"""
DEFAULTS = {"enforce": "none", "accounting": "accounting_storage/slurmdbd", "requeue": 1, "array": 1001}
PARTITION = (
    "PartitionName={name} AllowGroups={groups} AllowAccounts={accounts} AllowQos={allow_qos} "
    "AllocNodes=ALL Default={default} QoS={qos} DefaultTime=NONE MaxCPUsPerNode=UNLIMITED "
    "MaxTime={time} Nodes=n RootOnly=NO State=UP DefMemPerNode=UNLIMITED {memory}"
)
ORDINARY = {"groups": "ALL", "accounts": "ALL", "allow_qos": "ALL", "qos": "N/A"}
ORDINARY |= {"memory": "MaxMemPerNode=UNLIMITED"}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Makes SLURM's commands print a site. sbatch refuses a script that has none of `needs`."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(os, "geteuid", lambda: 65534)  # root may use every partition
    monkeypatch.chdir(tmp_path)

    def make(partitions, nodes, associations="", qos="", above="", needs="", **config):
        texts = {
            "config": CONFIG.format(**DEFAULTS | config),
            "partition": "\n".join(
                PARTITION.format(name=name, default="YES" if not n else "NO", **ORDINARY | values)
                for n, (name, values) in enumerate(partitions.items())
            ),
            "sinfo": nodes,
            "user": "lab\n",
            "user=": above,
            "user=nobody": associations,
            "qos": qos,
        }
        for name, text in texts.items():
            (tmp_path / f"{name}.text").write_text(text)
        scripts = {
            "scontrol": ("config", "partition"),
            "sacctmgr": ("user", "user=", "user=nobody", "qos"),
            "sinfo": ("sinfo",),
        }
        for command, words in scripts.items():
            lines = [f'[ "$word" = {word} ] && cat {tmp_path}/{word}.text' for word in words]
            text = "\n".join(["#!/bin/bash", 'for word in sinfo "$@"; do', *lines, "done; true"])
            (tmp_path / command).write_text(text)
        (tmp_path / "sbatch").write_text(
            f'#!/bin/bash\ngrep -qEe "{needs}" && echo "sbatch: Job 1 to start" >&2 && exit\n'
            "echo 'allocation failure: Invalid account or partition' >&2; exit 1\n"
        )
        for command in (*scripts, "sbatch"):
            (tmp_path / command).chmod(0o755)

    return make


GPUS = "gpu|4|idle|64|512000|gpu:a100:4(S:0-1)\n"
# Recorded from a slurmdbd, which was set up much as in tests/cluster/test_accounting.py.
ASSOCIATIONS = """\
root||normal||atelier||||||||
guests||idle||atelier||||||||
vision||gpu,idle|idle|atelier|02:00:00|||||cpu=2,mem=1500M||
"""
ABOVE = """\
root||atelier|||
guests|root|atelier|||
lab|root|atelier|||cpu=5
vision|lab|atelier|||
"""
QOS = """\
normal|||||||||||||
gpu||03:00:00||||5|||||gres/gpu=2||
idle|||||||||||||gres/gpu=0
"""


def account(name, qos, first="", cluster="atelier", **limits):
    """A row of `sacctmgr show associations`."""
    names = (
        "wall",
        "running",
        "all_running",
        "submitted",
        "all_submitted",
        "tres",
        "node_tres",
        "all_tres",
    )
    return "|".join([name, "", qos, first, cluster, *(limits.get(one, "") for one in names)]) + "\n"


def tuning(**options):
    """The drafted [slurm.tuning]."""
    given = {"partition": None, "account": None} | options
    return draft_for_site(None, {}, **given).config.slurm["tuning"]


def test_one_account_and_its_default_qos_are_written(slurm):
    slurm({"gpu": {"time": "1-00:00:00"}}, GPUS, account("lab", "normal,long", "normal"))
    draft = draft_for_site(None, {}, None, None)
    profile = draft.config.slurm["tuning"]
    assert (profile.account, profile.qos, profile.partition) == ("lab", "normal", "gpu")
    [line] = [line for line in draft.text.splitlines() if line.startswith("qos")][:1]
    assert line.endswith("# also allowed here: long")
    assert draft.array == "0-7%4"


def test_the_default_account_comes_first_but_only_where_it_may_pay(slurm):
    accounts = (
        account("rich", "normal") + account("lab", "normal") + account("x", "n", cluster="elsewhere")
    )
    partitions = {"gpu": {"time": "12:00:00"}, "long": {"time": "UNLIMITED", "accounts": "rich"}}
    slurm(partitions, GPUS + GPUS.replace("gpu|", "long|"), accounts)
    assert [one.account for one in read_site().associations] == ["lab", "rich"]
    assert tuning().account == "lab"
    assert tuning(partition="long").account == "rich"
    with pytest.raises(InputError, match="it is for the accounts rich; give another one"):
        tuning(partition="long", account="lab")
    with pytest.raises(InputError, match="no partition of this site is for you"):
        tuning(account="mine")


def test_limits_of_account_and_qos_hold_where_slurm_enforces_them(slurm):
    accounts = account("lab", "gpu", "gpu", wall="04:00:00", submitted="6", all_running="9")
    qos = "gpu||02:00:00|||||||||cpu=64,gres/gpu=2||\npart||01:30:00|||||||||||\n"
    partitions = {"gpu": {"time": "12:00:00", "qos": "part"}}
    slurm(partitions, GPUS, accounts, qos, enforce="associations,limits,qos")
    draft = draft_for_site(None, {}, None, None)
    assert draft.config.slurm["tuning"].time == "01:30:00"
    assert "your account or QOS: up to 1 h 30 min" in draft.text
    assert draft.array == "0-5%2"
    slurm(partitions, GPUS, accounts, qos.replace("gpu||", "gpu|OverPartQOS|"), enforce="safe")
    assert tuning().time == "02:00:00"
    slurm(partitions, GPUS, accounts, qos, enforce="associations,qos")
    assert tuning().time == "08:00:00"


ENFORCED = {"enforce": "associations,limits,qos"}


def test_what_a_slurmdbd_says_of_accounts(slurm):
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, ASSOCIATIONS, QOS, ABOVE, **ENFORCED)
    site = read_site()
    assert site.notes == []
    limits = {one.account: tightest(one.stated) for one in site.associations}
    assert limits["root"] == Limits()
    assert limits["vision"] == Limits(seconds=7200, cpus=2, memory=1500, all_cpus=5)
    assert {name: tightest(stated) for name, stated in site.qos.items()} == {
        "normal": Limits(),
        "gpu": Limits(seconds=10800, submitted=5, all_gpus=2),
        "idle": Limits(all_gpus=0),
    }
    draft = draft_for_site(None, {}, None, "vision")
    profile = draft.config.slurm["tuning"]
    assert (profile.qos, profile.time, profile.cpus, profile.memory) == ("gpu", "03:00:00", 2, "1G")
    assert draft.array == "0-4%2"
    with pytest.raises(InputError, match="your account lets no job of it use GPUs"):
        draft_for_site(None, {}, None, "guests")


@pytest.mark.parametrize("limit", [{"submitted": "0"}, {"tres": "cpu=0"}, {"all_tres": "mem=0"}])
def test_an_account_that_is_closed_by_a_limit(slurm, limit):
    rows = account("lab", "normal", **limit) + account("rich", "normal")
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, rows, **ENFORCED)
    assert tuning().account == "rich"


def test_limits_of_resources_in_sacctmgrs_words(slurm):
    rows = account("lab", "normal", tres="cpu=4,node=1", node_tres="mem=2.50T", all_tres="mem=9G")
    above = "lab|up|atelier|||gres/gpu:a100=3,gres/gpu=5,mem=1T\nup|lab|atelier|2|7|billing=9\n"
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, rows, "normal|||||||||||||\n", above, **ENFORCED)
    [one] = read_site().associations
    expected = {"cpus": 4, "memory": 2.5 * (1 << 20), "all_memory": 9 << 10, "all_gpus": 3}
    assert tightest(one.stated) == Limits(running=2, submitted=7, **expected)
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, account("lab", "normal", tres="mem=1500"), **ENFORCED)
    assert tightest(read_site().associations[0].stated) == Limits(memory=1500)
    for odd in ("cpu=many", "mem=lots", "mem=", "gres/gpu=-1", "cpu", "cpu=", "=4", "cpu=4;mem"):
        slurm({"gpu": {"time": "12:00:00"}}, GPUS, rows.replace("cpu=4", odd), **ENFORCED)
        site = read_site()
        assert (site.associations, site.without_account) == ([], None)
        assert "accounts and QOS are not known" in site.notes[0]


def qos_row(name, **limits):
    """A row of `sacctmgr show qos`."""
    names = ("wall", "running_pu", "running_pa", "all_running", "submitted_pu", "submitted_pa")
    names += ("all_submitted", "tres", "node_tres", "tres_pu", "tres_pa", "all_tres")
    return "|".join([name, "", *(limits.get(one, "") for one in names)]) + "\n"


@pytest.mark.parametrize(
    ("of_account", "of_qos", "starts"),
    [
        ({"all_tres": "gres/gpu=0"}, {"tres_pu": "gres/gpu=2"}, False),
        ({"all_tres": "gres/gpu=0"}, {"all_tres": "gres/gpu=2"}, True),
        ({"running": "0"}, {"running_pu": "9"}, True),
        ({"running": "0"}, {"all_running": "9"}, False),
        ({"tres": "cpu=0"}, {"node_tres": "cpu=4"}, False),
        ({"tres": "cpu=0"}, {"tres": "cpu=4"}, True),
    ],
)
def test_a_limit_of_a_qos_replaces_only_the_same_one_of_the_account(slurm, of_account, of_qos, starts):
    """As a slurmctld of 22.05 did: the other jobs waited with AssocGrpGRES, AssocMax…."""
    rows = account("lab", "normal", **of_account) + account("rich", "normal")
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, rows, qos_row("normal", **of_qos), **ENFORCED)
    assert tuning().account == ("lab" if starts else "rich")


def test_limits_of_the_account_and_of_a_user_of_its_qos_hold_both(slurm):
    rows = account("lab", "normal", all_tres="gres/gpu=1", all_running="7")
    qos = qos_row("normal", tres_pu="gres/gpu=2,cpu=9", running_pu="3")
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, rows, qos, **ENFORCED)
    draft = draft_for_site(None, {}, None, None)
    assert (draft.array, draft.config.slurm["tuning"].cpus) == ("0-7%1", 7)


def test_memory_is_that_of_the_cpus_which_the_account_allows(slurm):
    """SLURM would raise the CPUs over the account's limit, and the job would wait for ever."""
    partitions = {"gpu": {"time": "12:00:00", "memory": "MaxMemPerCPU=2000"}}
    slurm(partitions, GPUS, account("lab", "normal", tres="cpu=2"), **ENFORCED)
    draft = draft_for_site(None, {}, None, None)
    profile = draft.config.slurm["tuning"]
    assert (profile.cpus, profile.memory) == (2, "3G")
    assert "# the most that gpu allows for its 2 CPUs" in draft.text


@pytest.mark.parametrize(("asked", "given"), [("0", "125G"), ("500K", "1M"), ("3000", "3000M")])
def test_memory_of_a_study_in_each_form_of_slurm(tmp_path, slurm, asked, given):
    slurm({"gpu": {"time": "12:00:00"}}, GPUS)
    text = (READY / "fashion-cpu.toml").read_text() + f'\n[slurm.tuning]\nmemory = "{asked}"\n'
    (tmp_path / "mine.toml").write_text(text)
    draft = draft_for_site(tmp_path / "mine.toml", {}, None, None)
    assert draft.config.slurm["tuning"].memory == given


def test_a_study_without_gpus_may_use_an_account_without_gpus(tmp_path, slurm):
    rows = account("lab", "normal", all_tres="gres/gpu=0")
    slurm({"mixed": {"time": "12:00:00"}}, GPUS.replace("gpu|", "mixed|", 1), rows, **ENFORCED)
    with pytest.raises(InputError, match="your account lets no job of it use GPUs"):
        tuning()
    written = (READY / "fashion-cpu.toml").read_text() + "\n[slurm.tuning]\ngpus = 0\n"
    (tmp_path / "mine.toml").write_text(written)
    profile = draft_for_site(tmp_path / "mine.toml", {}, None, None).config.slurm["tuning"]
    assert (profile.account, profile.partition, profile.gpus) == ("lab", "mixed", 0)


def test_accounts_above_are_asked_for_only_where_limits_hold(slurm):
    rows = account("lab", "normal")
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, rows, above="no row of it\n", enforce="associations")
    assert read_site().notes == []
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, rows, above="no row of it\n", **ENFORCED)
    assert "accounts and QOS are not known" in read_site().notes[0]


def test_a_user_without_an_account(slurm):
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, **ENFORCED)
    with pytest.raises(InputError, match=r"SLURM has no account for nobody, .* add user nobody"):
        tuning()
    slurm({"gpu": {"time": "12:00:00"}}, GPUS)  # where accounts are kept, but nobody has to have one
    draft = draft_for_site(None, {}, None, None)
    assert "note: SLURM has no account for nobody" in draft.found
    assert draft.config.slurm["tuning"].account is None


def test_a_qos_that_a_partition_wants_is_written_instead_of_the_default(slurm):
    accounts = account("lab", "normal,gpu", "normal")
    slurm({"gpu": {"time": "12:00:00", "allow_qos": "gpu,other"}}, GPUS, accounts)
    assert tuning().qos == "gpu"


def test_the_users_habits_for_sbatch_come_first(slurm, monkeypatch):
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, account("lab", "normal,high,low", "low"))
    assert tuning().qos == "low"
    monkeypatch.setenv("SBATCH_QOS", "high")
    assert tuning().qos == "high"


def test_a_partition_for_a_group_is_for_its_members(slurm):
    partitions = {"secret": {"time": "UNLIMITED", "groups": "no-such-group"}, "gpu": {"time": "9:00:00"}}
    slurm(partitions, GPUS + GPUS.replace("gpu|", "secret|"))
    assert tuning().partition == "gpu"
    with pytest.raises(InputError, match="it is for the groups no-such-group"):
        tuning(partition="secret")


@pytest.mark.parametrize(
    ("needs", "expected"), [("gpu:a100:1", {"gpus": "a100:1"}), ("--account=rich", {"account": "rich"})]
)
def test_what_sbatch_refuses_is_adjusted(slurm, needs, expected):
    accounts = account("lab", "normal") + account("rich", "normal")
    slurm({"gpu": {"time": "12:00:00"}}, GPUS, accounts, needs=needs)
    draft = draft_for_site(None, {}, None, None)
    for profile in draft.config.slurm.values():
        assert expected.items() <= profile.model_dump().items()
    assert any("note: refused in gpu: " in line for line in draft.found)


def test_half_a_share_if_a_whole_one_is_refused(slurm):
    slurm({"gpu": {"time": "12:00:00"}}, "gpu|1|idle|8|24000|gpu:1\n", needs="--mem=11G")
    draft = draft_for_site(None, {}, None, None)
    assert (draft.config.slurm["final"].cpus, draft.config.slurm["final"].memory) == (4, "11G")
    assert "SLURM refused more" in draft.text


def test_the_default_partition_is_taken_if_it_has_gpus_and_time_enough(slurm):
    partitions = {"gpu": {"time": "08:00:00"}, "long": {"time": "UNLIMITED"}}
    nodes = GPUS + GPUS.replace("gpu|", "long|")
    slurm(partitions, nodes)
    assert tuning().partition == "gpu"
    slurm(partitions | {"gpu": {"time": "07:59:00"}}, nodes)
    assert tuning().partition == "long"
    slurm(partitions, nodes.replace("gpu|4|idle|", "gpu|4|drained*|"))
    assert tuning().partition == "long"


def test_nodes_in_the_words_of_sinfo(slurm):
    slurm(
        {"gpu": {"time": "12:00:00"}},
        "gpu|3|mixed$|64|512000|gpu:a100:4(S:0-1),nvme:1\n"
        "gpu|1|idle*|64|512000|gpu:a100:4\n"
        "gpu|1|down~|64+|512000+|gpu:2\n"
        "gpu|2|idle|8|16000|(null)\n"
        "gpu|0|n/a|0|0|(null)\n"
        "gpu|1|enchanted|8|16000|gpu:1\n"
        "gpu|1|idle|8|16000|gpu:a:b:c\n"
        "The cluster is down on Monday.\n",
    )
    site = read_site()
    [gpu] = site.partitions
    assert gpu.nodes == (
        Nodes(3, True, 64, 512000, {"a100": 4}),
        Nodes(1, False, 64, 512000, {"a100": 4}),
        Nodes(1, False, 64, 512000, {"": 2}),
        Nodes(2, True, 8, 16000, {}),
    )
    assert gpu.gpus == {"a100": 12}
    assert sum("not understood" in note for note in site.notes) == 3
    draft = draft_for_site(None, {}, None, None)
    assert sum("not understood" in line for line in draft.found) == 3
    assert draft.config.slurm["tuning"].gpus == 1


def test_what_is_not_understood_is_said(slurm, tmp_path):
    slurm({"gpu": {"time": "12:00:00"}, "odd": {"time": "a while"}}, GPUS, "lab|one|field less\n")
    site = read_site()
    assert [one.name for one in site.partitions] == ["gpu"]
    assert [one.seconds for one in site.partitions] == [12 * 3600]
    assert "a while" in site.notes[0]
    assert "accounts and QOS are not known" in site.notes[1]
    assert site.partitions[0].memory == math.inf
    (tmp_path / "config.text").write_text("nothing of the kind\n")
    with pytest.raises(SlurmError, match="not understood"):
        read_site()
    with pytest.raises(InputError, match="by hand"):
        draft_for_site(None, {}, None, None)


def test_a_site_that_does_not_requeue_unasked_and_one_of_small_arrays(slurm):
    slurm({"cpu": {"time": "UNLIMITED"}}, "cpu|4|idle|4|8000|(null)\n", requeue=0, array=2)
    draft = draft_for_site(None, {}, None, None)
    assert draft.config.study.name == "fashion-cpu"
    assert "which this site does not do unasked" in draft.text
    assert draft.array == "0-1%2"
    profile = draft.config.slurm["tuning"]
    assert (profile.gpus, profile.cpus, profile.memory) == (0, 4, "7G")


def test_a_study_keeps_its_lines_and_gets_other_slurm_tables(tmp_path, slurm, demo):
    slurm({"gpu": {"time": "12:00:00"}}, GPUS)
    load = tmp_path / "mine.toml"
    load.write_text(
        "[slurm.tuning]\nqos = 'of another site'\ncpus = 3\nsetup = ['module load x']\n\n# My search.\n"
        "[study]\nname = 'mine'  # a comment\nmax_trials = 3\n\n[space]\nlr = [1e-3, 2e-3]\n\n"
        "[train]\ndata = 'x'\nbackbone = 'test_resnet'\nweights = 'none'\ntrain_images = 4000\n"
    )
    draft = draft_for_site(load, {"data": str(demo)}, None, None)
    assert "# My search.\n[study]\nname = 'mine'  # a comment\n" in draft.text
    assert draft.config.slurm.keys() == {"tuning"}
    assert any("setup and options of [slurm.tuning] are left out" in line for line in draft.found)
    profile = draft.config.slurm["tuning"]
    assert (profile.qos, profile.cpus, profile.partition) == (None, 3, "gpu")
    assert draft.config.shared.data == str(demo)
    assert draft.config.shared.train_images == 300  # it has no more
    again = tmp_path / "again.toml"
    again.write_text(draft.text)
    assert draft_for_site(again, {}, None, None).text == draft.text.replace("mine.toml", "again.toml")


def test_a_file_for_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    draft = draft_for_machine(None, {"weights": 'a "b".safetensors'})
    (tmp_path / "study.toml").write_text(draft.text)
    config = load_study_file(tmp_path / "study.toml")
    assert (config.study.name, config.shared.weights) == ("fashion-cpu", 'a "b".safetensors')
    assert not config.slurm
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert draft_for_machine(None, {}).config.study.name == "fashion"

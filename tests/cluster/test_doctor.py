"""`atelier doctor` on a real SLURM: what it allows, and the same questions asked on a node."""

import json


def test_a_node_answers_beside_the_login_node(campaign):
    study = campaign(trials=1, epochs=1, time="5")
    study.atelier("db", "upgrade")
    rows = json.loads(study.atelier("doctor", "study.toml", "--on-node", "--json", code=None))["checks"]
    wrong = [row for row in rows if row["state"] == "wrong" and row["name"] != "disk"]
    assert wrong == []
    last = {row["name"]: row for row in rows}
    for name in ("slurm", "arrays", "requeue", "signals", "accounting", "database", "db schema"):
        assert last[name]["state"] == "ok", last[name]
    for name in ("same folder", "same python", "same packages", "same clock"):
        assert last[name]["state"] == "ok", last[name]
    places = list(dict.fromkeys(row["where"] for row in rows))
    assert len(places) == 3
    there = {row["name"]: row for row in rows if row["where"] == places[1]}
    assert there["db schema"]["state"] == there["weights"]["state"] == "ok"
    assert there["job"]["found"] == "this is a job"

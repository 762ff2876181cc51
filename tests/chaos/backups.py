"""Backups of a search that goes on, each restored elsewhere and finished there.

    python -m tests.chaos.backups --rounds 20 [--seed N]

Eight workers search. Again and again, at a random moment, `atelier db backup` is called; its archive is
read by other means than ours, restored into an empty home with a PostgreSQL of its own, and searched to
its end by two other workers, while those of the first search stand still. Then the rules of
search/verify judge it.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from storage.embedded import EmbeddedPostgres
from tests.chaos.checker import References
from tests.chaos.harness import SERVER_DISK, scene, small_disk
from tests.chaos.search import STUDY, Search, Stopwatch, begin_imports

WORKERS = (("a", "1"),) * 8
FINISHERS = (("a", "4"),) * 2
RESTORED_DISK = "8g"  # at most: all files and a server of its own
EXTRA_TRIALS = 2  # that are begun after the restore


def atelier(environment: dict[str, str], *words: str) -> None:
    subprocess.run([sys.executable, "-m", "atelier_command", *words], env=environment, check=True)


def wrong_digests(archive: Path) -> list[str]:
    """Members that are not what the manifest, the last of them, says."""
    with tarfile.open(archive) as tar:
        *members, last = tar.getmembers()
        wanted = {
            name: one["sha256"] for name, one in json.load(tar.extractfile(last))["members"].items()
        }
        found = {
            member.name: hashlib.sha256(tar.extractfile(member).read()).hexdigest() for member in members
        }
    return [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]


def finish(archive: Path, home: Path, study: Path, references: References) -> dict[str, Any]:
    """Restore a backup into an empty home, end its search, and judge it."""
    watch = Stopwatch()
    # Without a URL, as on a machine that has no database yet.
    alone = {name: text for name, text in os.environ.items() if name != "ATELIER_DATABASE_URL"}
    atelier(alone | {"ATELIER_HOME": str(home)}, "db", "restore", str(archive))
    watch.lap("restore")
    server = EmbeddedPostgres(home)
    try:
        search = Search(archive.with_suffix(".logs"), study, home, server.acquire(), FINISHERS)
        begun = search.trials("state = 'RUNNING'")
        try:
            search.end(EXTRA_TRIALS)
        finally:
            search.close()
        watch.lap("end")
        evidence, found = search.judge(references)
        watch.lap("judgement")
    finally:
        server.stop()
    return {
        "trials": len(evidence.trials),
        "of them in the middle": begun,
        "violations": found,
        "seconds": watch.seconds,
    }


def back_up_and_finish(search: Search, archive: Path, study: Path, references: References) -> None:
    """One round. Ends the program if something does not hold."""
    watch = Stopwatch()
    atelier(search.places[0].host.environment, "db", "backup", str(archive))
    watch.lap("backup")
    for place in search.places:
        place.signal(signal.SIGSTOP)
    with small_disk(archive.with_suffix(".home"), RESTORED_DISK) as home:
        result = finish(archive, home, study, references)
        result["wrong digests"] = wrong_digests(archive)
        result["seconds"] |= watch.seconds
        print(json.dumps({"backup": archive.stem} | result), flush=True)
        if result["violations"] or result["wrong digests"]:
            sys.exit(f"violations; the workers' logs and all else are in {archive.parent}")
    for place in search.places:
        place.signal(signal.SIGCONT)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    begin_imports()
    moment = random.Random(arguments.seed)
    with scene() as (folder, data), small_disk(folder / "server", SERVER_DISK):
        references = References(folder / "references")
        study = folder / "chaos.toml"
        study.write_text(STUDY.format(name=study.stem, data=data, checkpoint_seconds=0))
        server = EmbeddedPostgres(folder / "server")
        search = Search(folder / "logs", study, folder / "home", server.acquire(), WORKERS)
        try:
            search.begin()
            while search.trials() < len(WORKERS):
                time.sleep(0.1)
            for number in range(arguments.rounds):
                time.sleep(moment.uniform(0, 2))
                archive = folder / f"{number}.tar"
                back_up_and_finish(search, archive, study, references)
                archive.unlink()
                search.tend()
        finally:
            search.close()
            server.stop()
    print(f"{arguments.rounds} backups, every digest right, every search finished")


if __name__ == "__main__":
    main()

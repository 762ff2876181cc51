"""How long the dashboard's pages take, and how much they send, with many trials of 30 epochs each.

    python -m benchmarks.dashboard [--trials 1000] [--trials 10000]

The server is a real `atelier dashboard` on an embedded PostgreSQL in a temporary folder. Each page is
asked for 3 times to warm up, and then 40 times. The table has the median and the 95th percentile of the
40, and the bytes sent. The last column compares the median with that of optuna-dashboard's own study
data. The same server is asked for that at every fourth turn. The page of images has 1,000 of them. Their
small copies are not counted.
"""

import argparse
import http.client
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlencode

from benchmarks.server import temporary_home
from dashboards.web.accounts import Accounts
from storage import database
from storage.status import read_status
from storage.studies import study_entry
from tests.studies import fill, predict
from trainer.dataset import read_dataset
from trainer.demo import write_demo

PAGES = ["", "/curves", "/curves?top=40&smooth=50", "/compare?by=dropout", "/trials/7", "/images"]
WARM_UP, REQUESTS = 3, 40
STATES = ["complete"] * 30 + ["pruned"] * 65 + ["failed"] * 3 + ["waiting", "running"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, action="append")
    sizes = parser.parse_args().trials or [1000, 10000]
    with temporary_home() as home:
        measure(sizes, home / "demo")


def measure(sizes: list[int], data: Path) -> None:
    write_demo(data, train=1, val=1000, test=1)
    dataset, engine = read_dataset(data), database.connect()
    studies = {}
    for size in sizes:
        states = random.Random(0).choices(STATES, k=size)
        study = studies[size] = fill(engine, states, name=f"{size} trials", data=data)
        entry = study_entry(engine, study)
        for row in read_status(engine, study, entry.name).completed()[:1]:
            predict(entry, row.number, dataset, seed=0)
    engine.dispose()
    Accounts().put("vera", "viewer", "correct horse battery")
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "atelier_command", "dashboard", "--port", str(port)]
    )
    try:
        cookie = log_in(port)
        print(" trials page                         median      p95     bytes  of optuna-dashboard's")
        for size, study in studies.items():
            for page in PAGES:
                ours, theirs = [], []
                for turn in range(WARM_UP + REQUESTS):
                    answer = ask(port, cookie, f"/atelier/studies/{study}{page}")
                    if turn >= WARM_UP:
                        ours.append(answer)
                    if turn % 4 == 0:
                        theirs.append(ask(port, cookie, f"/api/studies/{study}"))
                times = sorted(seconds for seconds, _ in ours)
                middle = statistics.median(times)
                ratio = middle / statistics.median(seconds for seconds, _ in theirs)
                print(
                    f"{size:>7} {page or '(study)':<26} {middle * 1000:>5.0f} ms "
                    f"{times[int(0.95 * len(times))] * 1000:>5.0f} ms {ours[0][1]:>9,} {ratio:>20.2f}"
                )
    finally:
        server.terminate()
        server.wait()


def log_in(port: int) -> str:
    form = urlencode({"name": "vera", "password": "correct horse battery"})
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    for _ in range(300):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.request("POST", "/login", form, headers)
            return str(connection.getresponse().getheader("Set-Cookie")).split(";")[0]
        except OSError:
            time.sleep(0.2)
        finally:
            connection.close()
    raise SystemExit("the dashboard did not start")


def ask(port: int, cookie: str, path: str) -> tuple[float, int]:
    """Send one request. Returns its seconds and the bytes of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    start = time.perf_counter()
    connection.request("GET", path, headers={"Cookie": cookie, "Accept-Encoding": "gzip"})
    response = connection.getresponse()
    size = len(response.read())
    seconds = time.perf_counter() - start
    connection.close()
    assert response.status == 200, response.status
    return seconds, size


if __name__ == "__main__":
    main()

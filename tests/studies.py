"""Studies of any size, written straight into the database instead of trained for days."""

import math
from datetime import UTC, datetime, timedelta

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.distributions import CategoricalDistribution, FloatDistribution, distribution_to_json
from optuna.storages._rdb.models import TrialIntermediateValueModel, TrialModel

from storage import optuna_storage, recording, schema, studies
from storage.optuna_tables import (
    PARAMS,
    VALUES,
    TrialState,
)
from storage.paths import RunFolder
from storage.tables import ATTEMPTS, EPOCHS, WORKERS
from trainer.config import ARITHMETIC
from trainer.images import READER
from trainer.predictions import Predictions

SPACE = {
    "lr": FloatDistribution(1e-4, 1e-2, log=True),
    "batch_size": CategoricalDistribution([64, 128, 256]),
    "weight_decay": FloatDistribution(1e-4, 1e-2, log=True),
    "dropout": FloatDistribution(0.15, 0.6),
    "epsilon": FloatDistribution(1e-4, 2e-2, log=True),
}
CATEGORIES = {"texture": 7, "sleeve": 3, "length": 3, "neckline": 4, "fabric": 6, "fit": 3}
# Columns of the table of epochs that differ from run to run.
MAY_DIFFER = {"attempt", "recorded", "seconds", "peak_memory", "again", *recording.UNKNOWN}
ATTRIBUTES = [
    {"name": f"{category}_{index}", "category": category, "images": 9 + 41 * index}
    for category, size in CATEGORIES.items()
    for index in range(size)
]
STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
    "waiting": TrialState.RUNNING,
}


def open_storage(engine):
    """Optuna's storage on a database that may have no tables yet."""
    schema.ensure_tables(engine)
    return optuna_storage.optuna_storage(engine)


def fill(engine, states, epochs=30, name="filled", max_trials=None, log=None, data="nowhere"):
    """Write a study with one trial per entry of `states`. Returns Optuna's id of it."""
    storage = open_storage(engine)
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    study_id = study._study_id
    studies.enter_study(
        engine,
        study_id,
        max_trials=max_trials or len(states),
        max_gpu_seconds=None,
        settings={
            "study": {"score": "mean-last-5"},
            "images": {"reader": READER},
            "arithmetic": {"version": ARITHMETIC},
            "train": {"epochs": epochs, "warmup_epochs": 0, "backbone": "resnet10t"},
            "space": {
                name: list(one.choices)
                if isinstance(one, CategoricalDistribution)
                else {"low": one.low, "high": one.high, "log": one.log}
                for name, one in SPACE.items()
            },
            "places": {"data": str(data), "weights": "none"},
        },
        dataset="f" * 64,
        attributes=ATTRIBUTES,
    )
    tables = {model: [] for model in (PARAMS, VALUES, TrialIntermediateValueModel, ATTEMPTS, EPOCHS)}
    now = datetime.now(UTC)
    worker = f"worker of {name}"
    random = np.random.default_rng(0)
    with engine.begin() as connection:
        connection.execute(
            sa.insert(WORKERS).values(
                id=worker,
                host="node-1",
                pid=77,
                process="elsewhere:1:1",
                gpu="A100",
                log=log,
                slurm_job="12",
                slurm_array_job="12",
                slurm_array_task="3",
            )
        )
        query = sa.insert(TrialModel).returning(TrialModel.trial_id, sort_by_parameter_order=True)
        rows = [
            {"number": number, "study_id": study_id, "state": STATES[state]}
            for number, state in enumerate(states)
        ]
        ids = list(connection.scalars(query, rows)) if rows else []
        for number, (trial, state) in enumerate(zip(ids, states, strict=True)):
            quality = random.random()
            length = {"complete": epochs, "pruned": max(epochs // 5, 1), "failed": 1}.get(
                state, epochs // 3
            )
            begin = now - timedelta(hours=len(states) - number)
            end = begin + timedelta(minutes=2 * length)
            tables[PARAMS] += [_param(trial, key, d, random) for key, d in SPACE.items()]
            accuracy = 0.0
            for epoch in range(length):
                row = _epoch(trial, study_id, epoch, quality, random)
                accuracy = row["val_accuracy"]
                tables[EPOCHS].append(row)
                tables[TrialIntermediateValueModel].append(
                    {
                        "trial_id": trial,
                        "step": epoch,
                        "intermediate_value": accuracy,
                        "intermediate_value_type": "FINITE",
                    }
                )
            if state in ("complete", "pruned"):
                tables[VALUES].append(
                    {
                        "trial_id": trial,
                        "objective": 0,
                        "value": accuracy,
                        "value_type": "FINITE",
                    }
                )
            tables[ATTEMPTS] += _attempts(trial, study_id, worker, state, begin, end, now)
        for model, some in tables.items():
            if some:
                connection.execute(sa.insert(model), some)
    return study_id


def predict(entry, trial, dataset, seed):
    """Write what a complete trial may have predicted of a dataset's validation images: Predictions."""
    random, labels = np.random.default_rng(seed), dataset.split("val").labels
    guesses = random.integers(0, dataset.sizes, labels.shape)
    classes = np.where(random.random(labels.shape) < 0.6, labels, guesses)
    predictions = Predictions(
        labels.astype(np.uint8),
        classes.astype(np.uint8)[np.newaxis],
        np.log(random.uniform(0.01, 0.99, (1, *labels.shape))).astype(np.float16),
        np.ones(1, np.int32),
        np.arange(len(labels), dtype=np.int32),
    )
    predictions.save(RunFolder(entry.name, entry.created).predictions(trial))
    return predictions


def _param(trial, name, distribution, random):
    if isinstance(distribution, CategoricalDistribution):
        value = int(random.integers(len(distribution.choices)))
    else:
        low, high = distribution.low, distribution.high
        value = float(np.exp(random.uniform(math.log(low), math.log(high))))
    return {
        "trial_id": trial,
        "param_name": name,
        "param_value": value,
        "distribution_json": distribution_to_json(distribution),
    }


def _epoch(trial, study_id, epoch, quality, random):
    value = 0.25 + (0.2 + 0.2 * quality) * (1 - math.exp(-epoch / 6)) + random.normal(0, 0.008)
    train = value + 0.01 * epoch * (0.5 + quality) / 2
    return {
        "trial_id": trial,
        "study_id": study_id,
        "epoch": epoch,
        "stream_epoch": epoch,
        "value": value,
        "attempt": 1,
        "lr": 0.005 * math.cos(epoch / 30 * math.pi / 2),
        "train_loss": 1.6 - train,
        "val_loss": 1.6 - value,
        "train_accuracy": train,
        "val_accuracy": value,
        "val_overall": value + 0.05,
        "val_category": [value + random.normal(0, 0.05) for _ in CATEGORIES],
        "val_hits": [round(row["images"] * value) for row in ATTRIBUTES],
        "val_log_loss": 1.6 - value,
        "seconds": 60.0,
        "images": 5000,
        "peak_memory": 4e9,
    }


def _attempts(trial, study_id, worker, state, begin, end, now):
    row = {
        "trial_id": trial,
        "number": 1,
        "study_id": study_id,
        "worker_id": worker,
        "claimed": begin,
        "renewed": end,
        "lease_until": end + timedelta(seconds=120),
        "released": end,
        "outcome": state,
        "reason": None,
    }
    reasons = {
        "pruned": "pruned after 6 epochs",
        "failed": "Traceback (most recent call last):\nValueError: x",
    }
    if state in reasons:
        return [row | {"reason": reasons[state]}]
    if state == "complete":
        return [row]
    given_back = row | {"outcome": "released", "reason": "SIGTERM"}
    if state == "waiting":
        return [given_back]
    held = {
        "number": 2,
        "claimed": end,
        "renewed": now,
        "lease_until": now + timedelta(hours=1),
        "released": None,
        "outcome": None,
    }
    return [given_back, row | held]

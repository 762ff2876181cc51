"""What storage/optuna_tables.py knows of Optuna's tables, against Optuna itself."""

import math
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.storages._rdb.models import BaseModel, TrialIntermediateValueModel, TrialValueModel

from storage.optuna_tables import OPTUNAS_TABLES, TrialState, parameter, stored


def type_of(column):
    """A column's type, so far as it matters for reading and writing. An enumeration is text."""
    for known in (sa.Integer, sa.Float, sa.DateTime, sa.String):
        if isinstance(column.type, known):
            return known
    raise AssertionError(column.type)


def test_the_tables_are_optunas_parents_first():
    ours = {
        table.name: {column.name: type_of(column) for column in table.columns}
        for table in OPTUNAS_TABLES
    }
    theirs = {
        table.name: {column.name: type_of(column) for column in table.columns}
        for table in BaseModel.metadata.sorted_tables
    }
    assert ours == theirs
    seen = set()
    for name in ours:
        table = BaseModel.metadata.tables[name]
        assert {key.column.table.name for key in table.foreign_keys} <= seen
        assert next(iter(ours[name])) == next(iter(table.primary_key)).name
        seen.add(name)


def test_the_states_are_optunas():
    ours = {state.name: state.is_finished() for state in TrialState}
    assert ours == {state.name: state.is_finished() for state in optuna.trial.TrialState}


@pytest.mark.parametrize("value", [0.0, -1.5, 1e308, math.inf, -math.inf, math.nan])
def test_a_value_is_stored_as_optuna_stores_it(value):
    number, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
    assert stored(value) == (number, kind.name)
    if not math.isnan(value):
        number, kind = TrialValueModel.value_to_stored_repr(value)
        assert stored(value) == (number, kind.name)


@pytest.mark.parametrize(
    ("distribution", "value"),
    [
        (FloatDistribution(1e-5, 1.0, log=True), 0.125),
        (FloatDistribution(0.0, 1.0, step=0.25), 0.75),
        (IntDistribution(0, 2**32 - 1), 2**32 - 1),
        (IntDistribution(1, 64, log=True), 7),
        (CategoricalDistribution([64, 128, 256]), 128),
        (CategoricalDistribution([0.1, None, "gelu", True]), "gelu"),
        (CategoricalDistribution([0.1, None, "gelu", True]), None),
    ],
)
def test_a_parameter_has_the_value_that_optuna_gives_it(distribution, value):
    row = SimpleNamespace(
        param_value=float(distribution.to_internal_repr(value)),
        distribution_json=distribution_to_json(distribution),
    )
    given = distribution.to_external_repr(row.param_value)
    assert (parameter(row), type(parameter(row))) == (given, type(given))
    assert given == value

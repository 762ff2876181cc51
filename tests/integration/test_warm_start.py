"""A search that begins with what earlier ones have found."""

import optuna

SPACE = ("space.lr={ low = 1e-3, high = 1.5e-3 }", "space.batch_size=[64, 128]")


def add(worker, score, **params):
    """A complete trial."""
    space = worker.file.distributions()
    worker.study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=score))


def begin(worker, trials):
    """The parameters of that many new trials."""
    worker.ledger.register()
    held = []
    for _ in range(trials):
        held.append(worker.ledger.claim([claim.trial_id for claim in held]))
    return [worker._params(claim) for claim in held]


def test_a_search_begins_with_the_best_of_an_earlier_one_as_far_as_its_space_has_them(make_worker):
    earlier = make_worker("study.max_trials=99")
    for score, lr in ((0.3, 1.1e-3), (0.5, 1.9e-3), (0.6, 1.2e-3), (0.4, 1.3e-3)):
        add(earlier, score, lr=lr, batch_size=64 if score == 0.4 else 32)
    settings = ('study.name="next"', "study.max_trials=99", 'study.warm_start=["tiny"]', *SPACE)
    worker = make_worker(*settings)
    params = begin(worker, 4)
    assert [one["lr"] for one in params[:3]] == [1.2e-3, 1.5e-3, 1.3e-3]
    assert params[2]["batch_size"] == 64
    assert all(one["batch_size"] in (64, 128) for one in params)
    # What it begins with is on record: a worker that comes later does not look again.
    add(earlier, 0.9, lr=1.4e-3, batch_size=32)
    assert make_worker(*settings).study.sampler._first == worker.study.sampler._first


def test_given_points_come_before_those_of_earlier_studies(make_worker):
    add(make_worker("study.max_trials=99"), 0.5, lr=1.2e-3, batch_size=32)
    own = "study.first=[{ lr = 1.7e-3 }]"
    worker = make_worker('study.name="next"', "study.max_trials=9", own, 'study.warm_start=["tiny"]')
    assert [one["lr"] for one in begin(worker, 2)] == [1.7e-3, 1.2e-3]

"""A search that begins with what earlier ones have found."""

from tests.integration.test_ledger import complete_trial

SPACE = (
    "space.lr={ low = 1e-3, high = 1.5e-3 }",
    "space.batch_size=[64, 128]",
    "space.dropout={ low = 0.0, high = 0.5 }",  # which the earlier one held fixed
)
NEXT = ('study.name="next"', "study.max_trials=99", 'study.warm_start=["tiny"]')


def add(worker, score, **params):
    worker.ledger.register()
    complete_trial(worker.ledger, worker.study_config, params, score)


def begin(worker, trials):
    """The parameters of that many new trials."""
    worker.ledger.register()
    held = []
    for _ in range(trials):
        held.append(worker.ledger.claim([claim.trial_id for claim in held]))
    return [worker.claims.sample(claim) for claim in held]


def test_a_search_begins_with_the_best_of_an_earlier_one_as_far_as_its_space_has_them(make_worker):
    earlier = make_worker("study.max_trials=99")
    for score, lr in ((0.3, 1.1e-3), (0.6, 1.2e-3), (0.5, 1.9e-3), (0.5, 1.8e-3), (0.4, 1.3e-3)):
        add(earlier, score, lr=lr, batch_size=64 if score == 0.4 else 32)
    worker = make_worker(*NEXT, *SPACE)
    params = begin(worker, 4)
    # Two of them are the same at the bound.
    assert [one["lr"] for one in params[:3]] == [1.2e-3, 1.5e-3, 1.3e-3]
    assert params[2]["batch_size"] == 64
    assert all(one["batch_size"] in (64, 128) for one in params)
    fixed = earlier.study_config.shared.dropout
    assert [one["dropout"] for one in params[:3]] == [fixed] * 3
    assert params[3]["dropout"] != fixed


def test_where_a_search_begins_is_on_record(make_worker):
    earlier = make_worker("study.max_trials=99")
    add(earlier, 0.5, lr=1.2e-3, batch_size=32)
    worker = make_worker(*NEXT)
    add(earlier, 0.9, lr=1.4e-3, batch_size=32)
    later = make_worker(*NEXT, "study.first=[{ lr = 1.1e-3 }]")
    assert later.study.sampler.first == worker.study.sampler.first
    assert begin(later, 1) == [{"lr": 1.2e-3, "batch_size": 32}]


def test_of_two_commands_that_make_a_study_at_once_the_first_says_where_it_begins(
    make_worker, monkeypatch
):
    add(make_worker("study.max_trials=99"), 0.5, lr=1.2e-3, batch_size=32)
    note = "dashboards.note.leave_note"

    def meanwhile(study):
        monkeypatch.setattr(note, lambda _: None)
        make_worker('study.name="next"', "study.max_trials=99", "study.first=[{ lr = 1.1e-3 }]")

    monkeypatch.setattr(note, meanwhile)
    worker = make_worker(*NEXT)
    assert worker.study.sampler.first == [{"lr": 1.1e-3}]


def test_given_points_come_first_and_are_not_tried_again(make_worker):
    earlier = make_worker("study.max_trials=99")
    for score, lr in ((0.5, 1.2e-3), (0.4, 1.7e-3)):
        add(earlier, score, lr=lr, batch_size=32)
    worker = make_worker(*NEXT, "study.first=[{ lr = 1.7e-3, batch_size = 32 }]")
    assert [one["lr"] for one in begin(worker, 2)] == [1.7e-3, 1.2e-3]
    assert len(worker.study.sampler.first) == 2

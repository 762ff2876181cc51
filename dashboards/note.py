"""The note that optuna-dashboard shows with a study: the way to our pages."""

import optuna
import optuna_dashboard


def leave_note(study: optuna.Study) -> None:
    """Write the note of a new study."""
    # Relative to /dashboard/studies/ID/note, so that it is right under a proxy's prefix too.
    pages = f"../../../atelier/studies/{study._study_id}"
    optuna_dashboard.save_note(
        study,
        f"Atelier's pages of this study: [progress and workers]({pages}), [curves]({pages}/curves), "
        f"[comparison by hyperparameter]({pages}/compare).\n\n"
        "A trial that is RUNNING here may wait for a worker, after an interruption: the pages say "
        "which.",
    )

"""Writes the note that optuna-dashboard shows with a study, with links to our pages."""

import optuna
import optuna_dashboard


def leave_note(study: optuna.Study) -> None:
    """Write the note of a new study."""
    # The links are relative to /dashboard/studies/ID/note, so they also work under a proxy's prefix.
    pages = f"../../../atelier/studies/{study._study_id}"
    optuna_dashboard.save_note(
        study,
        f"Atelier's pages of this study: [progress and workers]({pages}), [curves]({pages}/curves), "
        f"[comparison by hyperparameter]({pages}/compare).\n\n"
        "A trial that was interrupted and waits for a worker is RUNNING here. The pages show which "
        "trials wait.",
    )

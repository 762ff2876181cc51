"""The web application: optuna-dashboard and Atelier's pages behind one login."""

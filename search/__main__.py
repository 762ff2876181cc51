"""`python -m search`: the `atelier` command."""

from search.cli import main

main()

"""`python -m search`: the `atelier` command."""

from search.cli import main

if __name__ == "__main__":  # processes that are forked import it too
    main()

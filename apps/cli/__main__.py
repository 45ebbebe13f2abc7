"""`python -m draftloom.apps.cli`: the same as `draftloom`."""

from .app import main

if __name__ == "__main__":
    main()

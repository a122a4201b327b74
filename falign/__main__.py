"""``python -m falign``: the command line, as launchers of several processes call it."""

from falign.cli import main

if __name__ == "__main__":
    main()

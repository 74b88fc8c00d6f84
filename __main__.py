"""`python -m residua`: the command line, as `residua`."""

from residua.cli import main

if __name__ == "__main__":
    main(prog_name="residua")

"""`python -m perl COMMAND`: see perl/cli.py."""

from perl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""`srpo`: hand the command to a warm process when there is one, else run it here."""

import sys

from srpo import launch, warm


def main() -> None:
    """Console entry point. Imports nothing heavy until it is known that this process does the work."""
    argv = sys.argv[1:]
    launch.become_worker()
    code = None if launch.is_worker() else warm.hand_over(["srpo", *argv])
    if code is None:
        from srpo import cli

        code = cli.run(argv)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""`srpo`: hand the command to a warm process when there is one, else run it here."""

import sys

from srpo.runtime import distributed, fork_server


def main() -> None:
    """Console entry point. Imports nothing heavy until it is known that this process does the work."""
    argv = sys.argv[1:]
    distributed.become_worker()
    code = None if distributed.is_worker() else fork_server.hand_over(["srpo", *argv])
    if code is None:
        from srpo import cli

        code = cli.run(argv)
    sys.exit(code)


if __name__ == "__main__":
    main()

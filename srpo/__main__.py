"""The `srpo` command."""

import os
import sys

from srpo.runtime import distributed


def main() -> None:
    """Run a command: in the fork server if one runs, else in this process. Heavy imports come with the command."""
    argv = sys.argv[1:]
    distributed.become_worker()
    code = None
    if "SRPO_FORK_SERVER" in os.environ and not distributed.is_worker():
        from srpo.runtime import fork_server

        code = fork_server.submit(["srpo", *argv])
    if code is None:
        from srpo import cli

        code = cli.run(argv)
    sys.exit(code)


if __name__ == "__main__":
    main()

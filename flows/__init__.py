"""Prefect over DVC: schedules, retries, cancellation and artifacts. Nothing here computes."""

import sys

from srpo.runtime.extras import missing

# here, because every module of this package imports Prefect before it can say anything
if _line := missing("prefect"):
    print(f"srpo: error: `flows` {_line}", file=sys.stderr)
    sys.exit(2)

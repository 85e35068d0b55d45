"""Prefect flows over DVC stages: schedules, retries, cancellation and artifacts. They compute nothing."""

import sys

from srpo.runtime.extras import missing

# here, because every module of this package imports Prefect before it can say anything
if _line := missing("prefect"):
    print(f"srpo: error: `flows` {_line}", file=sys.stderr)
    sys.exit(2)

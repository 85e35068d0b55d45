"""The global concurrency limit `gpu`: how many stages may use a GPU at a time, over all flows of a Prefect server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from logging import Logger

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows.process import Stopped, stopping

LIMIT = "gpu"
ASK_SECONDS = 2.0
LEASE_SECONDS = 60  # the shortest: a slot held by a flow that was killed is free again after it


def ensure_limit() -> None:
    """Create the limit, of one slot, unless there is one: what needs more says `prefect gcl create gpu --limit N`."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):  # another flow was faster
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))


@contextlib.contextmanager
def slot(logger: Logger) -> Iterator[None]:
    """Hold a slot while the block runs, after waiting for it.

    It asks again and again by itself: Prefect's own waiting can't be interrupted from another thread.

    Raises:
        Stopped: the flow is being ended.
    """
    with contextlib.ExitStack() as stack:
        waits = False
        while True:
            try:
                stack.enter_context(concurrency(LIMIT, max_retries=0, lease_duration=LEASE_SECONDS))
                break
            except ConcurrencySlotAcquisitionError as error:
                if not _is_taken(error.__cause__):
                    raise
            if not waits:
                logger.info("Waiting for a slot of the concurrency limit `%s`", LIMIT)
                waits = True
            if stopping.wait(ASK_SECONDS):
                raise Stopped
        yield


def _is_taken(cause: BaseException | None) -> bool:
    return isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == httpx.codes.LOCKED

"""The global concurrency limit `gpu`: the number of stages that use a GPU at a time, over all flows of a server."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows.process import Stopped, stopping

LIMIT = "gpu"
POLL_SECONDS = 2.0
LEASE_SECONDS = 60  # the minimum; the slot of a killed flow is free after it
ACQUISITION = "ConcurrencySlotAcquisitionWithLeaseService"  # of Prefect: logs each slot that it did not get as an error


class _TakenSlots(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return ACQUISITION not in record.getMessage()


_taken_slots_filter = _TakenSlots()


def ensure_limit() -> None:
    """Create the limit with one slot unless it exists; `prefect gcl create gpu --limit N` makes a larger one."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):  # another flow has just created it
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))


@contextlib.contextmanager
def slot(logger: logging.Logger | logging.LoggerAdapter) -> Iterator[None]:
    """Wait for a slot and hold it while the block runs.

    Polls, because Prefect's own waiting can't be interrupted from another thread.

    Raises:
        Stopped: the flow is being stopped.
    """
    logging.getLogger("prefect._internal.concurrency").addFilter(_taken_slots_filter)  # errors are raised here, too
    with contextlib.ExitStack() as stack:
        logged = False
        while True:
            try:
                stack.enter_context(concurrency(LIMIT, max_retries=0, lease_duration=LEASE_SECONDS))
                break
            except ConcurrencySlotAcquisitionError as error:
                if not _is_taken(error.__cause__):
                    raise
            if not logged:
                logger.info("Waiting for a slot of the concurrency limit `%s`", LIMIT)
                logged = True
            if stopping.wait(POLL_SECONDS):
                raise Stopped
        yield


def _is_taken(cause: BaseException | None) -> bool:
    return isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == httpx.codes.LOCKED

"""Reasons for refusals, as messages of the contract and as statuses of calls.

RefusedError   an engine or agent refuses, with a Failure that gives the reason
"""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2

from hetis.v1.change_pb2 import ChangePhase
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.statuses import CODE_OF_REASON, REASON_PREFIX

DOMAIN = "hetis"
_NAMES = frozenset(ErrorReason.keys())
_DETAILS = "grpc-status-details-bin"


class RefusedError(Exception):
    """A request was refused and nothing changed. ``failure`` gives the reason."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def failure_of(reason: ErrorReason.ValueType, message: str, **metadata: object) -> Failure:
    return Failure(reason=reason, message=message, metadata={key: str(value) for key, value in metadata.items()})


def refusal(reason: ErrorReason.ValueType, message: str, **metadata: object) -> RefusedError:
    return RefusedError(failure_of(reason, message, **metadata))


def reason_name(failure: Failure) -> str:
    """Return the name of a failure's reason as in ``ErrorInfo.reason``, without the prefix."""
    known = failure.reason in ErrorReason.values()
    return ErrorReason.Name(failure.reason).removeprefix(REASON_PREFIX) if known else str(failure.reason)


def phase_name(phase: int) -> str:
    """Return the name of a change's phase without the prefix."""
    return ChangePhase.Name(ChangePhase.ValueType(phase)).removeprefix("CHANGE_PHASE_")


def stale_epoch(epoch: int, newest: int) -> Failure:
    why = f"epoch {epoch} is over: {newest} was already accepted"
    return failure_of(ErrorReason.ERROR_REASON_STALE_EPOCH, why, epoch=epoch, newest_epoch=newest)


def generation_mismatch(base: int, generation: int) -> Failure:
    why = f"the change builds on generation {base}, the state here is of generation {generation}"
    mismatch = ErrorReason.ERROR_REASON_GENERATION_MISMATCH
    return failure_of(mismatch, why, base_generation=base, generation=generation)


def unreachable(message: str) -> Failure:
    return failure_of(ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE, message)


def status_of(failure: Failure) -> status_pb2.Status:
    """Return the status, with ErrorInfo, of a call that fails with this failure."""
    code = CODE_OF_REASON.get(failure.reason, grpc.StatusCode.FAILED_PRECONDITION)
    status = status_pb2.Status(code=code.value[0], message=failure.message)
    reason, metadata = reason_name(failure), dict(failure.metadata)
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain=DOMAIN, reason=reason, metadata=metadata))
    return status


def failure_of_call(error: grpc.aio.AioRpcError) -> Failure:
    """Return the failure in a failed call's ErrorInfo if it is ours, else what the status code means."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                found = error_details_pb2.ErrorInfo()
                if detail.Unpack(found) and found.domain == DOMAIN and REASON_PREFIX + found.reason in _NAMES:
                    known = ErrorReason.Value(REASON_PREFIX + found.reason)
                    return failure_of(known, error.details() or found.reason, **found.metadata)
    reason = {
        grpc.StatusCode.UNIMPLEMENTED: ErrorReason.ERROR_REASON_ENGINE_CANNOT,
        grpc.StatusCode.NOT_FOUND: ErrorReason.ERROR_REASON_NOT_FOUND,
        grpc.StatusCode.UNAVAILABLE: ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED: ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE,
        grpc.StatusCode.CANCELLED: ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE,
    }.get(error.code(), ErrorReason.ERROR_REASON_INTERNAL)
    return failure_of(reason, f"{error.code().name}: {error.details() or 'no message'}")

"""Which requests run and which wait, in what order. The only place a request's status changes, so that status and
queue cannot disagree. Knows nothing of blocks, adapters or budgets."""

from bisect import insort

from server.engine.request import Request, RequestStatus


class RequestQueues:
    """Every request that has not ended, by id and in one of two queues.

    `running` is in order of arrival. `waiting` has the preempted requests first, by arrival, then those that never
    ran in the order they were added.
    """

    def __init__(self) -> None:
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self.waiting.append(request)

    def start(self, request: Request) -> None:
        """WAITING or PREEMPTED → RUNNING."""
        self.waiting.remove(request)
        request.status = RequestStatus.RUNNING
        insort(self.running, request, key=_arrival)

    def preempt_latest(self) -> Request:
        """The running request that arrived last: RUNNING → PREEMPTED."""
        request = self.running.pop()
        request.status = RequestStatus.PREEMPTED
        insort(self.waiting, request, key=_preempted_first)
        return request

    def end(self, request: Request, status: RequestStatus) -> None:
        """Any → one of FINISHED_*."""
        (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(request)
        del self._requests[request.request_id]
        request.status = status

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is in exactly one queue, at its place, with its status."""
        queued = [*self.running, *self.waiting]
        assert len({id(request) for request in queued}) == len(queued), "a request is queued twice"
        assert {request.request_id: request for request in queued} == self._requests, "queues and requests differ"
        assert all(request.status is RequestStatus.RUNNING for request in self.running)
        assert self.running == sorted(self.running, key=_arrival), "running is not in order of arrival"
        assert all(request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) for request in self.waiting)
        assert self.waiting == sorted(self.waiting, key=_is_new), "a new request is ahead of a preempted one"


def _arrival(request: Request) -> float:
    return request.arrival_time


def _is_new(request: Request) -> bool:
    return request.status is RequestStatus.WAITING


def _preempted_first(request: Request) -> tuple[bool, float]:
    return _is_new(request), request.arrival_time

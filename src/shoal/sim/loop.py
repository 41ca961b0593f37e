"""An asyncio event loop without waiting: when nothing is ready, its clock jumps to the next timer.

Nothing outside of the process exists for it: no sockets, no threads, no wall clock. What is due at
the same time runs in the order in which it was asked for: the same program gives the same run.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import math
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar, TypeVarTuple, Unpack

OWNER: contextvars.ContextVar[str] = contextvars.ContextVar("owner", default="")

T = TypeVar("T")
Args = TypeVarTuple("Args")

# The clock stands on multiples of 2**-20 s, never before the time asked for: who sleeps until
# `heard + 0.9` finds at least 0.9 s gone. Rounded otherwise it could look, and sleep for nothing,
# for ever, since no time passes while code runs.
TICKS_PER_S = 1 << 20
_MANY_CANCELLED = 1000  # timers; from here on they are swept out when they outnumber the others
_SHOWN_TASKS = 12


class NothingLeft(RuntimeError):
    """All tasks wait and no timer is set: nothing can ever happen again."""


class OutOfTime(RuntimeError):
    """The virtual clock would pass its limit."""


def run(
    main: Callable[[], Coroutine[Any, Any, T]], *, limit_s: float = math.inf, start_s: float = 0.0
) -> T:
    """Run `main` in virtual time, from `start_s` on the clock.

    Raises NothingLeft, and OutOfTime when `main` has not ended by `limit_s` on that clock.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit_s, start_s)) as runner:
        return runner.run(main())


class VirtualLoop(asyncio.BaseEventLoop):
    """`time()` stands still while code runs.

    Whatever runs with `OWNER` set in its context belongs to that owner, and so do the tasks and
    timers that it starts. An owner can be stopped like a process: what falls due waits for it.
    """

    _ready: deque[asyncio.Handle]  # asyncio's own
    _stopping: bool

    def __init__(self, limit_s: float = math.inf, start_s: float = 0.0) -> None:
        super().__init__()
        self.limit_s = limit_s
        self._now = start_s
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = 0  # breaks ties between timers: first asked, first run
        self._cancelled = 0  # of the timers
        self._stopped: dict[str, deque[asyncio.Handle]] = {}

    def time(self) -> float:
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        when = math.ceil(when * TICKS_PER_S) / TICKS_PER_S
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._order += 1
        heapq.heappush(self._timers, (when, self._order, timer))
        return timer

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[Args]], object],
        *args: *Args,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """For Ctrl-C alone: there are no other threads."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: object, func: object, *args: object) -> NoReturn:
        raise RuntimeError(
            f"{getattr(func, '__qualname__', func)} wants a thread: in virtual time there are none"
        )

    def stop_owner(self, owner: str) -> None:
        """As SIGSTOP: nothing of it runs from now on."""
        self._stopped.setdefault(owner, deque())

    def continue_owner(self, owner: str) -> None:
        """As SIGCONT: it finds the clock advanced, and all at once what it has missed."""
        self._ready.extend(self._stopped.pop(owner, ()))

    def is_stopped(self, owner: str) -> bool:
        return owner in self._stopped

    # What asyncio calls.

    def _run_once(self) -> None:
        if not self._ready and not self._stopping:
            self._jump()
        timers, ready = self._timers, self._ready
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):  # what these add comes in the next turn
            handle = ready.popleft()
            if not handle.cancelled() and not (self._stopped and self._waits(handle)):
                handle._run()

    def _waits(self, handle: asyncio.Handle) -> bool:
        waiting = self._stopped.get(handle._context.get(OWNER, ""))  # type: ignore[attr-defined]
        if waiting is not None:
            waiting.append(handle)
        return waiting is not None

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._cancelled += 1  # also of those that have run: a sweep too many does no harm
        if self._cancelled > _MANY_CANCELLED and 2 * self._cancelled > len(self._timers):
            self._timers = [timer for timer in self._timers if not timer[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def _jump(self) -> None:
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not timers:
            raise NothingLeft(f"at {self._now:.3f} s nothing is left to happen: {self._waiting()}")
        if timers[0][0] > self.limit_s:
            raise OutOfTime(f"not done at {self.limit_s:.3f} s: {self._waiting()}")
        self._now = max(self._now, timers[0][0])

    def _waiting(self) -> str:
        names = sorted(_where(task) for task in asyncio.all_tasks(self))
        more = [f"and {len(names) - _SHOWN_TASKS} more"] if len(names) > _SHOWN_TASKS else []
        return "; ".join(names[:_SHOWN_TASKS] + more)


def _where(task: asyncio.Task[Any]) -> str:
    """Where a task waits: the innermost frames of its coroutine that are known."""
    frames = task.get_stack(limit=1)
    place = f"{frames[-1].f_code.co_qualname}:{frames[-1].f_lineno}" if frames else "done"
    return f"{task.get_name()} in {place}"

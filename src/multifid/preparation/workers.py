"""Processes that work for this one, so that cores are used and a crash of a library ends them, not us.

They are forked: they start at once, share what is loaded, and know the jobs by name. Each has a pipe of its own, so
that it is known what a process was doing when it died.
"""

import gc
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Call = tuple[Callable[..., Any], tuple[Any, ...]]
Job = Callable[..., Any]  # job(task, report)


class Event(NamedTuple):
    """What a worker says of a task: something on the way, or its result."""

    task: int  # number of the task
    done: bool
    value: Any


class Workers:
    """`count` processes. As a context manager it ends them, whatever they do.

    jobs: name -> function(task, report), where task is picklable and report(value) says how far it is.
    """

    def __init__(self, count: int, jobs: Mapping[str, Job]) -> None:
        context = get_context("fork")
        self._processes: dict[Connection, BaseProcess] = {}
        self.count = count
        jobs = {"call": lambda task, report: task[0](*task[1]), **jobs}
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, [*self._processes, here], jobs), daemon=True)
            process.start()
            there.close()
            self._processes[here] = process

    def run(self, job: str, tasks: Sequence[Any], name: Callable[[Any], str]) -> Iterator[Event]:
        """Do all tasks; events as they come. An exception of a task is raised here.
        name: what a task is called where it ends its process: a ValueError, or a ChildProcessError if that was killed.
        """
        left = list(enumerate(tasks))[::-1]
        busy: dict[Connection, int] = {}
        for pipe in self._processes:
            _give(pipe, job, left, busy)
        while busy:
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                number = busy[pipe]
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    raise self._death(pipe, name(tasks[number])) from None
                if kind == "error":
                    raise value
                if kind == "done":
                    del busy[pipe]
                    _give(pipe, job, left, busy)
                yield Event(number, kind == "done", value)

    def each(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What a function of a module makes of each of the arguments, in their order."""
        calls = [(function, own) for own in arguments]
        return _values(self.run("call", calls, lambda task: task[0].__name__), len(calls))

    def beside(self, calls: Sequence[Call], here: Callable[[], T]) -> tuple[list[Any], T]:
        """What functions of modules make of their arguments, and what is done here; by one worker after the former."""
        events = self.run("call", calls, lambda task: task[0].__name__)
        if self.count == 1:
            return _values(events, len(calls)), here()
        with ThreadPoolExecutor(1) as thread:  # it does nothing but wait for the workers
            there = thread.submit(_values, events, len(calls))
            done = here()
            return there.result(), done

    def _death(self, pipe: Connection, what: str) -> Exception:
        process = self._processes[pipe]
        process.join(5)
        code = process.exitcode or 0
        if code == -signal.SIGKILL:
            return ChildProcessError(f"{what}: the process that read it was killed, perhaps for want of memory")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ValueError(f"{what}: reading it ended the process ({how}): the file is damaged")

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
        for pipe, process in self._processes.items():
            process.join()
            pipe.close()


def _values(events: Iterator[Event], count: int) -> list[Any]:
    """The results, in the order of the tasks."""
    found: list[Any] = [None] * count
    for event in events:
        if event.done:
            found[event.task] = event.value
    return found


def _give(pipe: Connection, job: str, left: list[tuple[int, Any]], busy: dict[Connection, int]) -> None:
    if left:
        number, task = left.pop()
        busy[pipe] = number
        pipe.send((job, task))


def _serve(pipe: Connection, of_others: Sequence[Connection], jobs: Mapping[str, Job]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process decides
    gc.set_threshold(100_000)  # parsed records are many small objects without cycles: 2 to 13 % of reading
    for other in of_others:
        other.close()
    while True:
        try:
            job, task = pipe.recv()
            try:
                answer = ("done", jobs[job](task, lambda value: pipe.send(("report", value))))
            except Exception as error:
                answer = ("error", _portable(error))
            pipe.send(answer)
        except (EOFError, OSError):  # the first process is gone
            return


def _portable(error: Exception) -> Exception:
    """The error as it is, if any process knows its class, or what can be told of it."""
    if type(error).__module__ != "builtins":
        return RuntimeError("".join(traceback.format_exception(error)))
    error.add_note("".join(traceback.format_tb(error.__traceback__)))
    return error

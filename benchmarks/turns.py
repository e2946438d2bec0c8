"""Processes that are measured in turns, a few rounds each, so that all have the machine's speed of those seconds.

Two pipes with names for each: on `go` comes a line for every turn, on `done` goes one when it is over, and one before
the first. Whoever waits for its turn does nothing.
"""

import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

__all__ = ["ROUNDS", "conduct", "in_turns"]

ROUNDS = 10
"""Of one turn, after one that does not count: on a virtual machine, memory that has lain idle is slow at first. And a
fleet's last requests have nobody to hide behind: in short turns that shows."""
LOOK_SECONDS = 0.2


def in_turns(path: str | None, rounds: int) -> Iterator[int]:
    """How many rounds to go in each turn, as they come; all at once without a path. The consumer works meanwhile."""
    if path is None:
        yield rounds
        return
    with open(f"{path}.go") as go, open(f"{path}.done", "w") as done:
        done.write("ready\n")
        for begin in range(0, rounds, ROUNDS):
            done.flush()
            go.readline()
            yield min(ROUNDS, rounds - begin)
            done.write("over\n")


def conduct(folder: Path, rounds: int, calls: Sequence[Callable[..., dict]]) -> list[dict]:
    """What all return, each called in a thread with the `path` of its pipes, once those before it are ready.

    Should one end early, by an error that it returns, the others go on without it.
    """
    answers: list[dict] = [{} for _ in calls]
    threads: list[threading.Thread] = []
    pipes: list[tuple[int, int]] = []

    def over(number: int) -> None:
        while threads[number].is_alive():
            if select.select([pipes[number][1]], [], [], LOOK_SECONDS)[0]:
                os.read(pipes[number][1], 64)
                return

    for number, call in enumerate(calls):
        path = folder / str(number)
        for end in ("go", "done"):
            os.mkfifo(f"{path}.{end}")
        pipes.append((os.open(f"{path}.go", os.O_RDWR), os.open(f"{path}.done", os.O_RDWR)))

        def run(number: int = number, call: Callable[..., dict] = call, path: Path = path) -> None:
            answers[number] = call(path=str(path))

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        over(number)
    for _ in range(0, rounds, ROUNDS):
        for number in reversed(range(len(calls))):
            os.write(pipes[number][0], b"go\n")
            over(number)
    for thread in threads:
        thread.join()
    for fd in [fd for pair in pipes for fd in pair]:
        os.close(fd)
    return answers

"""Functions of tests in processes of their own: what they do to the process must not meet the other tests."""

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from tests.support.script_process import CONTEXT

Result = TypeVar("Result")


def apart(function: Callable[..., Result], *arguments: Any, seconds: float = 240, **options: Any) -> Result:
    """`function(*arguments, **options)` in a process of its own, on one thread of torch.

    The function, its arguments and its result must be picklable. Fails with the process's traceback where it raises,
    and where it takes longer than `seconds`.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(sender, function, arguments, options))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise AssertionError(f"{function.__name__} took longer than {seconds} seconds")
        try:
            succeeded, answer = receiver.recv()
        except EOFError:
            process.join(10)
            raise AssertionError(f"{function.__name__} ended with exit code {process.exitcode}") from None
        if not succeeded:
            raise AssertionError(f"in a process of its own:\n{answer}")
        return answer
    finally:
        if process.is_alive():
            process.join(1)
            process.kill()
        process.join()


def _answer(sender: Connection, function: Callable[..., Any], arguments: Any, options: Any) -> None:
    torch.set_num_threads(1)
    try:
        answer = (True, function(*arguments, **options))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send(answer)
    sender.close()

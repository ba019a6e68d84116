"""What the scheduler wants done: values that the supervisor carries out, in order."""

from __future__ import annotations

from dataclasses import dataclass

from llama_gpu.errors import LlamaGpuError
from llama_gpu.residents import Assignment, LeavesFor

__all__ = ["Admit", "Effect", "Refuse", "Start", "Stop"]


@dataclass(frozen=True)
class Start:
    """Start ``server`` for ``model`` as assigned; answer ``server_ready`` or ``server_failed``.

    ``server`` is the model's id, or ``model#2`` for its second server.
    """

    model: str
    assignment: Assignment
    server: str


@dataclass(frozen=True)
class Stop:
    """Stop ``server``; answer ``server_stopped`` once its memory is back.

    ``reason`` is a sentence. A server whose GPU is lost cannot end in good order: it is killed.
    """

    model: str
    reason: str
    cause: LeavesFor
    server: str


@dataclass(frozen=True)
class Admit:
    """The request behind ``ticket`` may go to ``server``, one of ``model``'s, now."""

    ticket: int
    model: str
    server: str


@dataclass(frozen=True)
class Refuse:
    """The request behind ``ticket`` ends with ``error``."""

    ticket: int
    error: LlamaGpuError


Effect = Start | Stop | Admit | Refuse

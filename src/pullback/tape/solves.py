"""Modules that solve an equation, which may have no solution at the weights that a step has left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pullback.errors import SolverError

Listener = Callable[[SolverError], object]


class Listening:
    """Takes a listener off again.

    Args:
        listeners: where it is.
        listener: the listener.
    """

    def __init__(self, listeners: list[Listener], listener: Listener) -> None:
        self._listeners, self._listener = listeners, listener

    def remove(self) -> None:
        """Nothing is told any more."""
        if self._listener in self._listeners:
            self._listeners.remove(self._listener)


class Solves:
    """A module that solves an equation, and raises SolverError where it finds no solution.

    What steps may do to models with such modules is guarded (:mod:`pullback.optim.undone`).
    """

    _listeners: list[Listener]

    def listen(self, listener: Listener) -> Listening:
        """Tell ``listener`` of backward passes that fail; forward passes have hooks of the model for that.

        Args:
            listener: called with the error before it is raised.
        """
        if "_listeners" not in self.__dict__:
            self._listeners = []
        self._listeners.append(listener)
        return Listening(self._listeners, listener)

    @contextmanager
    def told(self) -> Iterator[None]:
        """A backward pass: if it fails, the listeners are told."""
        try:
            yield
        except SolverError as error:
            for listener in list(self.__dict__.get("_listeners", ())):
                listener(error)
            raise

"""Settings of the process that functions change while they work, such as garbage collection: threads may overlap."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["SharedSetting", "collection_paused"]


class SharedSetting:
    """Setting of the process with counted users: the first one changes it, and the last one restores the old value.

    Parameters
    ----------
    change : callable
        Function that changes the setting, and returns a function that restores it.
    is_restored_in_children : bool
        Restore the setting in a forked process at once. Otherwise the last user in that process restores it.

    Notes
    -----
    Two users that overlap in time would restore each other's value: A finds 8 and sets 1, B finds 1 and sets 1, A restores 8
    while B works, and B then restores 1 for good. Hence the count.
    """

    def __init__(self, change: Callable[[], Callable[[], object]], *, is_restored_in_children: bool) -> None:
        self._change, self._is_restored_in_children = change, is_restored_in_children
        self.lock = threading.RLock()
        self._users = 0
        self._restore: Callable[[], object] | None = None
        if hasattr(os, "register_at_fork"):  # while the thread that forks holds the lock, users and setting agree
            os.register_at_fork(
                before=lambda: self.lock.acquire(),  # noqa: PLW0108 - the lock may be a new one
                after_in_parent=lambda: self.lock.release(),  # noqa: PLW0108
                after_in_child=self._forget_users,
            )

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Change the setting inside a ``with`` block, whatever happens in it."""
        with self.lock:
            if self._restore is None:
                self._restore = self._change()
            self._users += 1
        try:
            yield
        finally:
            with self.lock:
                self._users = max(0, self._users - 1)  # a process that is forked inside the block begins again at zero
                self._restore_if_unused()

    def _restore_if_unused(self) -> None:
        if self._users == 0 and self._restore is not None:
            restore, self._restore = self._restore, None
            restore()

    def _forget_users(self) -> None:
        """Let a forked process count its own users: those of the parent are threads that exist in the parent only."""
        # The lock is a new one, because the thread that forked may have held the old one before.
        self.lock, self._users = threading.RLock(), 0
        if self._is_restored_in_children:
            self._restore_if_unused()


def _pause_collection() -> Callable[[], object]:
    if not gc.isenabled():
        return lambda: None
    gc.disable()
    return gc.enable


# Python's cyclic collector walks over all objects whenever their number has grown by a quarter. It took a third of the time
# in which checkpoints and models of thousands of matrices are read, checked and built. Nothing is garbage there: the objects
# are what is returned. Cycles that other threads drop meanwhile are collected afterwards. Work that takes long, such as a
# decomposition, does not belong into the block.
_collection = SharedSetting(_pause_collection, is_restored_in_children=True)

#: Decorator and context manager that pause the cyclic garbage collector while thousands of objects are built.
collection_paused = _collection.changed

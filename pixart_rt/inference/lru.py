"""A cache that keeps the latest used entries, up to a number of bytes or of entries.

Safe from several threads. The bytes of an entry are counted when it comes, so it must own its
tensors: a view would keep the whole batch that it is a part of.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from threading import RLock
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class Lru(Generic[KeyT, ValueT]):
    """Values by key. The latest stays, also where it alone is above the bound."""

    def __init__(
        self,
        size: Callable[[ValueT], int] = lambda _value: 0,
        *,
        max_bytes: float = math.inf,
        max_entries: float = math.inf,
    ) -> None:
        """size: the bytes of a value, asked once, when it comes."""
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self._size = size
        self._entries: OrderedDict[KeyT, tuple[ValueT, int]] = OrderedDict()
        self._num_bytes = 0
        self._lock = RLock()  # re-entrant: a value's destructor may run inside

    def get(self, key: KeyT) -> ValueT | None:
        """The value, which is the latest used from now on; None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: KeyT, value: ValueT) -> list[KeyT]:
        """Keep a value, in place of the key's earlier one; the keys that had to go for it."""
        num_bytes = self._size(value)
        evicted = []
        with self._lock:
            self._remove(key)
            self._entries[key] = (value, num_bytes)
            self._num_bytes += num_bytes
            while len(self._entries) > 1 and (
                self._num_bytes > self.max_bytes or len(self._entries) > self.max_entries
            ):
                oldest = next(iter(self._entries))
                self._remove(oldest)
                evicted.append(oldest)
        return evicted

    def remove(self, unwanted: Callable[[KeyT], bool]) -> None:
        """Drop the keys for which `unwanted` is true."""
        with self._lock:
            for key in [key for key in self._entries if unwanted(key)]:
                self._remove(key)

    def clear(self) -> None:
        self.remove(lambda _key: True)

    @property
    def num_bytes(self) -> int:
        """Of all entries."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: KeyT) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[KeyT]:
        """The keys, the longest unused first."""
        with self._lock:
            return iter(list(self._entries))

    def _remove(self, key: KeyT) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._num_bytes -= entry[1]

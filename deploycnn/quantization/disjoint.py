"""Values that go together, in sets that grow by joining."""

from __future__ import annotations


class DisjointSets:
    """A union-find over names; every name starts in a set of its own, called after it."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        """What the set of ``name`` is called."""
        root = name
        while root in self._parent:
            root = self._parent[root]
        while name != root:
            self._parent[name], name = root, self._parent[name]
        return root

    def join(self, first: str, second: str) -> None:
        """Make two sets one, called as the first's."""
        left, right = self.find(first), self.find(second)
        if left != right:
            self._parent[right] = left

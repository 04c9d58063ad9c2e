"""The swaps of ``local_search`` for one row, an image of one group for an image of another, found without trying all.

A swap that makes the most expensive group cheaper by d makes the other one more expensive by d. So of all images of one
cost, one in the cheapest group is the best to swap with: only costs are compared, and a heap for each cost keeps the
load of that group.
"""

from bisect import insort
from collections.abc import Sequence
from heapq import heapify, heappush, heapreplace

import numpy as np

from data_sharding.plan.groups import members


class HeapSearch:
    """The images of one row, with the group of each and each group's load: int64 (N,), (N,), (G,), changed in place."""

    def __init__(self, cost_N: np.ndarray, group_N: np.ndarray, load_G: np.ndarray):
        self._cost, self._group, self._load = cost_N.tolist(), group_N.tolist(), load_G.tolist()
        self._group_N, self._load_G = group_N, load_G
        self._members = [found.tolist() for found in members(group_N, len(load_G))]  # images of each group, ascending
        by_cost = np.argsort(cost_N, kind="stable")
        starts = np.flatnonzero(np.diff(cost_N[by_cost], prepend=-1))
        kind_N = np.empty_like(by_cost)
        kind_N[by_cost] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(by_cost)))
        self._kind = kind_N.tolist()  # index of each image's cost in the V different ones, which ascend
        self._cost_V = cost_N[by_cost[starts]]
        self._images_V = np.split(by_cost, starts[1:])  # ascending
        # Load of the cheapest group that has an image of a cost, without that image.
        self._rest_V = np.minimum.reduceat(load_G[group_N[by_cost]], starts) - self._cost_V
        self._bits = len(cost_N).bit_length()
        self._heaps: dict[int, list[int]] = {}  # of a cost: load << bits | image

    def improve(self) -> bool:
        """Makes the most expensive group cheaper by the best swap or move of an image; whether there is one.

        Of equally good ones: a swap, then that of the first image of the group, then with the first other image."""
        worst, lightest = int(self._load_G.argmax()), int(self._load_G.argmin())
        most, least = self._load[worst], self._load[lightest]
        first: dict[int, int] = {}  # image of each cost
        for image in self._members[worst]:
            first.setdefault(self._kind[image], image)
        own, images = list(first), list(first.values())
        cost_U = self._cost_V[own]
        after_UV = np.maximum((most - cost_U)[:, None] + self._cost_V, cost_U[:, None] + self._rest_V)
        row = int(after_UV.argmin()) // len(self._cost_V)
        after = int(after_UV[row].min())
        moved = [max(most - self._cost[image], least + self._cost[image]) for image in images]
        if min(after, *moved) >= most:
            return False
        if min(moved) < after:
            self.reassign((images[moved.index(min(moved))],), (lightest,))
            return True
        image, cost = images[row], self._cost[images[row]]
        kinds = np.flatnonzero(after_UV[row] == after).tolist()
        other = min(self._first(kind, after - cost + int(self._cost_V[kind])) for kind in kinds)
        self.reassign((image, other), (self._group[other], worst))
        return True

    def reassign(self, images: Sequence[int], groups: Sequence[int]) -> None:
        """Puts ``images`` into ``groups``."""
        changed = {self._group[image] for image in images} | set(groups)
        before = {group: self._load[group] for group in changed}
        kinds = {self._kind[image] for group in changed for image in self._members[group]}
        for image, group in zip(images, groups, strict=True):
            cost, old = self._cost[image], self._group[image]
            self._members[old].remove(image)
            insort(self._members[group], image)
            self._load[old] -= cost
            self._load[group] += cost
            self._group[image] = self._group_N[image] = group
        for group in changed:
            self._load_G[group] = self._load[group]
            # A heap finds by itself that a load has risen, not that one has fallen.
            for image in self._members[group]:
                if (self._load[group] < before[group] or image in images) and self._kind[image] in self._heaps:
                    heappush(self._heaps[self._kind[image]], self._load[group] << self._bits | image)
        for kind in kinds:
            self._rest_V[kind] = (self._cheapest(kind) >> self._bits) - self._cost_V[kind]

    def _first(self, kind: int, most: int) -> int:
        """The first image of this cost in a group with a load of at most ``most``; there is one."""
        load, image = divmod(self._cheapest(kind), 1 << self._bits)
        if load == most:
            return image
        images = self._images_V[kind]
        return int(images[(self._load_G[self._group_N[images]] <= most).argmax()])

    def _cheapest(self, kind: int) -> int:
        """Load of the cheapest group that has an image of this cost, and the first such image: load << bits | image."""
        heap = self._heaps.get(kind)
        if heap is None:
            images = self._images_V[kind]
            heap = (self._load_G[self._group_N[images]] << self._bits | images).tolist()
            heapify(heap)
            self._heaps[kind] = heap
        while True:
            image = heap[0] & ((1 << self._bits) - 1)
            now = self._load[self._group[image]] << self._bits | image
            if heap[0] == now:
                return now
            heapreplace(heap, now)

"""As much of a world of one process as sampling needs."""

import torch


class Alone:
    rank, size, device = 0, 1, torch.device("cpu")

    def all_gather(self, value):
        return [value]

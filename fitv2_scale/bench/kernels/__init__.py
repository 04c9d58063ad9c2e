"""Predicts a training step on a GPU without one: `fitv2 bench kernels`."""

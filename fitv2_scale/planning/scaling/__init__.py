"""Scaling curves: what the losses of some runs say of longer ones and of larger networks.

``reading`` finds the curves in journals or in MLflow, ``fits`` and ``intervals`` are pure functions of tables,
``published`` has the paper's points, ``predictions`` are kept and scored, ``plots`` and ``report`` show all of it.
"""

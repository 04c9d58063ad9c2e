"""Scaling curves: from the losses of some runs to predictions for longer runs and larger networks.

``read_curves`` reads journals or MLflow. ``fits`` and ``bootstrap`` (confidence intervals) are pure functions of
tables, and ``laws`` applies them to curves. ``published_fid`` has the paper's points, ``compare_families`` what each
family needs to the same loss or FID. ``predictions`` are kept and scored. ``curves_report``, ``families_text`` and
``plots`` show everything, ``save_report`` writes it to files and MLflow.
"""

"""The forecast of `fitv2 plan`: what a run needs, computed before it is started.

``memory_per_rank``, ``pack_statistics`` (how the data are divided into packs), ``step_time``, ``goodput`` (the cost of
failures and saves; ``simulate`` finds the same by simulation), ``run_length``, ``save_interval``, ``disk_usage`` and
``node_count`` compute one part each. ``assumptions`` holds the figures that cannot be computed, each with its source;
``gpus`` those of data sheets, ``predicted`` those of `fitv2 bench kernels`. ``plan_report`` puts everything together.
"""

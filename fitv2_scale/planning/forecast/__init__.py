"""What `fitv2 plan` tells before a run is started.

``memory`` what a rank holds, ``packing`` how the data is dealt out, ``pace`` how long a step takes, ``goodput`` what
failures and saves cost (``simulate`` checks it by chance), ``storage``, ``nodes`` how many to take; ``assumed`` names
where each figure comes from that cannot be computed; ``report`` puts all of it together.
"""

"""A dataset as packed batches in one call, for a training loop of your own."""

from data_sharding.format.manifest import Manifest
from data_sharding.plan.balance import Cost, Nodes
from data_sharding.plan.pack_shapes import shapes_for_plan
from data_sharding.plan.plan import Plan, Segment
from data_sharding.plan.token_grid import TokenGrid
from data_sharding.plan.view_choice import Views
from data_sharding.stream.loader import Loader


def packed_batches(
    url: str,
    *,
    images: int,
    max_tokens: int,
    steps: range,
    hidden: int = 1024,
    seed: int = 0,
    views: Views = "mixed",
    rank: int = 0,
    nodes: Nodes = (1,),
    cache_bytes: int = 1 << 30,
) -> Loader:
    """The batches of ``rank`` for ``steps``: a context manager over StepBatch.

    ``images`` is the batch of one step, over all ranks; ``max_tokens`` the most that one pack holds. ``hidden`` is the
    width of the transformer: ranks get equal work by its cost. ``nodes`` holds the number of ranks of each node, such
    as (8, 8). A run is resumed by the same arguments and later ``steps``: the images depend on seed and step only.

    Raises:
        DataError: there is no dataset at ``url``, or it is damaged.
        UserError: more images than the dataset has, more ranks than images, or images longer than ``max_tokens``.
    """
    manifest = Manifest.load(url)
    token_grid = TokenGrid(latent_channels=manifest.header.latent_channels)
    plan = Plan([manifest], seed, views, [Segment(start=0, images=images, weights=(1,))], token_grid)
    cost = Cost.transformer(hidden)
    shapes = shapes_for_plan(plan, cost, nodes, max_tokens)
    return Loader(plan, cost, shapes, rank, nodes, steps, cache_bytes)

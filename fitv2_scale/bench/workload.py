"""The workload of the data benchmarks: the cost model and the packs of FiTv2-3B/2, and plans of one dataset. Needs no
torch."""

from data_sharding.format.manifest import Manifest
from data_sharding.plan.balance import Cost
from data_sharding.plan.plan import Plan, Segment

COST = Cost.transformer(2304)  # FiTv2-3B/2
PACK_TOKENS = 16384
BATCH = 256  # images per step


def plan_of(manifest: Manifest, batch: int = BATCH) -> Plan:
    """The plan of one dataset with both views, for steps of ``batch`` images."""
    return Plan([manifest], 0, "mixed", [Segment(0, batch, (1,))])

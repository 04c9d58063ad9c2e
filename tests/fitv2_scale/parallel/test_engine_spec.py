"""What an engine is built from is what the config says, whatever it says."""

from fitv2_scale.model.block import low_rank_head
from fitv2_scale.model.block_parts import BlockParts
from fitv2_scale.model.kernels.block import FusedAttention, FusedBlock, FusedMergedSwiGLU
from fitv2_scale.parallel.engine_spec import EngineSpec
from tests.support.layout_grid import make_config


def test_no_key_is_overlooked():
    """None of them has its default here."""
    layout = {"layout__precision": "bf16", "layout__compile": True, "layout__checkpointing": "full"}
    layout |= {"layout__reshard_after_forward": "never", "layout__gate_and_value": "merged"}
    layout["layout__prefetch_blocks"] = 3
    layout["layout__kernels"] = "triton"
    config = make_config(ema__decay=0.5, optimizer__beta2=0.9, **layout)
    config = config.model_copy(update={"seed": 7, "trainable": ["blocks.*"]})
    assert EngineSpec.of(config, on_cuda=False) == EngineSpec(
        model=config.model,
        optimizer=config.optimizer,
        ema_decay=0.5,
        trainable=["blocks.*"],
        seed=7,
        precision="bf16",
        compile_blocks=True,
        checkpointing="full",
        reshard_after_forward="never",
        prefetch_blocks=3,
        parts=BlockParts(FusedBlock, FusedAttention, FusedMergedSwiGLU, low_rank_head),
    )

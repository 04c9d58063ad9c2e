"""DiT's and SiT's public weights, and diffusers': what they compute, byte-equal back again, and what is refused."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.weights import export_weights, import_weights, open_weights
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.model.network import DiffusionTransformer
from tests.oracle import network as apart
from tests.support.commits import read_tensors
from tests.support.hostile_pickle import Touch
from tests.support.public_weights import MODEL, diffusers_weights, dit_weights
from tests.support.tiny_networks import FIT, TINY, pack

CONFIG, SIDE = ModelConfig.model_validate(MODEL), 4
TABLE = "y_embedder.embedding_table.weight"


def loaded(file, config: ModelConfig) -> DiffusionTransformer:
    network = DiffusionTransformer(config)
    network.load_state_dict({name: stored.read() for name, stored in open_weights(str(file), config).tensors.items()})
    return network.double()


def computed(network: DiffusionTransformer, image: Tensor, t: float, label: int, patch: int) -> Tensor:
    """The output (8, H, W) for an image (4, H, W), whose tokens and outputs are (c p1 p2)."""
    tokens = image.reshape(4, SIDE, patch, SIDE, patch).permute(1, 3, 0, 2, 4).reshape(SIDE * SIDE, 4 * patch**2)
    out = network(tokens, torch.tensor([t]).double(), torch.tensor([label]), pack([(SIDE, SIDE)], 16, 1, 16))
    return out.reshape(SIDE, SIDE, 8, patch, patch).permute(2, 0, 3, 1, 4).reshape(8, SIDE * patch, SIDE * patch)


def dit(weights: dict[str, Tensor], image: Tensor, t: float, label: int, patch: int) -> Tensor:
    """The same by DiT's own steps at both ends: a convolution, the stored table, and rows (p1 p2 c)."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    into = F.conv2d(image[None], weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=patch)
    tokens = into.flatten(2).transpose(1, 2)[0] + weights["pos_embed"][0]
    as_they_are = {"x_embedder.proj.weight": torch.eye(32).double(), "x_embedder.proj.bias": torch.zeros(32).double()}
    form = apart.Form(qk_norm="none", adaln="full", mlp="gelu", position="none", channels=32)
    out = apart.velocity(weights | as_they_are, form, tokens, t, label, SIDE, SIDE)
    return torch.einsum("hwpqc->chpwq", out.reshape(SIDE, SIDE, patch, patch, 8)).reshape(8, SIDE * patch, SIDE * patch)


@pytest.mark.parametrize("patch", [2, 4])
def test_imported_weights_compute_what_dit_does(tmp_path, patch):
    weights, config = dit_weights(patch=patch), ModelConfig.model_validate(MODEL | {"patch": patch})
    torch.save(weights, tmp_path / "DiT.pt")
    image = torch.randn(4, SIDE * patch, SIDE * patch).double()
    found = computed(loaded(tmp_path / "DiT.pt", config), image, 0.75, 2, patch)
    torch.testing.assert_close(found, dit(weights, image, 0.75, 2, patch), rtol=1e-6, atol=1e-6)


def test_imported_weights_compute_what_diffusers_does(tmp_path):
    """With our sinusoid and eps in its blocks: its own differ (see README)."""
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5, norm_elementwise_affine=False, norm_type="ada_norm_zero",
    ).eval()  # fmt: skip
    assert {n: t.shape for n, t in theirs.state_dict().items()} == {
        n: t.shape for n, t in diffusers_weights(dit_weights()).items()
    }
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2)
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = 0, 1e-6
    theirs.save_pretrained(tmp_path / "transformer")
    image = torch.randn(4, 8, 8)
    found = computed(
        loaded(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", CONFIG), image.double(), 7.0, 2, 2
    )
    expected = theirs.double()(image[None].double(), torch.tensor([7.0]), torch.tensor([2])).sample[0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout,of", [("dit", dict), ("diffusers", diffusers_weights)])
@pytest.mark.parametrize("ema", [False, True])
def test_there_and_back_every_byte_is_equal(tiny, tmp_path, layout, of, ema):
    config, weights = tiny(model=MODEL), of(dit_weights())
    save_file(weights, tmp_path / "in.safetensors")
    found = import_weights(str(tmp_path / "in.safetensors"), config.run, config)
    assert (found.weights.layout, found.weights.part) == (layout, "")
    assert export_weights(config.run, str(tmp_path / "out.safetensors"), ema=ema, layout=layout) == 0
    back = load_file(tmp_path / "out.safetensors")
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in weights.items()}
    assert all(back[n].numpy().tobytes() == t.numpy().tobytes() for n, t in weights.items())


def test_rows_and_patches_as_numbers(tiny, tmp_path):
    """Row k 8 + c of the file, of pixel k and channel c, is row c 4 + k of the network; a patch is flat (c p1 p2)."""
    weights, config = dit_weights(), tiny(model=MODEL)
    weights["final_layer.linear.bias"] = torch.arange(32.0)
    weights["x_embedder.proj.weight"][:] = torch.arange(16.0).reshape(4, 2, 2)
    torch.save(weights, tmp_path / "DiT.pt")
    import_weights(str(tmp_path / "DiT.pt"), config.run, config)
    found = read_tensors(config.run, "param/")
    assert found["final_layer.linear.bias"].tolist()[:9] == [0, 8, 16, 24, 1, 9, 17, 25, 2]
    assert found["x_embedder.proj.weight"][5].tolist() == list(range(16))
    assert {n: tuple(t.shape) for n, t in found.items()} == dict(logical_shapes(CONFIG))


def test_a_training_file_of_dit_is_taken_by_its_ema(tiny, tmp_path):
    """With a Namespace, as DiT's train.py saves it, and with what would act if it were made."""
    config, planted = tiny(model=MODEL), tmp_path / "planted"
    saved = {"model": dit_weights(1), "ema": dit_weights(2), "opt": {"state": {0: {"step": Touch(str(planted))}}}}
    saved["args"] = Namespace(model="DiT-XL/2", path=Touch(str(planted)))
    torch.save(saved, tmp_path / "0400000.pt")
    found = import_weights(str(tmp_path / "0400000.pt"), config.run, config)
    assert (found.weights.part, found.weights.layout) == ("ema", "dit") and not planted.exists()
    assert found.weights.origin == " (its part 'ema', layout dit)"
    assert torch.equal(read_tensors(config.run, "param/")[TABLE], saved["ema"][TABLE])


def with_other_table(weights):
    weights["pos_embed"][0, 3, 5] += 2e-6


def with_other_copy(weights):
    weights["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"][3] += 1e-6


@pytest.mark.parametrize(
    "of,change,said",
    [
        (dict, with_other_table, "pos_embed is up to 2.* off the fixed table .* take weights whose table was not"),
        (dict, lambda w: w.pop("pos_embed"), r"1 tensors are missing \(pos_embed\) and 0 are left over"),
        (dict, lambda w: w.update(sigma=torch.ones(1)), r"0 tensors are missing .* 1 are left over \(sigma\)"),
        (dict, lambda w: w.update(pos_embed=torch.zeros(1, 9, 32)), r"model.sincos.train_side is 3, not 4"),
        (diffusers_weights, with_other_copy, "blocks.1.*linear_2.bias differs from .*blocks.0.*linear_2.bias, but all"),
        (
            diffusers_weights,
            lambda w: w.pop("transformer_blocks.1.attn1.to_k.bias"),
            r"1 tensors are missing \(transformer_blocks.1.attn1.to_k.bias\)",
        ),
    ],
)
def test_what_is_no_public_file_is_named(tiny, tmp_path, of, change, said):
    config, weights = tiny(model=MODEL), of(dit_weights())
    change(weights)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(UserError, match=said):
        import_weights(str(tmp_path / "w.pt"), config.run, config)


@pytest.mark.parametrize(
    "of,model,said",
    [
        (
            dict,
            TINY,
            r"\(model.mlp is gelu, not swiglu, model.position is sincos, not rope, model.adaln is full",
        ),
        (
            diffusers_weights,
            TINY,
            r"model.qk_norm is none, not layernorm.*\): set these keys so, or take the config",
        ),
        (dict, CONFIG.model_copy(update={"depth": 3}), r"describes \(model.depth is 2, not 3\): set these keys so"),
        (dict, CONFIG.model_copy(update={"outputs": 1}), r"describes \(model.outputs is 2, not 1\)"),
        (dict, CONFIG.model_copy(update={"patch": 4}), r"describes \(model.patch is 2, not 4\)"),
        (
            dict,
            CONFIG.model_copy(update={"classes": 6}),
            r"\(model.classes is 5, not 6\).*; in training, init_new",
        ),
        (dict, CONFIG.model_copy(update={"hidden": 64}), r"describes \(model.hidden is 32, not 64\)"),
    ],
)
def test_the_keys_in_which_a_config_is_of_another_network(tmp_path, of, model, said):
    torch.save(of(dit_weights()), tmp_path / "w.pt")
    with pytest.raises(UserError, match=said):
        open_weights(str(tmp_path / "w.pt"), model)


@pytest.mark.parametrize(
    "there,here,said",
    [
        ({}, FIT, r"\(model.mlp is swiglu, not swiglu_4d, model.adaln is lora, not full, model.outputs is 1, not 2\)"),
        (FIT, {}, r"\(model.mlp is swiglu_4d, not swiglu, model.adaln is full, not lora, model.outputs is 2, not 1\)"),
        ({"mlp": "gelu"}, {}, r"describes \(model.mlp is gelu, not swiglu\)"),
    ],
)
def test_fit_and_fitv2_are_told_apart(tmp_path, there, here, said):
    shapes = logical_shapes(TINY.model_copy(update=there))
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "w.bin")
    with pytest.raises(UserError, match=said):
        open_weights(str(tmp_path / "w.bin"), TINY.model_copy(update=here))


def test_fits_public_weights_have_347_tensors_and_stay_as_they_are(tmp_path):
    model = ModelConfig(**{"depth": 28, "hidden": 32, "heads": 2, "classes": 5, **FIT})
    weights = {name: torch.randn(shape) for name, shape in logical_shapes(model).items()}
    assert len(weights) == 347
    torch.save(weights, tmp_path / "model_ema.bin")
    found = open_weights(str(tmp_path / "model_ema.bin"), model)
    assert found.layout == "fit" and all(torch.equal(found.tensors[n].read(), t) for n, t in weights.items())


def test_a_run_of_another_network_has_no_layout_of_dit(two_step_run, tmp_path):
    with pytest.raises(UserError, match=r"not of the layout dit \(model.mlp is swiglu, not gelu, .*leave out --format"):
        export_weights(two_step_run, str(tmp_path / "w.safetensors"), ema=True, layout="dit")


def test_new_tensors_may_be_there_or_not(tmp_path):
    """Others stay refused, also where a pattern of names would take them."""
    wider = CONFIG.model_copy(update={"classes": 9})
    for of in (dict, diffusers_weights):
        torch.save(of(dit_weights()), tmp_path / "w.pt")
        found = open_weights(str(tmp_path / "w.pt"), wider, (TABLE,))
        assert found.tensors.keys() == logical_shapes(wider).keys() - {TABLE}
        torch.save({n: t for n, t in of(dit_weights()).items() if "embedding_table" not in n}, tmp_path / "less.pt")
        assert open_weights(str(tmp_path / "less.pt"), wider, (TABLE,)).tensors.keys() == found.tensors.keys()
        torch.save({**of(dit_weights()), f"{TABLE}.old": torch.ones(1)}, tmp_path / "more.pt")
        with pytest.raises(UserError, match=rf"1 are left over \({TABLE}.old\)"):
            open_weights(str(tmp_path / "more.pt"), wider, (TABLE,))

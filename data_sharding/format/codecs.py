"""Chooses a codec: by the name that a user gives, or by the record in a dataset's manifest."""

from data_sharding.errors import UserError
from data_sharding.format.codec import PUBLISHED, SD_VAE, Codec, CodecRecord, Latent, channels_of
from data_sharding.format.dct import DctCodec


def get_codec(name: str, vae: str = "", latent: Latent = "mean") -> Codec:
    """The codec to write with; ``vae`` is the folder of sd-vae's weights, ``latent`` selects from its posterior.

    Raises:
        UserError: the codec is unknown, its weights or packages are missing, or it takes no weights.
    """
    if name == DctCodec.name:
        if vae or latent != "mean":
            raise UserError("the codec dct has neither weights nor a posterior: remove --vae and --latent")
        return DctCodec()
    if name != SD_VAE:
        raise UserError(f"there is no codec '{name}': use 'dct' or 'sd-vae'")
    if not vae:
        raise UserError("the codec sd-vae needs its weights: give --vae FOLDER, a diffusers AutoencoderKL")
    return _sd_vae(vae, latent)


def codec_of(record: CodecRecord, vae: str = "") -> Codec:
    """The codec that decodes a dataset whose header holds ``record``; ``vae`` as for ``get_codec``.

    Raises:
        UserError: as ``get_codec``, or ``vae`` holds other weights than the dataset was written with.
    """
    if record["name"] != SD_VAE:
        return get_codec(record["name"])
    if not vae:
        raise UserError(
            "decoding these latents needs the VAE that encoded them: set sampling.vae to the folder of its diffusers "
            "AutoencoderKL"
        )
    codec = _sd_vae(vae, "mean")
    if record.get("vae", codec.weights) != codec.weights:  # the published latents come without a digest
        raise UserError(
            f"the dataset was written with the VAE {record['vae']:.16}, but {vae} holds {codec.weights:.16}: give the "
            f"folder of {record['vae']:.16}"
        )
    if codec.channels != channels_of(record):
        raise UserError(
            f"the dataset holds latents of {channels_of(record)} channels, and the VAE in {vae} has {codec.channels}: "
            "give the one that encoded them"
        )
    return codec


def decoding_vae(folder: str, digest: str | None) -> Codec:
    """The VAE in ``folder``, for latents of the codec with this ``digest``, None if it is not known. Raises UserError
    as ``codec_of``."""
    codec = _sd_vae(folder, "mean")
    if digest not in (None, PUBLISHED, codec.digest_as("mean"), codec.digest_as("sample")):
        raise UserError(
            f"the VAE in {folder} ({codec.weights:.16}) is not the one that encoded these latents (codec "
            f"{digest:.16}): give the folder of that one"
        )
    return codec


def _sd_vae(folder: str, latent: Latent):
    from data_sharding.format.sd_vae import load_vae

    return load_vae(folder, latent)

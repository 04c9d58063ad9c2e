"""A data format for packed image latents: write, verify, plan and stream them. Usable without ``fitv2_scale``.

``storage`` <- ``format`` <- ``write``, and ``format`` <- ``plan`` <- ``stream``: each imports those before it only.
Imports no torch, except for the codec sd-vae when it is used. Start with ``stream.packed_batches``.
"""

"""The stored format: shards, the manifest and its columns; codecs between pixels and latents."""

"""The data format of fitv2_scale: write, verify, plan and stream packed image latents. Imports no torch (but for
the codec sd-vae, when it is used)."""

"""The data format of fitv2_scale: write, verify, plan and stream packed image latents. Imports no torch."""

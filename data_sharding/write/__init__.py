"""Writing datasets: images or published latents to shards, in parallel and resumable."""

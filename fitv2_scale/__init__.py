"""Training FiTv2 at scale: the run is a function of (config, seed, dataset), never of the layout."""

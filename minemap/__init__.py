"""Maps the footprint of mining from Sentinel-2."""

"""What Sentinel-2 L2A is: bands and their names per catalogue, SCL classes, nodata, the offset decision.

Sources: Sentinel-2 Products Specification Document (ESA S2-PDGS-TAS-DI-PSD), issue 14.9 and later for the
processing baseline 04.00 offset; STAC extensions eo, raster, processing.
"""

from __future__ import annotations

BANDS = ("blue", "green", "red", "nir", "swir16", "swir22")

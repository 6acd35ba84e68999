"""Surface disturbance between two images, from their bands alone: no model, no training.

Source: the differenced normalised burn ratio (Key and Benson 2006, "Landscape Assessment", in FIREMON, USDA Forest
Service RMRS-GTR-164-CD), made for fire and used since for whatever takes the vegetation and lays the ground bare:
NBR = (NIR - SWIR22) / (NIR + SWIR22), dNBR = before - after, at least 0.27 for moderate severity.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from .errors import InputError

MODERATE = 0.27  # dNBR from which Key and Benson speak of moderate severity
NOT_OBSERVED = 255


def burn_ratio(image: xr.DataArray) -> xr.DataArray:
    """NBR of reflectance (…, band, y, x), float32 (…, y, x) from -1 to 1, NaN where not observed."""
    missing = {"nir", "swir22"} - set(image["band"].values.tolist())
    if missing:
        lacking = " and ".join(sorted(missing))
        raise InputError(f"the normalised burn ratio needs nir and swir22: {lacking} is not there")
    nir, swir = (image.sel(band=band, drop=True) for band in ("nir", "swir22"))
    total = nir + swir
    return ((nir - swir) / total.where(total > 0)).astype(np.float32).rename("nbr")


def disturbance(before: xr.DataArray, after: xr.DataArray, *, threshold: float = MODERATE) -> xr.DataArray:
    """Where the ground was laid bare between two images, uint8 (y, x): 1 yes, 0 no, 255 not observed in both.

    before, after: reflectance (band, y, x) of one lattice, as `composite` gives it, lazy or not; they need not cover
    the same pixels: the result covers those that are in both. Clouds that no mask has taken out count as disturbance.
    """
    one, other = xr.align(burn_ratio(before), burn_ratio(after), join="inner")
    if not one.size:
        raise InputError("the two images have no pixel in common: load both on one Grid")
    fall = one - other
    changed = xr.where(fall.isnull(), NOT_OBSERVED, fall >= threshold).astype(np.uint8)
    changed.attrs = {"long_name": "surface disturbance", "flag_values": [0, 1], "_FillValue": NOT_OBSERVED}
    return changed.rename("disturbance")

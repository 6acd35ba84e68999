"""The hardened reader: which addresses may be opened, late signing, retries, exact warps.

One function reads one piece of one asset on a Grid: `read_asset`. `ExactReader` is the same as a reader class for
stackstac.

Why a reader of our own: GDAL's default warp approximates the transformer over the window that is read and derives
the kernel's size from it, so the same ground pixel differs between reads (91-99 % of the pixels for a source in
another CRS). Here the transformer is exact and the kernel's scale depends on the two grids alone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

import numpy as np
import rasterio
from affine import Affine
from rasterio._err import CPLE_BaseError
from rasterio._path import _parse_path, _vsi_path
from rasterio.enums import Resampling
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from .errors import ReadError, first_line
from .sentinel2 import NODATA

DRIVERS = ["GTiff", "JP2OpenJPEG"]  # a VRT can make GDAL open anything else, so none but these
ATTEMPTS = 5
TOKEN_RETRIES = 3
REDIRECTS = 5
REDIRECT_SECONDS = (5, 30)  # to connect, to answer
PAUSE = 0.25  # seconds before the second attempt, doubled each time
TOLERANCE = 1e-12  # pixels; 0 crashes GDAL
ALLOW_VARIABLE = "MINEMAP_ALLOW_HOSTS"
KNOWN_HOSTS = (".amazonaws.com", ".blob.core.windows.net", ".copernicus.eu", ".usgs.gov")
# Hosts that send nobody elsewhere
STORAGE = re.compile(r"(^|\.)s3[.-][a-z0-9.-]*amazonaws\.com$|\.blob\.core\.windows\.net$")
SIGNED_HOSTS = ".blob.core.windows.net"  # the Planetary Computer's

GDAL_OPTIONS: dict[str, Any] = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MAX_RETRY": 3,  # in each of our own attempts; with 8 a host that is away took 12 minutes an asset
    "GDAL_HTTP_RETRY_DELAY": 0.25,
    "GDAL_HTTP_RETRY_CODES": "408,429,500,502,503,504",
    "GDAL_HTTP_CONNECTTIMEOUT": 10,
    "GDAL_HTTP_TIMEOUT": 60,
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_INGESTED_BYTES_AT_OPEN": 32_768,
    "GDAL_NUM_THREADS": 1,  # parallelism is over assets
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_CACHEMAX": 256 * 2**20,
}


@dataclass(frozen=True)
class Access:
    """What a source's items may make us open. Travels with every read, so that workers obey it too.

    local: files of this machine (only items of a local item file may point at them). hosts: None for any host,
    else exact names and, with a leading dot, domains. sign: Planetary Computer tokens, taken when opening.
    """

    local: bool = True
    hosts: tuple[str, ...] | None = None
    sign: bool = False

    @staticmethod
    def of(source: Any) -> Access:
        """For the items of a `scenes.Source`."""
        if source.is_file:
            return Access(sign=True)
        named = (host.strip().lower() for host in os.environ.get(ALLOW_VARIABLE, "").split(","))
        extra = tuple(filter(None, named))
        return Access(False, (urlsplit(source.url).hostname or "", *KNOWN_HOSTS, *extra), source.signed)

    def check(self, href: str) -> None:
        """Raises ReadError when `href` may not be opened."""
        try:
            scheme = urlsplit(href).scheme
        except ValueError as error:
            raise ReadError(f"asset {href!r} is no address: {error}") from error
        if href.startswith("/vsi") or scheme not in ("", "http", "https", "s3"):
            raise ReadError(f"asset {href!r}: only http(s), s3 and plain paths are opened")
        if scheme == "" and not self.local:
            raise ReadError(f"asset {href!r}: a catalogue may not point at files of this machine")
        if scheme in ("http", "https") and self.hosts is not None and not self._allows(urlsplit(href).hostname):
            host = urlsplit(href).hostname
            raise ReadError(f"asset {href!r}: host {host} is not allowed; set {ALLOW_VARIABLE}={host} to trust it")

    def _allows(self, host: str | None) -> bool:
        name = (host or "").lower()
        return any(name == h or (h.startswith(".") and name.endswith(h)) for h in self.hosts or ())


def read_asset(
    href: str,
    *,
    epsg: int,
    transform: Affine,
    window: Window,
    resampling: Resampling,
    access: Access,
) -> np.ndarray:
    """One band of one asset on a target grid, in its own dtype, (y, x); 0 where it has nothing.

    epsg, transform: the target lattice; window: the piece of it to read. Where the source already lies on the
    lattice its pixels are copied; everything else is warped, with `resampling`. Raises ReadError after 5 attempts
    at a remote asset, and at once for a local one.
    """
    target = transform @ Affine.translation(window.col_off, window.row_off)
    shape = int(window.height), int(window.width)

    def read(source: Any) -> np.ndarray:
        own = _transform_in(source, epsg)
        offset = _lattice_offset(own, target) if own is not None else None
        if offset is not None:
            return _copied(source, offset, shape)
        return _warped(source, own, epsg, target, shape, resampling)

    return _attempted(href, access, read)


def read_overview(href: str, access: Access, side: int = 256) -> np.ndarray:
    """A whole asset at no more than about `side` px a side, stored values (y, x), from its overviews if any."""

    def read(source: Any) -> np.ndarray:
        step = max(1, source.width // side, source.height // side)
        return source.read(1, out_shape=(max(1, source.height // step), max(1, source.width // step)))

    return _attempted(href, access, read)


def check_asset(href: str, access: Access) -> None:
    """Raises ReadError unless `read_asset` would open it: for readers that open what they like."""
    _attempted(href, access, lambda _: np.empty(0))


def _attempted(href: str, access: Access, read: Callable[[Any], np.ndarray]) -> np.ndarray:
    """`read` of the opened asset, again and again where it is remote. Raises ReadError."""
    access.check(href)
    for attempt in range(ATTEMPTS if "://" in href else 1):
        if attempt:
            time.sleep(PAUSE * 2**attempt)
        address = href
        try:
            address = address_of(href, access)
            # GDAL keeps what it has read of an address, failures too: look afresh the second time
            fresh = {"CPL_VSIL_CURL_NON_CACHED": _vsi_path(_parse_path(address))} if attempt else {}
            with rasterio.Env(**GDAL_OPTIONS, **fresh), _open(address) as source:
                if source.count != 1:
                    raise RasterioIOError(f"has {source.count} bands, 1 is expected")
                if source.crs is None:
                    raise RasterioIOError("has no coordinate reference system")
                return read(source)
        except (RasterioError, CPLE_BaseError, OSError) as error:
            problem = error
            _followed.cache_clear()  # where a redirect led may be an address for a while only
            if access.sign and address != href:
                _forget_tokens()
    raise ReadError(f"asset {href!r} can't be read: {first_line(problem)}") from problem


def address_of(href: str, access: Access) -> str:
    """What to open for an href that `Access.check` has let through: signed, and where redirects lead."""
    scheme, host = urlsplit(href).scheme, urlsplit(href).hostname or ""
    trusted = access.hosts is None or STORAGE.search(host) is not None
    return _followed(href, access) if scheme in ("http", "https") and not trusted else signed(href, access)


@lru_cache(maxsize=4096)
def _followed(href: str, access: Access) -> str:
    """The end of an address's redirects, each of which must be allowed. GDAL would follow them anywhere."""
    import requests

    one_byte = {"Range": "bytes=0-0"}  # as GDAL asks: a host may redirect GET and not HEAD
    address = href
    for _ in range(REDIRECTS):
        asked = requests.get(address, headers=one_byte, stream=True, allow_redirects=False, timeout=REDIRECT_SECONDS)
        with asked as answer:
            if not answer.is_redirect:
                return address
            led = answer.headers["Location"]
        try:
            address = urljoin(address, led)
        except ValueError as error:
            raise ReadError(f"asset {href!r} redirects to {led!r}, which is no address: {error}") from error
        try:
            access.check(address)
        except ReadError as error:
            raise ReadError(f"asset {href!r} redirects: {error}") from error
    raise ReadError(f"asset {href!r}: more than {REDIRECTS} redirects")


def signed(href: str, access: Access) -> str:
    """`href` with a Planetary Computer token, where the source asks for that."""
    if not access.sign or not (urlsplit(href).hostname or "").endswith(SIGNED_HOSTS):
        return href
    from planetary_computer.sas import get_token

    parts = urlsplit(href)
    given = parse_qs(parts.query)
    if {"st", "se", "sp"} & set(given):  # signed by whoever made the item
        expires = given.get("se")
        if not expires or expires[0] > datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"):
            return href
        href = parts._replace(query="").geturl()
    account, container = str(parts.hostname).partition(".")[0], parts.path.strip("/").partition("/")[0]
    if not container:
        raise ReadError(f"asset {href!r} names no container of that storage")
    try:
        return get_token(account, container, retry_total=TOKEN_RETRIES).sign(href).href
    except (OSError, ValueError) as error:  # requests' and pydantic's
        if access.local:  # an item file's container may be open to all
            return href
        raise ReadError(
            f"asset {href!r}: the Planetary Computer gave no token for it: {first_line(error)}"
        ) from error


def _forget_tokens() -> None:
    """A token may have been refused before its time.

    HACK: planetary_computer offers no way to drop one that it still believes in.
    """
    from planetary_computer import sas

    sas.TOKEN_CACHE.clear()


def _open(href: str) -> rasterio.DatasetReader:
    # rasterio.open takes one driver only; the class it makes takes the list
    return rasterio.DatasetReader(_parse_path(href), driver=DRIVERS, sharing=False)


def _transform_in(source: Any, epsg: int) -> Affine | None:
    """The source's transform in the target's CRS; None where only a warp leads from one to the other.

    The two hemispheres of a UTM zone differ by 10,000 km of false northing and nothing else (Landsat numbers the
    south in the northern zone). Going through a projection would add rounding, which decides where a source lies half
    a pixel off the target.
    """
    own = source.crs.to_epsg() or 0
    if own == epsg:
        return source.transform
    zones = {own // 100, epsg // 100}
    if zones != {326, 327} or own % 100 != epsg % 100:
        return None
    return Affine.translation(0, 1e7 if epsg > own else -1e7) @ source.transform


def _lattice_offset(source: Affine, target: Affine) -> tuple[int, int] | None:
    """(row, column) of the target's first pixel in the source, None unless both share one lattice."""
    if (source.a, source.b, source.d, source.e) != (target.a, target.b, target.d, target.e):
        return None
    column, row = ~source @ (target.c, target.f)
    exact = abs(column - round(column)) < 1e-6 and abs(row - round(row)) < 1e-6
    return (round(row), round(column)) if exact else None


def _copied(source: Any, offset: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape, source.dtypes[0])
    rows = max(offset[0], 0), min(offset[0] + shape[0], source.height)
    columns = max(offset[1], 0), min(offset[1] + shape[1], source.width)
    if rows[0] < rows[1] and columns[0] < columns[1]:
        data = source.read(1, window=Window.from_slices(rows, columns))
        if source.nodata not in (None, NODATA):
            data[data == source.nodata] = NODATA
        row, column = rows[0] - offset[0], columns[0] - offset[1]
        out[row : row + data.shape[0], column : column + data.shape[1]] = data
    return out


def _warped(
    source: Any, own: Affine | None, epsg: int, target: Affine, shape: tuple[int, int], resampling: Resampling
) -> np.ndarray:
    """own: the source's transform in the target's CRS, None where it has another."""
    scale = _kernel_scale(source, epsg, target.a)
    placed = {} if own is None else {"src_crs": f"EPSG:{epsg}", "src_transform": own}
    with WarpedVRT(
        source,
        sharing=False,
        crs=f"EPSG:{epsg}",
        transform=target,
        height=shape[0],
        width=shape[1],
        resampling=resampling,
        src_nodata=NODATA if source.nodata is None else source.nodata,
        nodata=NODATA,
        tolerance=TOLERANCE,
        XSCALE=str(scale),
        YSCALE=str(scale),
        **placed,
    ) as vrt:
        return vrt.read(1)


def _kernel_scale(source: Any, epsg: int, resolution: float) -> float:
    """Source pixels per target pixel, inverted, as GDAL counts: 1 unless the source is clearly finer.

    From the source's own extent, so the same for every window of it. Rounded, so that 9.97 m on a geographic
    lattice counts as 10 m.
    """
    bounds = transform_bounds(source.crs, f"EPSG:{epsg}", *source.bounds)
    pixel = max((bounds[2] - bounds[0]) / source.width, (bounds[3] - bounds[1]) / source.height)
    return min(1.0, round(pixel / resolution, 1) or 0.1)


class ExactReader:
    """`read_asset` as stackstac's Reader protocol. Opens nothing until it is read, and keeps nothing open."""

    def __init__(
        self,
        *,
        url: str,
        spec: Any,
        resampling: Resampling,
        dtype: np.dtype,
        fill_value: int,
        access: Access,
        **_: Any,  # scale_offset, gdal_env, errors_as_nodata: the protocol's, decided elsewhere here
    ) -> None:
        self.url, self.spec, self.resampling, self.dtype, self.access = url, spec, resampling, dtype, access

    def read(self, window: Window, **_: Any) -> np.ndarray:
        transform = Affine(*self.spec.transform[:6])
        data = read_asset(
            self.url,
            epsg=self.spec.epsg,
            transform=transform,
            window=window,
            resampling=self.resampling,
            access=self.access,
        )
        if data.dtype.kind not in "ui":
            raise ReadError(f"asset {self.url!r} holds {data.dtype}: integers are expected, reflectance times 10,000")
        if data.dtype.kind == "i":  # negative reflectance is dark, and must neither wrap round nor become nodata
            data = np.where(data < 0, 1, data)
        return data.astype(self.dtype, copy=False)

    def close(self) -> None:
        pass

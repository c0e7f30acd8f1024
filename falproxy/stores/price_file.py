"""Prices on the disk: responses of fal's pricing API, for other processes and after a restart."""

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from threading import Lock

from falproxy.fal.pricing import Price, parse_price
from falproxy.stores.private_files import make_private_folder

logger = logging.getLogger(__name__)

FORMAT = 1  # of the file; a file of another format is not read
FILE_MAX = 2**20  # bytes
ENTRIES_MAX = 1000


@dataclass(frozen=True, slots=True)
class ListedPrice:
    """An endpoint in fal's price list.

    price: None if fal has none, or one that costs cannot be computed with.
    fetched_at: seconds since 1970.
    is_found: False if fal does not know the endpoint.
    defaults: the model's own values of inputs that its price depends on.
    """

    price: Price | None
    fetched_at: float
    is_found: bool = True
    defaults: Mapping[str, object] | None = None


class PriceFile:
    """One file for all endpoints, replaced as a whole. If two processes write at once, prices of
    one of them are missing in it, and are asked for again. A file that cannot be used is logged,
    and otherwise ignored. All methods block.

    origin: the server that the prices are from, if it is not fal.
    """

    def __init__(self, path: Path, origin: str | None = None) -> None:
        self._path = path
        self._origin = origin or ""
        self._lock = Lock()

    def __repr__(self) -> str:
        return f"<PriceFile {self._path}>"

    def load(self) -> dict[str, ListedPrice]:
        try:
            with self._path.open("rb") as file:
                document = json.loads(file.read(FILE_MAX + 1), parse_float=Decimal)
            if document["format"] != FORMAT or document["origin"] != self._origin:
                return {}
            return {str(name): deserialize(row) for name, row in document["prices"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("Stored prices cannot be read: %s", type(error).__name__)
            return {}

    def save(self, prices: Mapping[str, ListedPrice]) -> None:
        """Add prices to the file; the oldest ones are dropped."""
        with self._lock:
            self._merge(prices)

    def _merge(self, prices: Mapping[str, ListedPrice]) -> None:
        merged = self.load() | dict(prices)
        latest = sorted(merged, key=lambda name: merged[name].fetched_at)[-ENTRIES_MAX:]
        rows = {name: serialize(merged[name]) for name in latest}
        document = {"format": FORMAT, "origin": self._origin, "prices": rows}
        content = json.dumps(document).encode()
        if len(content) > FILE_MAX:
            logger.warning("Prices cannot be stored: they are too large")
            return
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            make_private_folder(self._path.parent)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content)
            temporary.replace(self._path)
        except OSError as error:
            logger.warning("Prices cannot be stored: %s", error.strerror)
            with suppress(OSError):
                temporary.unlink()


def serialize(listed: ListedPrice) -> dict[str, object]:
    price = listed.price
    return {
        "usd": None if price is None else str(price.usd),
        "unit": None if price is None else price.unit,
        "at": listed.fetched_at,
        "found": listed.is_found,
        "defaults": listed.defaults and dict(listed.defaults),
    }


def deserialize(row: Mapping[str, object]) -> ListedPrice:
    """Raises: ValueError, KeyError, TypeError or AttributeError, the row is damaged."""
    price, defaults, usd = None, row["defaults"], row["usd"]
    if usd is not None:
        price = parse_price(Decimal(str(usd)), row["unit"])
        if price is None:
            raise ValueError("an invalid price")
    if defaults is not None and not isinstance(defaults, dict):
        raise TypeError("invalid defaults")
    return ListedPrice(price, float(str(row["at"])), bool(row["found"]), defaults)

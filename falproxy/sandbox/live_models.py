"""Models of live video of the offline fal."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class LiveModel:
    """One endpoint of live video.

    price: USD for one second. These are guesses.
    is_app_managed: `/ice` refers clients to the same path below the endpoint.
    """

    endpoint: str
    price: Decimal
    is_app_managed: bool = False


LIVE_MODEL_LIST = (
    LiveModel("minimax/h3-max/director", Decimal("0.02")),
    LiveModel("fal-ai/lingbot-world-2", Decimal("0.01"), is_app_managed=True),
)
LIVE_MODELS: Mapping[str, LiveModel] = {model.endpoint: model for model in LIVE_MODEL_LIST}
LIVE_PRICES: Mapping[str, tuple[str, str]] = {
    model.endpoint: (str(model.price), "seconds") for model in LIVE_MODEL_LIST
}

"""The models by the names that clients call them: an operator's own, and fal's endpoint ids."""

from collections.abc import Iterable

from falproxy.fal.endpoint import DEFAULT_MODELS, NamedEndpoint, is_endpoint


class ModelNames:
    """Which endpoint a model's name means."""

    def __init__(self, models: Iterable[NamedEndpoint] = DEFAULT_MODELS) -> None:
        self.endpoint_by_name = dict(models)

    def endpoint(self, name: str) -> str | None:
        """None: it is neither listed nor an endpoint id."""
        return self.endpoint_by_name.get(name) or (name if is_endpoint(name) else None)

    def is_listed_endpoint(self, endpoint: str) -> bool:
        """Whether the operator has listed an endpoint, which may then be one that fal publishes
        nothing of."""
        return endpoint in self.endpoint_by_name.values()

"""The models by the names that clients call them: an operator's own, and fal's endpoint ids."""

from collections.abc import Iterable

from falproxy.fal.endpoint import NAMED_MODELS, Named, is_endpoint


class Names:
    """Which endpoint a model's name means."""

    def __init__(self, models: Iterable[Named] = NAMED_MODELS) -> None:
        self.listed = dict(models)

    def endpoint(self, name: str) -> str | None:
        """None: it is neither listed nor an endpoint id."""
        return self.listed.get(name) or (name if is_endpoint(name) else None)

    def vouches_for(self, endpoint: str) -> bool:
        """Whether the operator has listed an endpoint, which may then be one that fal publishes
        nothing of."""
        return endpoint in self.listed.values()

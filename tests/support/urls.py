"""The path of the proxy route, and URLs of fal."""

PROXY = "/api/fal/proxy"
RUN = "https://fal.run/fal-ai/flux/dev"
SUBMIT = "https://queue.fal.run/fal-ai/flux/dev"
REQUEST = "https://queue.fal.run/fal-ai/flux/requests/7e2f0b8a-0001-4000-8000-000000000000"

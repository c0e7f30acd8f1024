"""Pages and endpoints for people and monitoring systems."""

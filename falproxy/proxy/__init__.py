"""Sends a call to fal and relays its response."""

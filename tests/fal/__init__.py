"""Tests of falproxy.fal."""

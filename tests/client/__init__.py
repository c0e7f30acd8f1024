"""Tests of falproxy.client."""

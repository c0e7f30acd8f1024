"""Tests of falproxy.stores.keys."""

"""Tests of falproxy.stores.cache."""

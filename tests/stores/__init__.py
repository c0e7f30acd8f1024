"""Tests of falproxy.stores."""

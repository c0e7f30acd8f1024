"""Tests of falproxy.app."""

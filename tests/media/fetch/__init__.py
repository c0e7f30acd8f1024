"""Tests of falproxy.media.fetch."""

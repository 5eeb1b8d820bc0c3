"""Thin callbacks over the recorder for other training frameworks."""

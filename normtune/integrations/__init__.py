"""Callbacks for training frameworks: each a few lines over `NormRecorder`."""

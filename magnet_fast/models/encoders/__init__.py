"""Encoders of images and of expressions."""

"""Triton kernels and their launchers: one plain function per operator, named and ordered as in ``_schemas.py``."""

"""Devices, processes, locks."""

"""Segmentation metrics, tables and pictures."""

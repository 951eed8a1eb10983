"""Graphs and the build directory."""

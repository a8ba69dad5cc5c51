"""Measures a server from outside, over HTTP. Imports nothing of the server it measures."""

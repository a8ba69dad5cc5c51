"""The life of an adapter: names and versions over time, where their weights lie, where they come from.

Runs on the event loop beside the routes and knows no HTTP. What is wanted of a name is durable (catalogue.py); what a
name stands for now and who uses it is adapters/registry.py; weights are on disk (adapters/version_store.py), in host
memory (host_tier.py) or in the device's pools (the engine's).
"""

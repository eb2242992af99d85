"""Clusters, profiles and plans as resources: the implementations of all calls on them."""

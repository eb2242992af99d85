"""Clusters, profiles and plans as resources: the implementation of every call about them."""

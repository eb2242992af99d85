"""Clusters, profiles and plans as resources: what each call checks, changes and answers."""

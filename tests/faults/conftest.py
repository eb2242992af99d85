"""Provides the fixtures of the store's tests."""

from tests.planner.store.conftest import postgres_server, postgres_url, sqlite_url, url

__all__ = ["postgres_server", "postgres_url", "sqlite_url", "url"]

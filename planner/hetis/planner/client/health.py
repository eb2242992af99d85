"""gRPC's health check without its package, which the base install lacks: an empty request, and one number back."""

from __future__ import annotations

HEALTH_METHOD = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"  # HealthCheckResponse{status: SERVING}


def says_serving(response: bytes) -> bool:
    return response == _SERVING

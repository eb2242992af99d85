# hetis-planner, with hetis-plan beside it. Build from the root of the repository:
#   docker build -f docker/planner.Dockerfile -t hetis-planner .
FROM python:3.13-slim AS build
RUN python -m venv /opt/hetis
WORKDIR /src
COPY . .
RUN /opt/hetis/bin/pip install --no-cache-dir --constraint constraints.txt '.[planner,postgres]'

FROM python:3.13-slim
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hetis-planner" \
      org.opencontainers.image.description="Plans LLM serving on mixed GPU fleets and keeps plans in force" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 hetis \
 && useradd --uid 10001 --gid 10001 --no-log-init --create-home --home-dir /var/lib/hetis hetis
COPY --from=build /opt/hetis /opt/hetis
ENV PATH=/opt/hetis/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HETIS_STORE=sqlite:////var/lib/hetis/planner.db
USER 10001:10001
# The store, and the dispatcher's compiled kernels for the next start.
VOLUME /var/lib/hetis
EXPOSE 8470
# Without certificates and tokens hetis-planner listens on loopback only: mount a configuration file and pass --config.
CMD ["hetis-planner"]
# gRPC's health check. For a planner with TLS or tokens, set HETIS_SERVER, HETIS_CA and HETIS_TOKEN_FILE.
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s --retries=3 CMD ["hetis-plan", "status", "--quiet"]

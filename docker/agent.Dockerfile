# hetis-agent: no CUDA, no solvers, no torch; the driver's NVML comes from the container runtime. Build from the root:
#   docker build -f docker/agent.Dockerfile -t hetis-agent .
FROM python:3.13-slim AS build
RUN python -m venv /opt/hetis
WORKDIR /src
COPY . .
RUN /opt/hetis/bin/pip install --no-cache-dir --constraint constraints.txt '.[agent]'

FROM python:3.13-slim
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hetis-agent" \
      org.opencontainers.image.description="Reports the GPUs of a node and makes its engine do what the planner asks" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 hetis \
 && useradd --uid 10001 --gid 10001 --no-log-init --create-home --home-dir /var/lib/hetis hetis
COPY --from=build /opt/hetis /opt/hetis
# NVIDIA_*: the container runtime exposes the GPUs, and of the driver only its management library and tools.
ENV PATH=/opt/hetis/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HETIS_AGENT_STATE_DIR=/var/lib/hetis \
    HETIS_AGENT_METRICS=127.0.0.1:8472 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=utility
USER 10001:10001
# The last assignments and the newest epoch: without them a restarted agent starts from scratch.
VOLUME /var/lib/hetis
CMD ["hetis-agent"]
# An agent's only port is that of its metrics. It is healthy without a planner: nodes keep serving by themselves.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request; urllib.request.urlopen('http://' + os.environ['HETIS_AGENT_METRICS'], timeout=4)"]

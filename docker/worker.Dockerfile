# hetis-worker: holds KV and computes attention over it, on a GPU or a CPU. Build from the root:
#   docker build -f docker/worker.Dockerfile -t hetis-worker .
# GPUs older than compute capability 7.5 (P100, V100) need torch for CUDA 12.6, of which 2.14 is the last version:
#   docker build -f docker/worker.Dockerfile --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 -t hetis-worker .
FROM python:3.13-slim AS build
ARG TORCH_INDEX=https://pypi.org/simple
RUN python -m venv /opt/hetis
WORKDIR /src
COPY . .
RUN /opt/hetis/bin/pip install --no-cache-dir --constraint constraints.txt --index-url "${TORCH_INDEX}" \
    --extra-index-url https://pypi.org/simple '.[worker]'

FROM python:3.13-slim
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hetis-worker" \
      org.opencontainers.image.description="Holds KV of attention heads and computes attention over it" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# gcc: Triton compiles the code that launches its kernels.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 hetis \
 && useradd --uid 10001 --gid 10001 --no-log-init --create-home --home-dir /var/lib/hetis hetis
COPY --from=build /opt/hetis /opt/hetis
# NVIDIA_*: the container runtime exposes the GPUs, and of the driver its compute libraries and tools.
ENV PATH=/opt/hetis/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HETIS_WORKER_LISTEN=0.0.0.0:7070 \
    HETIS_WORKER_PORT_FILE=/var/lib/hetis/worker.port \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
# Compiled kernels: without them a worker compiles for a minute after its start.
VOLUME /var/lib/hetis
EXPOSE 7070
CMD ["hetis-worker"]
# The file exists once the worker listens. If it stops answering, the engine notices and serves on without it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", \
    "import os; os.stat(os.environ['HETIS_WORKER_PORT_FILE'])"]

# vLLM's own image with the plugin added: it does nothing without HETIS_VLLM_CONFIG. Build from the root:
#   docker build -f docker/vllm.Dockerfile -t hetis-vllm .
FROM python:3.13-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:v0.32.0
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hetis-vllm" \
      org.opencontainers.image.description="vLLM that keeps KV of some attention heads on other cards" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /wheels /wheels
# vLLM's own packages stay unchanged: the plugin's few packages are added to them, or the build fails.
RUN uv pip freeze --system | grep == > /wheels/of-vllm.txt \
 && uv pip install --system --no-cache --constraint /wheels/of-vllm.txt "$(echo /wheels/hetis-*.whl)[vllm]" \
 && rm -r /wheels \
 && groupadd --gid 10001 hetis \
 && useradd --uid 10001 --gid 10001 --no-log-init --create-home --home-dir /var/lib/hetis hetis
ENV HOME=/var/lib/hetis \
    NUMBA_CACHE_DIR=/var/lib/hetis/numba
USER 10001:10001
# Compiled kernels of vLLM and the dispatcher: without them every start compiles for minutes.
VOLUME /var/lib/hetis
# The entry point is vLLM's own, `vllm serve`.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 CMD ["python3", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

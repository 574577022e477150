# sd-serve and sd-run on an NVIDIA GPU, without torch. From the root of the repository:
#   docker build --file docs/deploy/cuda.Dockerfile --build-arg EXTRA=tensorrt-rtx --tag sd-toolkit:cuda .
#   docker run --gpus all --stop-timeout 120 --read-only --tmpfs /cache --volume /srv/sd14.bundle:/bundle:ro --publish 127.0.0.1:8000:8000 sd-toolkit:cuda
# EXTRA is the backend that the bundle has engines of: cuda (ONNX Runtime), tensorrt or tensorrt-rtx.
# It listens on all addresses of the container: publish it to a proxy, and give it a key.
FROM nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04 AS build
ARG EXTRA=cuda
# The version is Ubuntu's: one for each release, with security fixes.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY engines/sd_engines engines/sd_engines
COPY runtime/sd_runtime runtime/sd_runtime
COPY export/sd_export export/sd_export
COPY benchmarks/sd_bench benchmarks/sd_bench
RUN python3 -m venv /opt/sd-toolkit && /opt/sd-toolkit/bin/pip install --no-cache-dir ".[${EXTRA},serve]"

FROM nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/sd-toolkit /opt/sd-toolkit
ENV PATH=/opt/sd-toolkit/bin:$PATH XDG_CACHE_HOME=/cache CUPY_CACHE_DIR=/cache/cupy PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready, not only alive: a container that drains is to get no more requests.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["sd-serve", "/bundle", "--host", "0.0.0.0", "--log-format", "json"]
